"""Configurations to JSON and back, as runs and checkpoints store them."""

import dataclasses
import json
import typing
from typing import Any, TypeVar

from pipelines.config.fields import convert, describe_type
from pipelines.errors import UserError

VERSION = 3
"""Version of the settings in a run's config.json. 3: `precision` bfloat16 also applies to CPUs."""

Config = TypeVar("Config")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON-able nested dictionaries (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a configuration from `to_dict`'s result.

    Raises:
        UserError: it has a setting that this version does not have, or a value of the wrong type.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UserError(
            f"A saved {kind.__name__} has the settings {', '.join(unknown)}, which this version does not have. "
            f"Use the version of maskformer-ray that saved it."
        )
    return kind(**{name: _rebuilt(kind, name, hints[name], value) for name, value in values.items()})


def upgraded(values: dict[str, Any], version: int) -> dict[str, Any]:
    """Return a training configuration of version 2 or later, as `to_dict` gave it, in the settings of today."""
    if version == 2 and values.get("precision") == "bfloat16":
        return {**values, "precision": "auto"}
    return values


def _rebuilt(kind: type, name: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value)
    try:
        return convert(hint, value)
    except (TypeError, KeyError):
        expected = "nested settings" if dataclasses.is_dataclass(hint) else describe_type(hint)
        raise UserError(
            f"A saved {kind.__name__} has {name} = {value!r}, which should be {expected}. Use an undamaged copy of it."
        ) from None
