"""Repeat the step at which a run stopped because it was not finite, and say which layer and images cause it.

python jobs/replay.py --bundle runs/r50/replay/step_00000123
"""

from dataclasses import dataclass, field
from typing import Literal

from jobs.shared.cli import parse, run
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ReplayScaling:
    """Where to compute."""

    device: Literal["cpu", "cuda"] | None = None
    """Device of the computation: one GPU, or the CPU. Default: that of the run, or the CPU without a GPU."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Which step to repeat, and how. It runs in this process, without Ray, and writes nothing."""

    bundle: str
    """Folder that the run wrote when it stopped, <run>/replay/step_*. Path or s3:// URI."""
    precision: Literal["bfloat16", "float32"] | None = None
    """Precision of the network (autocast). Default: what the run's setting is on the device."""
    scaling: ReplayScaling = field(default_factory=ReplayScaling)


def main() -> None:
    flags = parse(Replay, description=__doc__)
    import torch  # --help should not

    from pipelines.storage import locate
    from pipelines.training.replay import read_bundle, replay

    if flags.scaling.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--scaling.device is cuda, and this machine has no GPU. Leave it out to compute on the CPU.")
    bundle = read_bundle(locate(flags.bundle))
    device = flags.scaling.device or (bundle.config.scaling.device if torch.cuda.is_available() else "cpu")
    precision = flags.precision or bundle.config.network_precision(device)
    print(replay(bundle, torch.device(device), precision))


if __name__ == "__main__":
    run(main)
