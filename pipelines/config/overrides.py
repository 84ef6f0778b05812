"""Overrides: values by dotted field name, from files and sweeps, and how they are applied and compared."""

import difflib
from dataclasses import replace
from typing import Any

from pipelines.config.fields import convert, describe_type, facts, field_types
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError

_ABSENT = object()


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted names."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """List the settings in which two JSON-able configurations differ, except those that may change on resume."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
        for name in sorted(before.keys() | after.keys())
        if not facts(name).resumable and before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def field_name(text: str) -> str:
    """Return a field's dotted name in Python; hyphens are read as underscores.

    Raises:
        UserError: there is no such setting; the message names similar ones.
    """
    name, known = text.replace("-", "_"), list(field_types())
    if name in known:
        return name
    last = name.rpartition(".")[2]
    similar = [field for field in known if field.endswith(f".{last}") or field.startswith(f"{name}.")]
    similar = similar or difflib.get_close_matches(name, known, n=3)
    advice = f"Did you mean: {', '.join(similar[:8])}?" if similar else "--help-all of a training job lists them."
    raise UserError(f"There is no setting {text!r}. {advice}")


def with_overrides(config: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Replace fields by dotted name; values may be as JSON represents them, such as a list for a tuple.

    Raises:
        UserError: a setting is unknown or given twice, or a value has the wrong type or is invalid.
    """
    hints = field_types()
    converted: dict[str, Any] = {}
    for given, value in values.items():
        name = field_name(given)
        if name in converted:
            raise UserError(f"The setting {name} is given twice. Remove one.")
        try:
            converted[name] = convert(hints[name], value)
        except TypeError:
            raise UserError(f"{name} must be {describe_type(hints[name])}, got {value!r}.") from None
    return _replaced(config, converted)


def _replaced(config: Any, values: dict[str, Any], prefix: str = "") -> Any:
    """Replace all given fields of a dataclass at once: it may accept them only together."""
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
        given = ", ".join(f"{prefix}{name} = {value!r}" for name, value in values.items())
        raise UserError(f"Invalid configuration with {given}: {error}") from error
