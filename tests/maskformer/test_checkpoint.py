"""load(): a model from every kind of source segments as the model that was saved."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import maskformer as mf
from maskformer import Segmenter
from maskformer.config import SWIN_T, ModelConfig, WeightFormat
from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints.state import BestCheckpoint, write_best
from pipelines.config.train import TrainConfig
from pipelines.data.synthetic import CATEGORIES
from pipelines.storage import locate
from tests.checkpoints import saved

TAXONOMY = Taxonomy.from_coco(CATEGORIES)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)


@pytest.fixture
def run(tiny: TrainConfig, tmp_path: Path) -> tuple[Path, Segmenter, Segmenter]:
    """Return a run with the checkpoints 5, the best one, and 10, and what they should become."""
    folder = tmp_path / "run"
    older, newer = saved(tiny, TAXONOMY, folder, 5, seed=0), saved(tiny, TAXONOMY, folder, 10, seed=2)
    write_best(locate(folder), BestCheckpoint(5, 0.5))
    return folder, older, newer


def assert_same(found: Segmenter, expected: Segmenter) -> None:
    assert found.taxonomy == expected.taxonomy
    assert found.config == expected.config
    assert (found.short_side, found.long_side) == (expected.short_side, expected.long_side)
    ids, segments = found.segment(PIXELS)
    assert len(segments) > 1
    assert np.array_equal(ids, expected(PIXELS).ids)
    assert segments == expected(PIXELS).segments


def test_runs_and_their_checkpoints(run: tuple[Path, Segmenter, Segmenter]) -> None:
    folder, older, newer = run
    assert_same(mf.load(folder, device="cpu"), newer)
    assert_same(mf.load(f"{folder}@best", device="cpu"), older)
    assert_same(mf.load(folder / "checkpoints" / "step_00000005"), older)
    (folder / "checkpoints" / "step_00000011").mkdir()  # interrupted while it was saved
    assert_same(mf.load(folder), newer)
    assert not np.array_equal(newer(PIXELS).ids, older(PIXELS).ids)


def test_a_damaged_checkpoint_is_not_used(
    run: tuple[Path, Segmenter, Segmenter], caplog: pytest.LogCaptureFixture
) -> None:
    folder, older, _ = run
    file = folder / "checkpoints" / "step_00000010" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert_same(mf.load(folder), older)
    assert "step_00000010 is damaged: model.safetensors" in caplog.text
    with pytest.raises(ValueError, match="step_00000010 is damaged"):
        mf.load(file.parent)
    (folder / "checkpoints" / "step_00000005" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"No checkpoint of .* can be used"):
        mf.load(folder)


def test_the_files_of_a_registered_model(run: tuple[Path, Segmenter, Segmenter], tmp_path: Path) -> None:
    _, expected, _ = run
    artifacts = tmp_path / "download" / "artifacts"
    artifacts.mkdir(parents=True)
    about = {
        "model": asdict(expected.model.config),
        "panoptic": asdict(expected.config),
        "categories": TAXONOMY.to_coco(),
        "short_side": expected.short_side,
        "long_side": expected.long_side,
    }
    (artifacts / "about.json").write_text(json.dumps(about))
    safetensors.torch.save_file(expected.model.state_dict(), artifacts / "model.safetensors")
    assert_same(mf.load(artifacts.parent), expected)
    assert_same(mf.load(artifacts), expected)


SMALL_SWIN = ModelConfig(
    **{**asdict(SWIN_T), "num_classes": 133, "hidden_dim": 32, "feedforward_dim": 32, "num_queries": 5}
)


@pytest.mark.parametrize("kind", ["mmdet", "huggingface"])
def test_files_of_other_programs_have_the_classes_of_coco(kind: WeightFormat, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mf.build_model(SMALL_SWIN).eval()
    mf.weights.save(model, tmp_path / "model.x", kind)
    found = mf.load(tmp_path / "model.x")
    assert found.taxonomy == COCO
    assert found.config == mf.PanopticConfig()
    assert (found.short_side, found.long_side) == (800, 1333)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], tensor), name


def test_other_classes_must_be_given(tmp_path: Path) -> None:
    model = mf.build_model(ModelConfig(**{**asdict(SMALL_SWIN), "num_classes": 7}))
    mf.weights.save(model, tmp_path / "model.pth", "mmdet")  # without names of classes
    with pytest.raises(ValueError, match=r"has 7 classes, and which of them are things is not known.*taxonomy="):
        mf.load(tmp_path / "model.pth")
    assert mf.load(tmp_path / "model.pth", taxonomy=TAXONOMY).taxonomy == TAXONOMY


def test_what_is_no_model_is_explained(tmp_path: Path, run: tuple[Path, Segmenter, Segmenter]) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "text.pth").write_text("hello")
    for source, message in {
        str(tmp_path / "nothing"): "There is nothing at",
        str(tmp_path / "nothing@best"): "nothing does not exist",
        str(tmp_path / "empty"): "has no complete checkpoint",
        str(tmp_path / "empty@best"): "has no best checkpoint",
        str(tmp_path / "text.pth"): "has an unknown format",
        "s3://bucket/run": "loaded from local paths",
        "models:/name@alias": "loaded from local paths",
    }.items():
        with pytest.raises(ValueError, match=message):
            mf.load(source)
    manifest = run[0] / "checkpoints" / "step_00000010" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 99}))
    with pytest.raises(ValueError, match="has version 99, and this program reads 2"):
        mf.load(run[0])


TWO_LINES = """
import maskformer as mf
result = mf.load({run!r}).segment({image!r})
import json, sys
print(json.dumps([result.segments, [name for name in {heavy!r} if name in sys.modules]]))
"""


def test_two_lines_import_little(run: tuple[Path, Segmenter, Segmenter], tmp_path: Path) -> None:
    folder, _, expected = run
    Image.fromarray(PIXELS).save(tmp_path / "x.png")
    heavy = ["ray", "pyarrow", "mlflow", "pandas", "torchvision", "scipy", "torch._dynamo", "sympy", "pipelines"]
    code = TWO_LINES.format(run=str(folder), image=str(tmp_path / "x.png"), heavy=heavy)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    segments, imported = json.loads(answer.stdout)
    assert imported == []
    assert segments == json.loads(json.dumps(expected(PIXELS).segments))
