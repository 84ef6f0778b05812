"""Import then export gives back every tensor bit for bit, and no partial file is left."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskformer import DEMO, MaskFormer, ModelConfig, Taxonomy, build_model, weights
from maskformer.config import WeightFormat
from maskformer.taxonomy import COCO
from tests.maskformer.weights.foreign_names import R50_SMALL, SWIN_SMALL, fill, mmdet

TINY = ModelConfig(
    backbone="small",
    num_classes=2,
    num_queries=4,
    hidden_dim=32,
    feedforward_dim=8,
    encoder_layers=0,
    decoder_layers=1,
)
ANIMALS = Taxonomy.from_coco([{"id": 4, "name": "cow", "isthing": 1}, {"id": 9, "name": "meadow", "isthing": 0}])


def loaded(source: weights.Source, config: ModelConfig) -> MaskFormer:
    state, report = weights.load(source, config)
    report.require_complete()
    with torch.device("meta"):
        model = build_model(config)
    model.load_state_dict(state, assign=True)
    return model


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
        assert tensor.dtype == right[name].dtype, name


@pytest.mark.parametrize("config", [R50_SMALL, SWIN_SMALL], ids=lambda config: config.backbone)
@pytest.mark.parametrize(("format", "version"), [("mmdet", 3), ("mmdet2", 2)])
def test_a_file_of_mmdet_survives(format: WeightFormat, version: int, config: ModelConfig, tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(config.num_classes))
    meta = {"CLASSES": names} if version == 2 else {"dataset_meta": {"classes": names}}
    original = {"meta": meta, "state_dict": fill(mmdet(version, config))}
    torch.save(original, tmp_path / "original.pth")
    taxonomy = Taxonomy.from_coco([{"id": index, "name": name, "isthing": 1} for index, name in enumerate(names)])
    model = loaded(tmp_path / "original.pth", weights.detect_config(tmp_path / "original.pth"))
    weights.save(model, tmp_path / "again.pth", format, taxonomy)
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert again["meta"] == meta
    assert_equal(again["state_dict"], original["state_dict"])


@pytest.mark.parametrize("config", [DEMO, TINY], ids=["demo", "tiny"])
def test_a_native_file_states_its_configuration(config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, num_classes=2, dropout=0.25)
    model = build_model(config)
    weights.save(model, tmp_path / "model", taxonomy=ANIMALS)
    file = weights.read(tmp_path / "model")
    assert weights.detect_config(file) == config
    assert weights.stated_taxonomy(file) == ANIMALS
    state, report = weights.load(file, config, ANIMALS)
    assert (report.format, report.missing, report.unused, report.reshaped) == ("native", (), (), ())
    assert_equal(state, dict(model.state_dict()))


def test_133_classes_are_written_with_the_names_of_coco(tmp_path: Path) -> None:
    weights.save(build_model(dataclasses.replace(TINY, num_classes=133)), tmp_path / "coco")
    assert weights.stated_taxonomy(weights.read(tmp_path / "coco")) == COCO
    weights.save(build_model(TINY), tmp_path / "unnamed")
    assert weights.class_names(weights.read(tmp_path / "unnamed")) is None


@pytest.mark.parametrize("format", ["native", "huggingface"])
def test_an_existing_output_is_kept(format: WeightFormat, tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, backbone="resnet50") if format == "huggingface" else TINY
    model = build_model(config)
    output = tmp_path / "new" / "output"
    weights.save(model, output, format)
    weights.save(model, output, format)  # the same again is nothing to do
    with torch.no_grad():
        model.class_head.bias.add_(1)
    before = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    with pytest.raises(
        ValueError, match=rf"{output} already exists with other content\. Choose another output, or delete it"
    ):
        weights.save(model, output, format)
    assert {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()} == before


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    model = build_model(dataclasses.replace(TINY, backbone="resnet50"))
    with pytest.raises(OSError, match="No space left"):
        weights.save(model, tmp_path / "output", "huggingface")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "change", "message"),
    [
        ("timm", {}, r"no format 'timm' to write\. Use one of native, mmdet, mmdet2, huggingface"),
        ("mmdet", {}, r"backbone\.stem\.0\.weight has no name in mmdet 3\.x"),
        ("huggingface", {}, "no backbone 'small'"),
        (
            "huggingface",
            {"encoder_layers": 6},
            "no transformer encoder in its pixel decoder, this model has 6 encoder layers",
        ),
        ("huggingface", {"backbone": "resnet50", "hidden_dim": 48}, "must be a multiple of 32, got 48"),
    ],
)
def test_models_that_a_format_cannot_represent(
    format: WeightFormat, change: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = build_model(dataclasses.replace(TINY, **change))
    with pytest.raises(ValueError, match=message):
        weights.save(model, tmp_path / "output", format)
    assert list(tmp_path.iterdir()) == []


def test_the_taxonomy_must_be_the_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="The model has 2 classes, the taxonomy 133"):
        weights.save(build_model(TINY), tmp_path / "output", taxonomy=COCO)
