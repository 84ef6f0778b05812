"""Configurations as command lines."""

import dataclasses
from typing import Any

from pipelines.config.train import TrainConfig


def flag(name: str, value: Any) -> list[str]:
    """Return the arguments that set one leaf."""
    dashed = name.replace("_", "-")
    if isinstance(value, bool):
        part, _, last = dashed.rpartition(".")
        return [f"--{dashed}" if value else f"--{part}.no-{last}"]
    return [f"--{dashed}", *map(str, value if isinstance(value, tuple) else (value,))]


def flags(config: TrainConfig, recipe: TrainConfig) -> list[str]:
    """Return the arguments that turn `recipe` into `config`; it keeps the recipe's name."""
    return _flags(dataclasses.replace(config, recipe=recipe.recipe), recipe, "")


def _flags(config: Any, recipe: Any, prefix: str) -> list[str]:
    arguments: list[str] = []
    for field in dataclasses.fields(config):
        new, old = getattr(config, field.name), getattr(recipe, field.name)
        if dataclasses.is_dataclass(new):
            arguments += _flags(new, old, f"{prefix}{field.name}.")
        elif new != old:
            arguments += flag(prefix + field.name, new)
    return arguments
