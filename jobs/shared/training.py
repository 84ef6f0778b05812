"""Command line of the training jobs: a recipe, each of whose settings is a flag."""

import argparse
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from jobs.shared.cli import asks_for_help, is_given, parse
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json
from pipelines.config.fields import ESSENTIAL, facts
from pipelines.config.overrides import flatten, with_overrides
from pipelines.config.recipes import COCO_TRAIN_IMAGES
from pipelines.config.serialize import VERSION, to_dict, upgraded
from pipelines.config.train import TrainConfig
from pipelines.credentials import refuse_credentials
from pipelines.errors import StorageUnavailableError, UserError

logger = logging.getLogger(__name__)

SHOWN = ("recipe", "config", *ESSENTIAL)
"""The settings that `--help` of a training job shows, and those of other jobs that take a recipe."""
_ADDRESSES = ("tracking.uri", "run.storage", "data.train", "data.val", "weights")
"""The settings that say what is contacted, read or written."""
USAGE = "[--recipe NAME] [--config FILE] [--SETTING VALUE ...]"


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """The flags that choose a training run: every setting of its configuration, and a file of settings."""

    training: Annotated[TrainConfig, tyro.conf.arg(name="")]
    config: str = ""
    """JSON file (path or s3:// URI) of settings that override the recipe's; flags override both. A sweep's best.json,
    a run's config.json (without its run.name), or your own: {"optimizer": {"lr": 0.0002}}. An address on the network
    in it is used only if a flag or the environment gives the same."""
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    describe: bool = False
    """Print what the configuration will do, in numbers, and exit."""


def train(description: str | None, *recipes: TrainConfig) -> int:
    """Train what the command line says, or describe it, and return the exit status.

    `--recipe` chooses among `recipes`, the first by default; `--config` names a file that overrides settings of it,
    and every other flag overrides a setting of both.
    """
    named = {recipe.recipe: recipe for recipe in recipes}
    flags = parse(
        _Flags,
        _Flags(training=chosen_recipe(named)),
        with_recipes(description, named),
        shown=(*SHOWN, "describe", "verbose"),
        usage=USAGE,
        required=("data.train", "run.storage"),
    )
    if flags.describe:
        from pipelines.planning.describe import describe  # imports torch, which --help should not

        images, source, _ = training_images(flags.training)
        print(describe(flags.training, images, source))
        return 0
    with quiet(flags.verbose):
        from pipelines.training import fit  # imports Ray, which --help should not

        result = fit(flags.training)
    print_line(f"{result.status} at step {result.step}: {result.checkpoint}")
    print_line(str(result.mlflow_run))
    if result.status == "stopped":
        storage = result.folder.rpartition("/")[0]
        again = f"--run.name {shlex.quote(result.name)} --run.storage {shlex.quote(storage)}"
        print_line(f"to resume: the same command with {again}")
        return 130
    return 0


def with_recipes(description: str | None, recipes: Mapping[str, TrainConfig]) -> str:
    """Return a job's description with the recipes it offers, the default first."""
    return f"{(description or '').rstrip()}\n\nRecipes: {', '.join(recipes)}. The first is the default."


def chosen_recipe(recipes: Mapping[str, TrainConfig]) -> TrainConfig:
    """Return the recipe and the file that the command line names as one: the defaults of all other flags.

    Raises:
        UserError: the recipe is none of `recipes`, the file cannot be used, or they contradict each other.
    """
    try:
        return _chosen_recipe(recipes)
    except (UserError, StorageUnavailableError):
        if asks_for_help():  # which must always answer
            return next(iter(recipes.values()))
        raise


def _chosen_recipe(recipes: Mapping[str, TrainConfig]) -> TrainConfig:
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--recipe")
    reader.add_argument("--config", default="")
    asked = reader.parse_known_args()[0]
    values = _settings_of(asked.config) if asked.config else {}
    name = values.get("recipe", asked.recipe or next(iter(recipes)))
    if asked.recipe and asked.recipe != name:
        raise UserError(
            f"--recipe {asked.recipe} contradicts {asked.config}, which is for the recipe {name!r}. "
            f"Leave --recipe out, or remove the setting `recipe` from the file."
        )
    if not isinstance(name, str) or name not in recipes:
        source = f", which {asked.config} is for" if "recipe" in values else ""
        raise UserError(
            f"There is no recipe {name!r} for this job{source}. Use --recipe with one of: {', '.join(recipes)}."
        )
    try:
        config = with_overrides(recipes[name], values)
    except UserError as error:
        raise UserError(f"{asked.config} cannot be used by --config. {error}") from error
    _require_asked_for(config, recipes[name], asked.config)
    return config


