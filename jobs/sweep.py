"""Try combinations of settings, give up the worse ones early, and write down the best as a configuration.

python jobs/sweep.py --recipe r50_mmdet --sweep.space optimizer.lr=3e-5..3e-4:log --sweep.space loss.dice_weight=1,2,5
    --sweep.trials 16 --run.steps 20000 --run.name lr-and-dice

Every leaf of the recipe is a flag, as for training; the space varies some of them. Each trial is a training run of its
own below <run.storage>/<run.name>, with a child run in MLflow. The same command goes on where it was stopped.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

import tyro

from jobs.cli import parse, run
from jobs.training import TrainFlags, chosen_recipe
from pipelines import recipes
from pipelines.config import SweepConfig, TrainConfig
from pipelines.recipes import R50_MMDET


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    # Each time it is given `--sweep.space` adds a leaf; otherwise the last would silently win.
    sweep: Annotated[SweepConfig, tyro.conf.UseAppendAction] = field(default_factory=SweepConfig)


def main() -> int:
    published = [R50_MMDET, *(value for value in vars(recipes).values() if isinstance(value, TrainConfig))]
    nameless = tuple(replace(recipe, run=replace(recipe.run, name="")) for recipe in published)  # a sweep is no run
    flags = parse(_Flags, _Flags(training=chosen_recipe(nameless)), __doc__)

    from pipelines.sweep import sweep  # imports Ray, which --help should not

    result = sweep(flags.training, flags.sweep)
    print(result.report)
    print(f"MLflow run {result.mlflow_run_id} at {result.tracking_uri}")
    if result.best is None:
        print(f"to go on: the same command with --run.name {result.name}")
        return 130
    print(f"the best is {result.best.name}; to train with its settings: --config {result.folder}/best.json")
    return 0


if __name__ == "__main__":
    run(main)
