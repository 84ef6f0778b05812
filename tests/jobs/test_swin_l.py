"""The largest network through the command that people type: two steps on a CPU."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.checkpoints import state as checkpoint
from pipelines.config.train import TrainConfig
from pipelines.storage import locate

ROOT = Path(__file__).parents[2]

SMALL_IMAGES = (
    "--data.augment.short-sides 96 128 --data.augment.long-side 200 --data.augment.crop-short-sides 100 "
    "--data.augment.crop-size 64 96"
)
ONE_CPU = (
    "--scaling.device cpu --scaling.workers 1 --scaling.cpus-per-worker 1 --scaling.data-cpus 0.5 "
    "--data.samples-per-task 2 --weights none"
)


@pytest.mark.slow  # 100 s and 8 GiB
@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", ["swin_l_mmdet", "swin_l_original"])
def test_two_steps(recipe: str, tiny: TrainConfig, tmp_path: Path, ray_session: str) -> None:
    run = f"--recipe {recipe} --data.train {tiny.data.train} --run.storage {tmp_path} --run.name {recipe}"
    length = "--run.steps 2 --run.global-batch 2 --tracking.log-every 1 --model.num-classes 7"
    result = subprocess.run(
        [sys.executable, "jobs/train_swin_l.py", *f"{run} {length} {ONE_CPU} {SMALL_IMAGES}".split()],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray_session},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"finished at step 2: {tmp_path}/{recipe}/checkpoints/step_00000002\n")
    losses = [float(loss) for loss in re.findall(r"step \d/2 +loss (\S+)", result.stderr)]
    assert losses
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    state = checkpoint.load(checkpoint.step_folder(locate(tmp_path / recipe), 2))
    assert sum(tensor.numel() for tensor in state.model.values()) == 211_571_258 - (134 - 8) * 257