def _require_asked_for(config: TrainConfig, recipe: TrainConfig, file: str) -> None:
    """Refuse addresses on the network that only the file names, and say which other ones it names.

    A file may come from a stranger. MLflow's server gets user name and password, a bucket gets the checkpoints.

    Args:
        config: the recipe with the settings of the file.

    Raises:
        UserError: the file names an address that neither a flag nor the environment gives.
    """
    named, before = flatten(to_dict(config)), flatten(to_dict(recipe))
    of_file = [name for name in _ADDRESSES if named[name] != before[name] and not is_given(name)]
    for name in of_file:
        refuse_credentials(named[name], f"{file} cannot be used by --config: its {name}")
    unasked = [name for name in of_file if _is_on_network(named[name]) and named[name] != _in_environment(name)]
    if unasked:
        flags = " ".join(f"--{name} {shlex.quote(named[name])}" for name in unasked)
        raise UserError(
            f"{file} names addresses on the network, which are not used unasked. To use them, add: {escaped(flags)}"
        )
    if of_file and not asks_for_help():
        logger.info("From %s: %s.", file, ", ".join(f"{name} {escaped(named[name])}" for name in of_file))


def flags_for(file: str, config: TrainConfig) -> str:
    """Return the flags to use a file of settings that has the addresses of `config`, quoted for a shell."""
    values = flatten(to_dict(config))
    addresses = {f"--{name}": values[name] for name in _ADDRESSES if _is_on_network(values[name])}
    return " ".join(f"{flag} {shlex.quote(value)}" for flag, value in {"--config": file, **addresses}.items())


def _is_on_network(address: str) -> bool:
    return "://" in address and not address.lower().startswith(("file:", "sqlite:"))


def _in_environment(name: str) -> str:
    return os.environ.get(facts(name).variable, "").rstrip("/")


def _settings_of(uri: str) -> dict[str, Any]:
    """Read a file of nested or dotted settings, or the record of a run.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    from pipelines.storage import locate  # imports pyarrow, which --help should not

    form = 'a JSON object of settings, such as {"optimizer": {"lr": 0.0002}}'
    file = locate(uri)
    if file.is_dir() or not file.exists():
        raise UserError(f"There is no file {file}. Give --config {form}, or the config.json of a run.")
    content = file.read_bytes(MAX_JSON_BYTES)
    try:
        values = parse_json(content)
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}. Give --config {form}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} holds a {type(values).__name__}. Give --config {form}.")
    record = values.get("config")
    if not isinstance(record, dict):
        return flatten(values)
    version = values.get("version", 1) if "data_hash" in values else VERSION
    if version not in (2, VERSION):
        raise UserError(
            f"{file} was written by another version of maskformer-ray (version {version}, this "
            f"program reads {VERSION}), whose settings have other names. Give --config {form}."
        )
    # A run's record. Another run needs another name.
    return {
        name: value
        for name, value in flatten(upgraded(record, version)).items()
        if name not in ("run.name", "tracking.parent")
    }


def training_images(config: TrainConfig) -> tuple[int, str, Literal["measured", "given", "published"]]:
    """Return the number of images to train on, where they come from, and what the number rests on."""
    from pipelines.config.resolve import or_environment
    from pipelines.data.manifest import open_pack

    if config.recipe == "demo" and not config.data.train:
        from pipelines.demo.run import SPLITS

        return SPLITS["train"], "that the demo draws", "given"
    uri = or_environment("data.train", config.data.train)
    if not uri:
        variable = facts("data.train").variable
        source = f"of COCO train2017, none left out: --data.train or ${variable} counts those of a pack"
        return COCO_TRAIN_IMAGES, source, "published"
    samples = open_pack(uri)
    kept = samples.with_things() if config.data.require_thing else samples
    left_out = f", {kept.num_left_out:,} more left out without a thing" if config.data.require_thing else ""
    return len(kept), f"of {escaped(samples.uri)}{left_out}", "measured"
