"""Weights from anywhere: whatever the format and the place, the tensors are those that were saved."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from maskformer import DEMO, MaskFormer, Taxonomy, build_model, weights
from maskformer.taxonomy import COCO
from pipelines import checkpoint, pretrained
from pipelines.checkpoint import TrainingState
from pipelines.config import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.errors import UserError
from pipelines.storage import locate

SMALL = replace(DEMO, num_queries=8, decoder_layers=1, feedforward_dim=64, hidden_dim=32)


@pytest.fixture(scope="module")
def model() -> MaskFormer:
    torch.manual_seed(0)
    return build_model(SMALL)


@pytest.fixture
def places(model: MaskFormer, packs: dict[str, str], tiny: TrainConfig, bucket: str, tmp_path: Path) -> dict[str, str]:
    """Save one model in many places: as a file, as a folder of other programs, as a run; on disk and in a bucket."""
    taxonomy = open_pack(packs["val"]).taxonomy
    weights.save(model, tmp_path / "model.safetensors", "own", taxonomy)
    data = (tmp_path / "model.safetensors").read_bytes()
    about = json.dumps({"id2label": dict(enumerate(taxonomy.names)), "config": {"model": asdict(SMALL)}}).encode()
    (locate(bucket) / "model.safetensors").write_bytes(data)
    for folder in (locate(bucket) / "folder", locate(tmp_path) / "folder"):
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_bytes(about)
    state = TrainingState(5, dict(model.state_dict()), {}, {})
    checkpoint.save(checkpoint.folder(locate(tmp_path / "run"), 5), state, replace(tiny, model=SMALL), taxonomy)
    return {
        "file": str(tmp_path / "model.safetensors"),
        "folder": str(tmp_path / "folder"),
        "file in a bucket": f"{bucket}/model.safetensors",
        "folder in a bucket": f"{bucket}/folder",
        "run": str(tmp_path / "run"),
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "step_00000005"),
    }


def test_a_model_comes_back_from_everywhere(
    model: MaskFormer, places: dict[str, str], packs: dict[str, str], tmp_path: Path
) -> None:
    taxonomy = open_pack(packs["val"]).taxonomy
    folders = {}
    for place, uri in places.items():
        started = build_model(SMALL)
        report = pretrained.start(started, uri, taxonomy)
        assert (report.missing, report.classes_new) == ((), ()), place
        saved = pretrained.open_model(uri, taxonomy)
        assert saved.taxonomy == taxonomy
        assert saved.config.model == SMALL, place
        for name, tensor in model.state_dict().items():
            assert torch.equal(started.state_dict()[name], tensor), (place, name)
            assert torch.equal(saved.weights[name], tensor), (place, name)
        folders[place] = saved.folder
    bucket = places["file in a bucket"].rpartition("/")[0]
    assert folders == {
        "file": f"{tmp_path}/model",
        "folder": f"{tmp_path}/folder",
        "file in a bucket": f"{bucket}/model",
        "folder in a bucket": f"{bucket}/folder",
        "run": f"{tmp_path}/run",
        "checkpoint": f"{tmp_path}/run",
    }


def test_a_run_of_other_classes_is_a_start_but_cannot_be_evaluated(places: dict[str, str]) -> None:
    coco = build_model(replace(SMALL, num_classes=133))
    report = pretrained.start(coco, places["run"], COCO)
    assert report.classes_found == ()
    assert len(report.classes_new) == 133
    with pytest.raises(
        UserError, match=r"model\.safetensors does not know 133 of the data's 133 classes, first 'person'"
    ):
        pretrained.open_model(places["file"], COCO)


def test_some_of_the_classes_are_enough_to_be_evaluated(
    model: MaskFormer, places: dict[str, str], packs: dict[str, str]
) -> None:
    known = open_pack(packs["val"]).taxonomy
    some = Taxonomy.from_coco([{"id": 10 - place, "name": known.names[place], "isthing": 1} for place in (0, 2, 3)])
    saved = pretrained.open_model(places["file"], some)
    assert saved.config.model.num_classes == 3
    rows = model.state_dict()["class_head.weight"]
    torch.testing.assert_close(saved.weights["class_head.weight"], rows[[3, 2, 0, 7]], rtol=0, atol=0)


class _Plant:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


def test_what_cannot_be_used_is_explained(bucket: str, model: MaskFormer, tmp_path: Path) -> None:
    torch.save({f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()}, tmp_path / "b.pth")
    (tmp_path / "plant.pkl").write_bytes(pickle.dumps({"model": _Plant()}))
    (tmp_path / "short.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:10_000])
    for where, message in {
        f"{bucket}/absent.pth": r"There is nothing at s3://bucket-\w+/absent\.pth\. Give a run's folder",
        f"{tmp_path}/b.pth": r"b\.pth is not a whole MaskFormer",
        f"{tmp_path}/plant.pkl": r"plant\.pkl is not opened: .* could run code",
        f"{tmp_path}/short.pth": r"short\.pth is damaged, cut short",
    }.items():
        with pytest.raises(UserError, match=message):
            pretrained.open_model(where, COCO)
    assert not Path("canary").exists()
