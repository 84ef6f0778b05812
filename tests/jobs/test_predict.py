"""jobs/predict.py as a process: exit statuses, one picture without Ray, and continuing after a kill."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer import Taxonomy
from pipelines.config.predict import PredictConfig
from pipelines.config.train import TrainConfig
from pipelines.data.synthetic import CATEGORIES
from pipelines.inference import predict
from tests.checkpoints import saved
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
NUM_PICTURES = 120

REPORT = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print([name for name in ("ray", "mlflow", "av") if name in sys.modules])
"""


@pytest.fixture
def command(tiny: TrainConfig, tmp_path: Path) -> list[str]:
    """Save a model, and return the arguments that predict with it."""
    saved(tiny, Taxonomy.from_coco(CATEGORIES), tmp_path / "run")
    return ["jobs/predict.py", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out")]


def draw(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (30 + number % 5, 44, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def test_one_picture_does_not_import_ray(command: list[str], tmp_path: Path) -> None:
    draw(tmp_path / "in", 1)
    (tmp_path / "in" / "broken\x1b[31m.png").write_bytes(b"no")
    process = [sys.executable, "-c", REPORT, *command]
    done = subprocess.run([*process, str(tmp_path / "in")], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr
    assert f"1 segmented, 1 failed: {tmp_path}/out" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "failed.json", "overlays", "panoptic", "predictions.json", "records", "settings.json"
    ]  # fmt: skip
    nothing = subprocess.run([*process, "none.png"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert nothing.returncode == 2
    assert "error: There is nothing at " in nothing.stderr
    assert "Traceback" not in nothing.stderr


@pytest.mark.ray
@pytest.mark.timeout(400)
@pytest.mark.slow
def test_a_killed_prediction_continues(
    command: list[str],
    jobs: "list[subprocess.Popen[str]]",
    ray_session: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw(tmp_path / "in", NUM_PICTURES)
    line = [sys.executable, *command, "--scaling.workers", "1", "--scaling.device", "cpu", str(tmp_path / "in")]
    job = subprocess.Popen(line, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": ray_session}, text=True)
    jobs.append(job)
    out = tmp_path / "out"
    wait_for(
        lambda: len(list(out.glob("overlays/*.jpg"))) >= 5 and any(out.glob("records/*.jsonl")),
        "five pictures and a record",
        job,
        poll=0.005,
    )
    job.send_signal(signal.SIGKILL)
    job.wait()
    written = len(list(out.glob("overlays/*.jpg")))
    assert 5 <= written < NUM_PICTURES, "it was not interrupted"
    assert not (out / "predictions.json").exists()

    config = PredictConfig(checkpoint=str(tmp_path / "run"), input=(str(tmp_path / "in"),), output=str(out))
    result = predict(config)
    assert result.before > 0
    assert result.done + result.before == NUM_PICTURES

    monkeypatch.setattr("pipelines.inference.driver.FEW", NUM_PICTURES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on Ray
    try:
        predict(PredictConfig(checkpoint=config.checkpoint, input=config.input, output=str(tmp_path / "whole")))
    finally:
        torch.set_num_threads(threads)
    whole, continued = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", out)
    )
    assert set(continued) == set(whole)
    assert continued == whole
    assert len(json.loads(whole["predictions.json"])["images"]) == NUM_PICTURES
