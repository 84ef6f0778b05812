"""Weights are read from files, folders and runs, on disk and in a bucket, and equal those that were saved."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from maskformer import DEMO, MaskFormer, Taxonomy, build_model, weights
from maskformer.taxonomy import COCO
from pipelines.checkpoints import pretrained
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.state import BestCheckpoint, TrainingState, step_folder, write_best
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.errors import UserError
from pipelines.storage import locate

SMALL = replace(DEMO, num_queries=8, decoder_layers=1, feedforward_dim=64, hidden_dim=32)


@pytest.fixture(scope="module")
def model() -> MaskFormer:
    torch.manual_seed(0)
    return build_model(SMALL)


@pytest.fixture
def saved(model: MaskFormer, packs: dict[str, str], tiny: TrainConfig, bucket: str, tmp_path: Path) -> dict[str, str]:
    """Save a model as a file, as a folder of other programs and as a run, on disk and in a bucket; return the URIs."""
    taxonomy = open_pack(packs["val"]).taxonomy
    weights.save(model, tmp_path / "model.safetensors", "native", taxonomy)
    data = (tmp_path / "model.safetensors").read_bytes()
    about = json.dumps({"id2label": dict(enumerate(taxonomy.names)), "config": {"model": asdict(SMALL)}}).encode()
    (locate(bucket) / "model.safetensors").write_bytes(data)
    for folder in (locate(bucket) / "folder", locate(tmp_path) / "folder"):
        (folder / "model.safetensors").write_bytes(data)
        (folder / "config.json").write_bytes(about)
    state = TrainingState(5, dict(model.state_dict()), {})
    checkpoint.save(step_folder(locate(tmp_path / "run"), 5), state, replace(tiny, model=SMALL), taxonomy)
    write_best(locate(tmp_path / "run"), BestCheckpoint(5, 0.5))
    return {
        "file": str(tmp_path / "model.safetensors"),
        "folder": str(tmp_path / "folder"),
        "file in a bucket": f"{bucket}/model.safetensors",
        "folder in a bucket": f"{bucket}/folder",
        "run": str(tmp_path / "run"),
        "best": f"{tmp_path / 'run'}@best",
        "checkpoint": str(tmp_path / "run" / "checkpoints" / "step_00000005"),
    }


def test_a_model_is_read_from_every_location(
    model: MaskFormer, saved: dict[str, str], packs: dict[str, str], tmp_path: Path
) -> None:
    taxonomy = open_pack(packs["val"]).taxonomy
    folders = {}
    for kind, uri in saved.items():
        started = build_model(SMALL)
        report = pretrained.load_initial_weights(started, uri, taxonomy)
        assert (report.missing, report.classes_new) == ((), ()), kind
        opened = pretrained.open_model(uri, taxonomy)
        assert opened.taxonomy == taxonomy
        assert opened.config.model == SMALL, kind
        for name, tensor in model.state_dict().items():
            assert torch.equal(started.state_dict()[name], tensor), (kind, name)
            assert torch.equal(opened.weights[name], tensor), (kind, name)
        folders[kind] = opened.folder
    bucket = saved["file in a bucket"].rpartition("/")[0]
    assert folders == {
        "file": f"{tmp_path}/model",
        "folder": f"{tmp_path}/folder",
        "file in a bucket": f"{bucket}/model",
        "folder in a bucket": f"{bucket}/folder",
        "run": f"{tmp_path}/run",
        "best": f"{tmp_path}/run",
        "checkpoint": f"{tmp_path}/run",
    }


def test_a_run_of_other_classes_can_be_trained_from_but_not_evaluated(saved: dict[str, str]) -> None:
    coco = build_model(replace(SMALL, num_classes=133))
    report = pretrained.load_initial_weights(coco, saved["run"], COCO)
    assert report.classes_found == ()
    assert len(report.classes_new) == 133
    with pytest.raises(
        UserError, match=r"model\.safetensors does not know 133 of the data's 133 classes, first 'person'"
    ):
        pretrained.open_model(saved["file"], COCO)


def test_a_model_with_more_classes_than_the_data_can_be_evaluated(
    model: MaskFormer, saved: dict[str, str], packs: dict[str, str]
) -> None:
    known = open_pack(packs["val"]).taxonomy
    some = Taxonomy.from_coco([{"id": 10 - index, "name": known.names[index], "isthing": 1} for index in (0, 2, 3)])
    opened = pretrained.open_model(saved["file"], some)
    assert opened.config.model.num_classes == 3
    rows = model.state_dict()["class_head.weight"]
    torch.testing.assert_close(opened.weights["class_head.weight"], rows[[3, 2, 0, 7]], rtol=0, atol=0)


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, ("canary", "w")


def test_unusable_weights_are_explained(bucket: str, model: MaskFormer, tmp_path: Path) -> None:
    torch.save({f"backbone.{name}": tensor for name, tensor in model.backbone.state_dict().items()}, tmp_path / "b.pth")
    (tmp_path / "payload.pkl").write_bytes(pickle.dumps({"model": _Payload()}))
    (tmp_path / "short.pth").write_bytes((tmp_path / "b.pth").read_bytes()[:10_000])
    for uri, message in {
        f"{bucket}/absent.pth": r"There is nothing at s3://bucket-\w+/absent\.pth\. Give a run's folder",
        f"{tmp_path}/b.pth": r"b\.pth is not a complete MaskFormer",
        f"{tmp_path}/payload.pkl": r"payload\.pkl .*could run code",
        f"{tmp_path}/short.pth": r"short\.pth is damaged",
    }.items():
        with pytest.raises(UserError, match=message):
            pretrained.open_model(uri, COCO)
    assert not Path("canary").exists()


def test_the_weights_of_an_older_checkpoint_can_be_trained_from(
    model: MaskFormer, saved: dict[str, str], packs: dict[str, str]
) -> None:
    """The remedy in the message for another version: name model.safetensors itself."""
    manifest = locate(saved["checkpoint"]) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 1}))
    taxonomy = open_pack(packs["val"]).taxonomy
    started = build_model(SMALL)
    with pytest.raises(UserError, match=f"start a new run with --weights {saved['checkpoint']}/model.safetensors"):
        pretrained.load_initial_weights(started, saved["checkpoint"], taxonomy)
    pretrained.load_initial_weights(started, f"{saved['checkpoint']}/model.safetensors", taxonomy)
    for name, tensor in model.state_dict().items():
        assert torch.equal(started.state_dict()[name], tensor), name
