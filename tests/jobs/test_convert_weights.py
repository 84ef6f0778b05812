import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.convert_weights import main
from jobs.shared.cli import run
from maskformer import ModelConfig, Taxonomy, build_model, weights
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.state import TrainingState
from pipelines.config.recipes import DEMO
from pipelines.storage import locate

CONFIG = ModelConfig(num_classes=2, num_queries=3, hidden_dim=32, feedforward_dim=8, encoder_layers=0, decoder_layers=1)
ANIMALS = Taxonomy.from_coco([{"id": 4, "name": "cow", "isthing": 1}, {"id": 9, "name": "meadow", "isthing": 0}])


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "animals.safetensors"
    weights.save(build_model(CONFIG), path, taxonomy=ANIMALS)
    return path


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        run(main)
    return int(end.value.code or 0)


def test_around_through_every_format(monkeypatch, capsys, native: Path, tmp_path: Path) -> None:
    """The file that comes back is the one that went out, to the byte."""
    categories = tmp_path / "categories.json"
    categories.write_text(json.dumps({"categories": ANIMALS.to_coco(), "images": []}))
    source = native
    for to in ("huggingface", "mmdet", "native"):
        given = ["--categories", categories] if source != native else []  # only our files say what is a thing
        assert convert(monkeypatch, "--input", source, "--output", tmp_path / to, "--to", to, *given) == 0
        assert capsys.readouterr().out.endswith(f"written to {tmp_path / to}\n")
        source = tmp_path / to
    assert source.read_bytes() == native.read_bytes()
    assert convert(monkeypatch, "--input", native, "--output", source, "--to", "native") == 0  # nothing left to do


def test_classes_are_fitted_by_name(monkeypatch, capsys, native: Path, tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text(
        json.dumps([*ANIMALS.to_coco(), {"id": 1, "name": "sheep", "isthing": 1, "color": [1, 2, 3]}])
    )
    arguments = [
        "--input",
        native,
        "--output",
        tmp_path / "more",
        "--to",
        "native",
        "--categories",
        tmp_path / "more.json",
    ]
    assert convert(monkeypatch, *arguments) == 0
    assert "classes initialized randomly: 1 (sheep)" in capsys.readouterr().out
    assert weights.detect_config(tmp_path / "more").num_classes == 3
    assert weights.class_names(weights.read(tmp_path / "more")) == ("sheep", "cow", "meadow")


def test_a_checkpoint_of_a_training(monkeypatch, capsys, tmp_path: Path) -> None:
    config = replace(DEMO, model=replace(DEMO.model, num_classes=2, num_heads=2))
    model = build_model(config.model)
    place = locate(tmp_path / "step_00000001")
    checkpoint.save(place, TrainingState(1, dict(model.state_dict()), {}), config, ANIMALS)
    assert convert(monkeypatch, "--input", place, "--output", tmp_path / "native", "--to", "native") == 0
    file = weights.read(tmp_path / "native")
    assert (weights.detect_config(file), weights.stated_taxonomy(file)) == (config.model, ANIMALS)
    assert all(torch.equal(file.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_bad_input(monkeypatch, capsys, native: Path, tmp_path: Path) -> None:
    """Each is one paragraph and exit status 2."""
    (tmp_path / "page.pth").write_text("<html>")
    torch.save({f"layer1.{name}": torch.zeros(1) for name in "ab"}, tmp_path / "backbone.pth")
    state = build_model(CONFIG).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "mask_head" not in name}, tmp_path / "half.pth")
    torch.save({"weird": torch.zeros(1)}, tmp_path / "weird.pth")
    (tmp_path / "taken").write_text("mine")
    weights.save(build_model(CONFIG), tmp_path / "names.pth", "mmdet", ANIMALS)
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    os.mkfifo(tmp_path / "fifo.json")
    weights.save(build_model(CONFIG), tmp_path / "unnamed")
    output, program = tmp_path / "output", tmp_path / "output.onnx"
    for message, *arguments in (
        ("There is nothing at", tmp_path / "nothing", output, "native"),
        ("is a web page", tmp_path / "page.pth", output, "native"),
        ("not a complete MaskFormer", tmp_path / "backbone.pth", output, "native"),
        ("not a complete model: it lacks 6 tensors", tmp_path / "half.pth", output, "native"),
        ("no tensor of a MaskFormer", tmp_path / "weird.pth", output, "native"),
        ("already exists with other content", native, tmp_path / "taken", "mmdet"),
        ("but not which of them are things", tmp_path / "names.pth", output, "native"),
        ("nested too deeply", native, output, "native", "--categories", tmp_path / "deep.json"),
        ("it is a FIFO", native, output, "native", "--categories", tmp_path / "fifo.json"),
        ("it is a device", native, output, "native", "--categories", "/dev/zero"),
        ("has no categories (KeyError", native, output, "native", "--categories", tmp_path / "bad.json"),
        ("No such file or directory", native, output, "native", "--categories", tmp_path / "nothing.json"),
        ("File exists", native, tmp_path / "taken" / "output", "native"),
        ("--size is for onnx and torch-export, got it with --to mmdet.", native, output, "mmdet", "--size", 64, 64),
        ("ends in .onnx", native, output, "onnx"),
        ("File exists", native, tmp_path / "taken" / "output.onnx", "onnx"),
        ("at least 33 pixels", native, program, "onnx", "--size", 800, 20),
        ("does not name its 2 classes", tmp_path / "unnamed", program, "onnx"),
    ):
        source, target, to, *more = arguments
        assert convert(monkeypatch, "--input", source, "--output", target, "--to", to, *more) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not output.exists()
    assert not list(tmp_path.glob("*output*"))
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_network_for_onnxruntime(monkeypatch, capsys, caplog, tmp_path: Path) -> None:
    """Size and thresholds are those of the run."""
    config = replace(DEMO, model=replace(DEMO.model, num_classes=2, num_heads=2, encoder_layers=0, decoder_layers=1))
    place = locate(tmp_path / "step_00000001")
    checkpoint.save(place, TrainingState(1, dict(build_model(config.model).state_dict()), {}), config, ANIMALS)
    caplog.set_level(logging.INFO)
    arguments = ["--input", place, "--output", tmp_path / "demo.onnx", "--to", "onnx", "--size", 64, 80]
    assert convert(monkeypatch, *arguments) == 0
    out = capsys.readouterr().out
    assert "largest difference of a logit from PyTorch, on noise of 64x80 pixels: " in out
    assert out.endswith(f"written to {tmp_path / 'demo.onnx'}\n")
    assert not [record for record in caplog.records if record.name.startswith("onnx")]  # only what concerns the user
    about = json.loads((tmp_path / "demo.onnx.json").read_text())
    assert (about["short_side"], about["score_threshold"], about["width"]) == (56, 0.5, 80)
    assert Taxonomy.from_coco(about["categories"]) == ANIMALS


def test_no_ray_is_needed(native: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = sys.modules['mlflow'] = None; from jobs.shared.cli import run; "
    code += "from jobs.convert_weights import main; run(main)"
    arguments = ["--input", str(native), "--output", str(tmp_path / "mmdet.pth"), "--to", "mmdet"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert weights.detect_config(tmp_path / "mmdet.pth").num_classes == 2
