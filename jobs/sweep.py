"""Try combinations of settings, stop the worse trials early, and save the best configuration.

python jobs/sweep.py --recipe r50_mmdet --sweep.space optimizer.lr=3e-5..3e-4:log --sweep.space loss.dice_weight=1,2,5
    --sweep.trials 16 --run.steps 20000 --run.name lr-and-dice

Each trial is a training run of its own below <run.storage>/<run.name>, with a child run in MLflow. The same command
resumes a sweep that was stopped.
"""

import shlex
from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from jobs.shared.training import USAGE, TrainFlags, chosen_recipe, flags_for, with_recipes
from pipelines.config.recipes import RECIPES
from pipelines.config.sweep import SweepConfig

_SHOWN = (
    "recipe", "config", "sweep.space", "sweep.trials", "sweep.grace_period", "sweep.reduction_factor",
    "sweep.concurrency", "data.train", "data.val", "run.storage", "run.name", "run.steps", "tracking.uri",
    "evaluation.every", "scaling.device", "scaling.workers", "scaling.cpus_per_worker", "scaling.data_cpus", "weights",
    "model.num_classes", "verbose",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    # Without UseAppendAction the last --sweep.space would silently win.
    sweep: Annotated[SweepConfig, tyro.conf.UseAppendAction] = field(default_factory=SweepConfig)


def main() -> int:
    # A sweep is not a run: the demo's name is not for it.
    nameless = {name: replace(recipe, run=replace(recipe.run, name="")) for name, recipe in RECIPES.items()}
    flags = parse(
        _Flags,
        _Flags(training=chosen_recipe(nameless)),
        with_recipes(__doc__, nameless),
        shown=_SHOWN,
        usage=USAGE,
        required=("sweep.space", "data.train", "data.val", "run.storage"),
    )
    with quiet(flags.verbose):
        from pipelines.sweep import sweep  # imports Ray, which --help should not

        result = sweep(flags.training, flags.sweep)
    print(result.report)
    print_line(str(result.mlflow_run))
    if result.best is None:
        print_line(f"to resume: the same command with --run.name {shlex.quote(result.name)}")
        return 130
    again = flags_for(f"{result.folder}/best.json", flags.training)
    print_line(f"the best is {result.best.name}; to train with its settings: {again}")
    return 0


if __name__ == "__main__":
    run(main)
