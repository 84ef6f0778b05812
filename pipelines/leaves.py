"""A configuration by its leaves: dotted names and plain values, as flags, files and sweeps have them."""

import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import replace
from typing import Any, Literal

from pipelines.config import TrainConfig, without_none
from pipelines.errors import UserError

_FREE = (
    "scaling.", "checkpoint.", "evaluation.", "tracking.", "run.storage", "run.sample_log",
    "data.train", "data.val", "data.samples_per_task", "data.prefetch",
)  # fmt: skip
"""Leaves that may change when a run goes on: they move it or pace it, but do not change what it computes."""


_ABSENT = object()


def differing_leaves(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the leaves, among those that decide the result, in which two JSON-able configurations differ."""
    before, after = leaves(old), leaves(new)
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if not name.startswith(_FREE) and before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(leaves(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def leaf_types(kind: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf by its dotted name."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found.update(leaf_types(typing.cast(type, hint), f"{prefix}{name}."))
        else:
            found[prefix + name] = hint
    return found


def leaf_name(text: str) -> str:
    """Return a leaf's dotted name as it is in Python; hyphens are taken for underscores.

    Raises:
        UserError: there is no such leaf; the message names those that may be meant.
    """
    name, known = text.replace("-", "_"), list(leaf_types())
    if name in known:
        return name
    last = name.rpartition(".")[2]
    meant = [leaf for leaf in known if leaf.endswith(f".{last}") or leaf.startswith(f"{name}.")]
    meant = meant or difflib.get_close_matches(name, known, n=3)
    advice = f"Is it one of: {', '.join(meant[:8])}?" if meant else "--help of a training job lists all of them."
    raise UserError(f"The configuration has no leaf {text!r}. {advice}")


def with_leaves(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Replace leaves by their dotted names; the values may be as JSON has them.

    Raises:
        UserError: a leaf is unknown or given twice, or a value is of the wrong type or refused by the configuration.
    """
    hints = leaf_types()
    converted: dict[str, Any] = {}
    for given, value in values.items():
        name = leaf_name(given)
        if name in converted:
            raise UserError(f"The leaf {name} is given twice. Leave one out.")
        try:
            converted[name] = _converted(hints[name], value)
        except TypeError:
            raise UserError(f"{name} is {_in_words(hints[name])}, got {value!r}.") from None
    return _replaced(config, converted)


def _replaced(config: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Replace all leaves of one dataclass at once: it may refuse one without the other."""
    changes: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, _, rest = name.partition(".")
        if rest:
            inner.setdefault(part, {})[rest] = value
        else:
            changes[part] = value
    for part, of_part in inner.items():
        changes[part] = _replaced(getattr(config, part), of_part, f"{prefix}{part}.")
    try:
        return replace(config, **changes)
    except ValueError as error:
        refused = ", ".join(f"{prefix}{name} = {value!r}" for name, value in values.items())
        raise UserError(f"The configuration refuses {refused}: {error}") from error


def _converted(hint: Any, value: Any) -> Any:
    """Return `value` as one of the type `hint`.

    Raises:
        TypeError: it is none.
    """
    if isinstance(hint, types.UnionType):
        return None if value is None else _converted(without_none(hint), value)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            items = typing.get_args(hint)
            items = items[:1] * len(value) if items[-1] is Ellipsis else items
            if len(items) == len(value):
                return tuple(_converted(item, each) for item, each in zip(items, value, strict=True))
    elif hint is float:
        # The limit leaves out infinity and NaN, which JSON does not have but Python reads, and an int without a float.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def _in_words(hint: Any) -> str:
    if isinstance(hint, types.UnionType):
        return f"{_in_words(without_none(hint))}, or none"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return f"a list{'' if items[-1] is Ellipsis else f' of {len(items)}'}, each {_in_words(items[0])}"
    return {bool: "true or false", int: "a whole number", float: "a finite number", str: "a string"}[hint]
