"""The exported network against the model: logits, and the whole panoptic result."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import maskformer.export
from maskformer import ModelConfig, PanopticConfig, Segmenter, Taxonomy, build_model
from maskformer.export import ExportFormat, ExportReport, export
from maskformer.postprocess import Size
from maskformer.preprocess import resize_image, resized_shape
from pipelines.data.synthetic import CATEGORIES, SyntheticConfig, draw_scene

onnxruntime: Any = pytest.importorskip("onnxruntime", reason="of the extra onnx")

DOCS = Path(__file__).parents[2] / "docs" / "checkpoints.md"
TAXONOMY = Taxonomy.from_coco(CATEGORIES)
SMALL: dict[str, Any] = {
    "num_classes": 7,
    "num_queries": 5,
    "hidden_dim": 32,
    "num_heads": 2,
    "feedforward_dim": 16,
    "decoder_layers": 1,
}
RESNET = ModelConfig(encoder_layers=1, **SMALL)
SWIN = ModelConfig(backbone="swin_t", encoder_layers=0, **SMALL)
TINY = ModelConfig(backbone="small", encoder_layers=0, **SMALL)
SWIN_SIZE = (61, 90)


def segmenter(config: ModelConfig) -> Segmenter:
    """Build a model with random weights and few blocks, which keeps every kind of layer and exports fast."""
    torch.manual_seed(0)
    model = build_model(config)
    if config.backbone == "resnet50":
        for name in ("layer1", "layer2", "layer3", "layer4"):
            setattr(model.backbone, name, getattr(model.backbone, name)[:1])
    elif config.backbone == "swin_t":
        model.backbone.features[5] = model.backbone.features[5][:2]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    for module in model.modules():  # initially every norm is the identity
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.get_buffer("running_mean"), 0, 0.1)
    return Segmenter(model, TAXONOMY, PanopticConfig(score_threshold=0.2), short_side=56, long_side=96)


@dataclass(frozen=True)
class Exported:
    segmenter: Segmenter
    file: Path
    report: ExportReport


def written(folder: Path, config: ModelConfig, format: ExportFormat, size: Size | None) -> Exported:
    model = segmenter(config)
    file = folder / ("model.onnx" if format == "onnx" else "model.pt2")
    return Exported(model, file, export(model, file, format, size))


@pytest.fixture(scope="module", params=["resnet50", pytest.param("swin_t", marks=pytest.mark.slow)])
def onnx(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    config, size = (RESNET, None) if request.param == "resnet50" else (SWIN, SWIN_SIZE)
    return written(folder, config, "onnx", size)


def runtime(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return the exported network as a function of RGB [H, W, 3] in uint8."""
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])

    def run(image: np.ndarray) -> list[np.ndarray]:
        pixels = image.transpose(2, 0, 1)[None].astype(np.float32)
        return session.run(["class_logits", "mask_logits"], {"pixel_values": pixels})

    return run


