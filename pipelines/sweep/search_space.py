"""Search space of a sweep: settings with their choices or range, and the combinations to try."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_origin

import numpy as np
from scipy.stats.qmc import LatinHypercube

from pipelines.config.fields import facts, field_types, without_none
from pipelines.config.overrides import field_name, with_overrides
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError

_FORMS = (
    "Use --sweep.space SETTING=a,b,c for choices, SETTING=low..high for a range, or SETTING=low..high:log for a "
    "logarithmic range."
)


@dataclass(frozen=True)
class Choices:
    """A setting that takes one of several values."""

    setting: str
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at the quantile `share` in [0, 1); all values are equally likely."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True)
class Range:
    """A number between two bounds, both included. If the bounds are integers, so are the values."""

    setting: str
    low: float
    high: float
    log: bool = False
    """Uniform in the logarithm instead of in the value."""

    def at(self, share: float) -> float:
        """Return the value at the quantile `share` in [0, 1)."""
        integer = isinstance(self.low, int)
        end = self.high + 1 if integer else self.high
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(end) - math.log(self.low)))
        else:
            value = self.low + share * (end - self.low)
        # Rounding may exceed a bound.
        return min(max(math.floor(value) if integer else value, self.low), self.high)


Axis = Choices | Range


def parse(texts: Sequence[str], base: TrainConfig) -> tuple[Axis, ...]:
    """Parse the search space around `base`, given as one `SETTING=VALUES` per setting.

    Raises:
        UserError: nothing is varied, a text is malformed, a setting cannot be varied, or a value is invalid for it.
    """
    if not texts:
        raise UserError(f"The sweep varies nothing. {_FORMS}")
    axes: dict[str, Axis] = {}
    for text in texts:
        axis = _axis(text)
        if axis.setting in axes:
            raise UserError(f"--sweep.space has {axis.setting} twice. Give all its values at once.")
        for value in axis.values if isinstance(axis, Choices) else (axis.low, axis.high):
            try:
                with_overrides(base, {axis.setting: value})
            except UserError as error:
                raise UserError(f"--sweep.space {text}: {error}") from error
        axes[axis.setting] = axis
    return tuple(axes.values())


def combinations(axes: Sequence[Axis]) -> float:
    """Return the number of combinations; infinity if an axis is a range."""
    return math.prod(len(axis.values) if isinstance(axis, Choices) else math.inf for axis in axes)


def sample(axes: Sequence[Axis], count: int, seed: int) -> list[dict[str, Any]]:
    """Choose at most `count` different combinations, determined by `seed`.

    With choices only: all combinations, or `count` random ones if there are more. With a range: a Latin hypercube,
    which divides every range into `count` parts and takes one value from each. Integers may then coincide; duplicate
    combinations are dropped.
    """
    choices = [axis for axis in axes if isinstance(axis, Choices)]
    if len(choices) == len(axes):
        size = int(combinations(choices))
        numbers = range(size) if size <= count else random.Random(seed).sample(range(size), count)
        return [_combination(choices, number) for number in numbers]
    shares = LatinHypercube(len(axes), rng=np.random.default_rng(seed)).random(count).tolist()
    trials = [{axis.setting: axis.at(share) for axis, share in zip(axes, point, strict=True)} for point in shares]
    return [trial for number, trial in enumerate(trials) if trial not in trials[:number]]


def _combination(axes: Sequence[Choices], number: int) -> dict[str, Any]:
    """Return the combination with this number; the last axis varies fastest."""
    chosen: dict[str, Any] = {}
    for axis in reversed(axes):
        number, digit = divmod(number, len(axis.values))
        chosen[axis.setting] = axis.values[digit]
    return {axis.setting: chosen[axis.setting] for axis in axes}


def _axis(text: str) -> Axis:
    name, equals, values = text.partition("=")
    if not (name.strip() and equals and values.strip()):
        raise UserError(f"{text!r} is not of the form SETTING=VALUES. {_FORMS}")
    setting = field_name(name.strip())
    _require_variable(setting)
    hint = field_types()[setting]
    kind = without_none(hint)
    if get_origin(kind) is tuple:
        raise UserError(
            f"{setting} is a list, which a sweep cannot vary. Run one sweep for each list, set by its flag."
        )
    if kind in (int, float) and ".." in values:
        return _range(setting, kind, values)
    choices: list[Any] = []
    for word in map(str.strip, values.split(",")):
        if not word:
            raise UserError(f"{text!r} has an empty choice. {_FORMS}")
        value = None if word == "none" and kind is not hint else _read(kind, word)
        if value in choices:
            raise UserError(f"--sweep.space has {setting}={word} twice. Leave one out.")
        choices.append(value)
    if len(choices) == 1:
        flag = setting.replace("_", "-")
        raise UserError(
            f"{text!r} has a single value. Give several values, or set it for all trials by the flag --{flag}."
        )
    return Choices(setting, tuple(choices))


def _range(setting: str, kind: type, text: str) -> Range:
    bounds, colon, scale = map(str.strip, text.partition(":"))
    low, high = (_read(kind, bound.strip()) for bound in bounds.split("..", 1))
    if isinstance(low, str) or isinstance(high, str) or (colon and scale != "log"):
        numbers = "integers" if kind is int else "numbers"
        raise UserError(f"'{setting}={text}' is not a range of {numbers}. {_FORMS}")
    if not low < high:
        raise UserError(f"'{setting}={text}' is an empty range. Put the lower bound first.")
    if scale and low <= 0:
        raise UserError(f"'{setting}={text}' cannot be logarithmic: its bounds must be positive. Leave out :log.")
    return Range(setting, low, high, log=bool(scale))


def _read(kind: Any, word: str) -> Any:
    """Parse a word as a value of type `kind`. An invalid word is returned as it is; the configuration refuses it."""
    if kind is bool:
        return {"true": True, "false": False}.get(word, word)
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            return word
    return word


def _require_variable(name: str) -> None:
    match facts(name).in_sweep:
        case "no effect":
            raise UserError(
                f"A sweep cannot vary {name}: it does not affect the result. Set it for all trials by its flag."
            )
        case "not comparable":
            raise UserError(
                f"A sweep cannot vary {name}: trials that differ in it cannot be compared. Set it for all trials by "
                f"its flag."
            )
        case "varies":
            pass
