"""What a sweep varies: leaves of the configuration, each over choices or a range, and the combinations to try."""

import math
import random
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_origin

import numpy as np
from scipy.stats.qmc import LatinHypercube

from pipelines.config import TrainConfig, without_none
from pipelines.errors import UserError
from pipelines.leaves import leaf_name, leaf_types, with_leaves

_FORMS = (
    "Write --sweep.space LEAF=a,b,c for choices, LEAF=low..high for a range, or LEAF=low..high:log for a logarithmic "
    "one."
)
_SAME_RESULT = (
    "recipe", "run.name", "run.storage", "run.sample_log", "data.samples_per_task", "data.prefetch",
    "scaling.", "checkpoint.", "tracking.",
)  # fmt: skip
_INCOMPARABLE = ("data.train", "data.val", "evaluation.", "run.steps", "run.epochs")


@dataclass(frozen=True)
class Choices:
    """A leaf that takes one of several values."""

    leaf: str
    values: tuple[Any, ...]

    def at(self, share: float) -> Any:
        """Return the value at a share of the way, in [0, 1): each value has an equal part of it."""
        return self.values[int(share * len(self.values))]


@dataclass(frozen=True)
class Range:
    """A number between two bounds, both included; a leaf of whole numbers takes whole numbers."""

    leaf: str
    low: float
    high: float
    log: bool = False
    """Equal ratios are equally likely, instead of equal differences."""

    def at(self, share: float) -> float:
        """Return the value at a share of the way, in [0, 1)."""
        whole = isinstance(self.low, int)
        end = self.high + 1 if whole else self.high
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(end) - math.log(self.low)))
        else:
            value = self.low + share * (end - self.low)
        # Rounding may step over a bound.
        return min(max(math.floor(value) if whole else value, self.low), self.high)


Axis = Choices | Range


def parse(texts: Sequence[str], base: TrainConfig) -> tuple[Axis, ...]:
    """Read what to vary around `base`, one `LEAF=...` per leaf.

    Raises:
        UserError: nothing is varied, a text is malformed, or a leaf cannot be varied or not to such a value.
    """
    if not texts:
        raise UserError(f"The sweep varies nothing. {_FORMS}")
    axes: dict[str, Axis] = {}
    for text in texts:
        axis = _axis(text)
        if axis.leaf in axes:
            raise UserError(f"The sweep varies {axis.leaf} twice. Give it all its values at once.")
        for value in axis.values if isinstance(axis, Choices) else (axis.low, axis.high):
            try:
                with_leaves(base, {axis.leaf: value})
            except UserError as error:
                raise UserError(f"--sweep.space {text}: {error}") from error
        axes[axis.leaf] = axis
    return tuple(axes.values())


def combinations(axes: Sequence[Axis]) -> float:
    """Count the combinations there are; infinity if a range is among the axes."""
    return math.prod(len(axis.values) if isinstance(axis, Choices) else math.inf for axis in axes)


def sample(axes: Sequence[Axis], count: int, seed: int) -> list[dict[str, Any]]:
    """Choose at most `count` different combinations, always the same ones for a seed.

    Of choices alone: all combinations, or `count` drawn from them. With a range among them: a Latin hypercube, which
    cuts every range into `count` parts and takes one value of each. Whole numbers may then coincide, and each
    combination is kept once.
    """
    choices = [axis for axis in axes if isinstance(axis, Choices)]
    if len(choices) == len(axes):
        size = int(combinations(choices))
        numbers = range(size) if size <= count else random.Random(seed).sample(range(size), count)
        return [_combination(choices, number) for number in numbers]
    shares = LatinHypercube(len(axes), rng=np.random.default_rng(seed)).random(count).tolist()
    trials = [{axis.leaf: axis.at(share) for axis, share in zip(axes, point, strict=True)} for point in shares]
    return [trial for number, trial in enumerate(trials) if trial not in trials[:number]]


def _combination(axes: Sequence[Choices], number: int) -> dict[str, Any]:
    """Return the combination of that number: its digits, the last axis counting fastest."""
    chosen: dict[str, Any] = {}
    for axis in reversed(axes):
        number, digit = divmod(number, len(axis.values))
        chosen[axis.leaf] = axis.values[digit]
    return {axis.leaf: chosen[axis.leaf] for axis in axes}


def _axis(text: str) -> Axis:
    name, equals, values = text.partition("=")
    if not (name.strip() and equals and values.strip()):
        raise UserError(f"{text!r} does not say what to vary. {_FORMS}")
    leaf = leaf_name(name.strip())
    _require_variable(leaf)
    hint = leaf_types()[leaf]
    kind = without_none(hint) if isinstance(hint, types.UnionType) else hint
    if get_origin(kind) is tuple:
        raise UserError(f"{leaf} is a list, which a sweep cannot vary. Run one sweep for each list, set by its flag.")
    if kind in (int, float) and ".." in values:
        return _range(leaf, kind, values)
    choices: list[Any] = []
    for word in map(str.strip, values.split(",")):
        if not word:
            raise UserError(f"{text!r} has an empty choice. {_FORMS}")
        value = None if word == "none" and kind is not hint else _read(kind, word)
        if value in choices:
            raise UserError(f"The sweep names {leaf}={word} twice. Leave one out.")
        choices.append(value)
    if len(choices) == 1:
        flag = leaf.replace("_", "-")
        raise UserError(f"{text!r} has a single value. Set it for all trials by the flag --{flag}, or name several.")
    return Choices(leaf, tuple(choices))


def _range(leaf: str, kind: type, text: str) -> Range:
    bounds, colon, scale = map(str.strip, text.partition(":"))
    low, high = (_read(kind, bound.strip()) for bound in bounds.split("..", 1))
    if isinstance(low, str) or isinstance(high, str) or (colon and scale != "log"):
        numbers = "whole numbers" if kind is int else "numbers"
        raise UserError(f"'{leaf}={text}' is not a range of {numbers}. {_FORMS}")
    if not low < high:
        raise UserError(f"'{leaf}={text}' is an empty range: the lower bound comes first.")
    if scale and low <= 0:
        raise UserError(f"'{leaf}={text}' cannot be logarithmic: its bounds must be above 0. Leave out :log.")
    return Range(leaf, low, high, log=bool(scale))


def _read(kind: Any, word: str) -> Any:
    """Return a word as a leaf's value; one that is none stays a word, for the configuration to refuse."""
    if kind is bool:
        return {"true": True, "false": False}.get(word, word)
    if kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            return word
    return word


def _require_variable(leaf: str) -> None:
    if leaf.startswith(_SAME_RESULT):
        raise UserError(
            f"A sweep cannot vary {leaf}: that does not change what is computed. Set it for all trials by its flag."
        )
    if leaf.startswith(_INCOMPARABLE):
        raise UserError(
            f"A sweep cannot vary {leaf}: trials with different ones cannot be compared. Set it for all by its flag."
        )
