"""The command line of the training jobs: a recipe whose every leaf is a flag, to be trained or described."""

import argparse
import json
import os
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs.cli import parse
from pipelines.config import TRAIN_DATA, TrainConfig
from pipelines.errors import UserError
from pipelines.leaves import leaves, with_leaves
from pipelines.recipes import COCO_TRAIN_IMAGES
from pipelines.storage import locate


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The flags that choose a training run: every leaf of its configuration, and a file of leaves."""

    training: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: str = ""
    """JSON file, path or s3:// URI, of leaves that take the place of the recipe's; flags override it. The best.json of
    a sweep, the config.json of a run (all but its name), or one of your own: {"optimizer": {"lr": 0.0002}}."""


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    describe: bool = False
    """Print what the configuration will do, in numbers, and do nothing."""


def train(description: str | None, *recipes: TrainConfig) -> int:
    """Train what the command line says, or describe it, and return the exit status.

    `--recipe` chooses among `recipes`, the first if it is not given; `--config` names a file that overrides leaves of
    it, and every other flag overrides a leaf of both.
    """
    flags = parse(_Flags, _Flags(training=chosen_recipe(recipes)), description)
    if flags.describe:
        from pipelines.describe import describe

        images, source, _ = training_images(flags.training)
        print(describe(flags.training, images, source))
        return 0
    from pipelines.training import fit  # imports Ray, which --help should not

    result = fit(flags.training)
    print(f"{result.status} at step {result.step}: {result.checkpoint}")
    print(f"MLflow run {result.mlflow_run_id} at {result.tracking_uri}")
    if result.status == "stopped":
        print(
            f"to go on: the same command with --run.name {result.name} --run.storage {result.folder.rpartition('/')[0]}"
        )
        return 130
    return 0


def chosen_recipe(recipes: tuple[TrainConfig, ...]) -> TrainConfig:
    """Return the recipe and the file that the command line names as one: the defaults of all other flags.

    Raises:
        UserError: the recipe is none of `recipes`, the file cannot be used, or they contradict each other.
    """
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--recipe")
    reader.add_argument("--config", default="")
    asked = reader.parse_known_args()[0]
    values = _leaves_of(asked.config) if asked.config else {}
    name = values.get("recipe", asked.recipe or recipes[0].recipe)
    if asked.recipe and asked.recipe != name:
        raise UserError(
            f"--recipe {asked.recipe} contradicts {asked.config}, which is for the recipe {name!r}. "
            f"Leave --recipe out, or the leaf `recipe` of the file."
        )
    recipe = next((recipe for recipe in recipes if recipe.recipe == name), None)
    if recipe is None:
        source = f", which {asked.config} is for" if "recipe" in values else ""
        raise UserError(
            f"There is no recipe {name!r} for this job{source}. "
            f"Use --recipe with one of: {', '.join(dict.fromkeys(recipe.recipe for recipe in recipes))}."
        )
    try:
        return with_leaves(recipe, values)
    except UserError as error:
        raise UserError(f"{asked.config} cannot be used by --config. {error}") from error


def _leaves_of(uri: str) -> dict[str, Any]:
    """Read a file of nested or dotted leaves, or the record of a run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    form = 'a JSON object of leaves, such as {"optimizer": {"lr": 0.0002}}'
    place = locate(uri)
    if place.is_dir() or not place.exists():
        raise UserError(f"There is no file {place}. Give --config {form}, or the config.json of a run.")
    content = place.read_bytes()
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{place} is not JSON: {error}. Give --config {form}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{place} holds a {type(values).__name__}. Give --config {form}.")
    record = values.get("config")
    if not isinstance(record, dict):
        return leaves(values)
    # A run's, beside what it was trained on. Another run wants another name.
    return {name: value for name, value in leaves(record).items() if name not in ("run.name", "tracking.parent")}


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
