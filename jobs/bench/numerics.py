"""Train the demo for 80 steps and print the SHA-256 of its losses and of its final weights.

python jobs/bench/numerics.py

A refactoring must not change either. They depend on the PyTorch build and the CPU model: compare before and after on
the same machine.
"""

import hashlib
import json
import tempfile
from dataclasses import dataclass, replace

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from pipelines.config.recipes import DEMO

METRICS = ("gradient_norm", "loss/classification", "loss/dice", "loss/focal", "loss/total")


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """Train the demo and print the SHA-256 of its losses and of its final weights."""

    steps: int = 80
    """Optimizer steps to train."""
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


def main() -> None:
    flags = parse(Numerics, Numerics(), __doc__)
    with tempfile.TemporaryDirectory() as folder, quiet(flags.verbose):
        from pipelines.demo.run import draw_splits  # imports Ray, which --help should not
        from pipelines.storage import locate
        from pipelines.training import fit

        result = fit(
            replace(
                DEMO,
                data=replace(DEMO.data, **draw_splits(folder)),
                run=replace(DEMO.run, storage=folder, steps=flags.steps),
                tracking=replace(DEMO.tracking, uri=f"sqlite:///{folder}/mlflow.db", log_every=1),
            )
        )
        rows = [(name, step, value) for name in METRICS for step, value in sorted(result.mlflow_run.history(name))]
        weights = (locate(result.checkpoint) / "model.safetensors").read_bytes()
    print(f"{len(rows)} losses and gradient norms  {hashlib.sha256(json.dumps(rows).encode()).hexdigest()}")
    print(f"weights after step {result.step}          {hashlib.sha256(weights).hexdigest()}")


if __name__ == "__main__":
    run(main)