def logits(segmenter: Segmenter, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    classes, masks, _ = segmenter._forward(image, (image.shape[0], image.shape[1]))
    return classes, masks


def sizes_for(exported: Exported) -> list[Size]:
    return [SWIN_SIZE] if exported.segmenter.model.config.backbone == "swin_t" else [(33, 130), (75, 64), (97, 97)]


def test_the_logits_are_those_of_the_model(onnx: Exported) -> None:
    run = runtime(onnx.file)
    for size in sizes_for(onnx):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
        expected = logits(onnx.segmenter, image)
        for found, wanted in zip(run(image), expected, strict=True):
            assert found.shape == (1, *wanted.shape)
            assert np.abs(found[0] - wanted.numpy()).max() < 1e-4  # measured: 1e-5
            assert wanted.std() > 0.1


def test_the_panoptic_result_is_that_of_the_segmenter(
    onnx: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the code of the documentation, and nothing of the model but the file."""
    [code] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)
        if "onnxruntime" in block
    ]
    fixed = onnx.segmenter.model.config.backbone == "swin_t"
    if fixed:
        code, changed = re.subn(r"^size = .*$", 'size = about["height"], about["width"]', code, flags=re.M)
        assert changed == 1
    (tmp_path / "maskformer.onnx").symlink_to(onnx.file)
    monkeypatch.chdir(tmp_path)
    variables, found_segments = dict[str, Any](), 0
    for number in range(4):
        image = draw_scene(np.random.default_rng(number), SyntheticConfig()).image
        variables = {"image": image}
        exec(code, variables)
        height, width = image.shape[:2]
        size: Size = SWIN_SIZE if fixed else resized_shape(height, width, 56, 96)
        expected, segments = onnx.segmenter.segment_resized(resize_image(image, size), (height, width))
        found_segments += len(segments)
        assert (variables["ids"] == expected).mean() > 0.999  # a pixel at the border of two segments may change sides
        assert [(each["id"], each["category_id"]) for each in variables["segments"]] == [
            (each["id"], each["category_id"]) for each in segments
        ]
    assert found_segments
    assert variables["taxonomy"] == TAXONOMY
    assert variables["about"] == json.loads(onnx.file.with_name("model.onnx.json").read_text())


def test_a_program_of_torch_export_is_equal_to_the_bit(tmp_path: Path) -> None:
    exported = written(tmp_path, TINY, "torch-export", None)
    assert exported.report.difference == 0
    extra = {"metadata.json": ""}
    module = torch.export.load(exported.file, extra_files=extra).module()
    assert json.loads(extra["metadata.json"]) == json.loads((tmp_path / "model.pt2.json").read_text())
    for size in sizes_for(exported):
        image = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
        expected = logits(exported.segmenter, image)
        found = module(torch.from_numpy(image).permute(2, 0, 1)[None].float())
        assert all(torch.equal(left[0], right) for left, right in zip(found, expected, strict=True))


def test_weights_beyond_the_limit_of_onnx_go_into_a_second_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maskformer.export, "_LARGEST_FILE", 1000)
    exported = written(tmp_path, TINY, "onnx", (64, 64))
    names = ["model.onnx", "model.onnx.data", "model.onnx.json"]
    assert sorted(file.name for file in exported.report.files) == names
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert (tmp_path / "model.onnx").stat().st_size < (tmp_path / "model.onnx.data").stat().st_size
    image = np.zeros((33, 33, 3), np.uint8)
    with pytest.raises(Exception, match="invalid dimensions"):  # the size was fixed
        runtime(exported.file)(image)
    runtime(exported.file)(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    ("backbone", "name", "format", "size", "message"),
    [
        ("swin_t", "a.onnx", "onnx", None, "swin_t can be exported for one size only, and none was given"),
        ("swin_t", "a.onnx", "onnx", (32, 640), "at least 33 pixels, since the network has a stride of 32, got 32 and"),
        ("small", "a.pth", "onnx", None, r"a\.pth is not a name for onnx\. Give a name that ends in \.onnx"),
        ("small", "a.onnx", "torch-export", None, r"ends in \.pt2"),
        ("small", "taken.onnx", "onnx", None, r"taken\.onnx already exists"),
        ("small", "half.pt2", "torch-export", None, r"half\.pt2\.json already exists"),
    ],
)
def test_what_cannot_be_written(
    backbone: Any, name: str, format: Any, size: Size | None, message: str, tmp_path: Path
) -> None:
    for taken in ("taken.onnx", "half.pt2.json"):
        (tmp_path / taken).write_text("mine")
    model = segmenter(ModelConfig(backbone=backbone, encoder_layers=0, **SMALL))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / name, format, size)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "taken.onnx": "mine",
        "half.pt2.json": "mine",
    }


def test_a_program_that_differs_from_the_model_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = maskformer.export._run_torch

    def wrong(path: Path, sizes: tuple[Size, ...]) -> list[list[torch.Tensor]]:
        return [[classes, masks + 0.1] for classes, masks in right(path, sizes)]

    monkeypatch.setattr(maskformer.export, "_run_torch", wrong)
    with pytest.raises(ValueError, match=r"mask_logits differ by 0\.1 from those of the model, on an image of 75x101"):
        written(tmp_path, TINY, "torch-export", None)
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        ValueError, match=r'needs onnxscript, .* Install the extra: pip install "maskformer-ray\[onnx\]"'
    ):
        written(tmp_path, TINY, "onnx", None)
    assert list(tmp_path.iterdir()) == []
