"""The command line of the training jobs: a recipe whose every leaf is a flag, to be trained or described."""

import argparse
import os
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.cli import parse
from pipelines.config import TRAIN_DATA, TrainConfig
from pipelines.errors import UserError
from pipelines.recipes import COCO_TRAIN_IMAGES


@dataclass(frozen=True, kw_only=True)
class _Flags:
    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    describe: bool = False
    """Print what the configuration will do, in numbers, and do nothing."""


def train(description: str | None, *recipes: TrainConfig) -> int:
    """Train what the command line says, or describe it, and return the exit status.

    `--recipe` chooses among `recipes`, the first if it is not given; every other flag overrides a leaf of it.
    """
    flags = parse(_Flags, _Flags(config=chosen_recipe(recipes)), description)
    if flags.describe:
        from pipelines.describe import describe

        images, source, _ = training_images(flags.config)
        print(describe(flags.config, images, source))
        return 0
    from pipelines.training import fit  # imports Ray, which --help should not

    result = fit(flags.config)
    print(f"{result.status} at step {result.step}: {result.checkpoint}")
    print(f"MLflow run {result.mlflow_run_id} at {result.tracking_uri}")
    if result.status == "stopped":
        print(
            f"to go on: the same command with --run.name {result.name} --run.storage {result.folder.rpartition('/')[0]}"
        )
        return 130
    return 0


def chosen_recipe(recipes: tuple[TrainConfig, ...]) -> TrainConfig:
    """Return the recipe that the command line names: its leaves are the defaults of all other flags."""
    by_name = {recipe.recipe: recipe for recipe in recipes}
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--recipe", default=recipes[0].recipe)
    name = reader.parse_known_args()[0].recipe
    if name not in by_name:
        raise UserError(f"There is no recipe {name!r} for this job. Use --recipe with one of: {', '.join(by_name)}.")
    return by_name[name]


def training_images(config: TrainConfig) -> tuple[int, str, bool]:
    """Count the images to train on: return their number, where they come from, and whether a pack was counted."""
    from pipelines.data.manifest import open_pack

    uri = config.data.train or os.environ.get(TRAIN_DATA, "")
    if not uri:
        source = f"of COCO train2017, none left out: --data.train or ${TRAIN_DATA} counts those of a pack"
        return COCO_TRAIN_IMAGES, source, False
    samples = open_pack(uri, config.data.require_thing)
    left_out = f", {samples.num_left_out:,} more left out without a thing" if config.data.require_thing else ""
    return len(samples), f"of {samples.uri}{left_out}", True
