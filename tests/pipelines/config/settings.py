"""Settings of a configuration by dotted name, read and replaced without the code under test."""

import types
import typing
from dataclasses import fields, is_dataclass, replace
from typing import Any


def field_types_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every setting by its dotted name."""
    types_of = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= field_types_of(value, f"{name}.") if is_dataclass(value) else {name: types_of[field.name]}
    return found


def setting(config: Any, name: str) -> Any:
    """Return the value of a setting."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_setting(config: Any, name: str, value: Any) -> Any:
    """Return a copy of `config` with one setting replaced."""
    part, _, rest = name.partition(".")
    return replace(config, **{part: with_setting(getattr(config, part), rest, value) if rest else value})


def another(hint: Any, value: Any) -> Any:
    """Return a valid value of this type that is not `value`."""
    if isinstance(hint, types.UnionType):  # X | None
        return another(hint.__args__[0], value) if value is not None else 3
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        # The same length and order as before; halved, so that probabilities and betas stay below 1.
        return tuple(item(v / 2) for v in value)
    if hint is bool:
        return not value
    if hint is str:
        return f"{value}x"
    if hint is float:
        return value / 2 if value else 0.25
    return 2 * value if value else 3
