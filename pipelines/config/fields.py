"""The fields of TrainConfig by dotted name: their types, and the table of facts about them.

Messages and help texts call a field a setting: `optimizer.lr`, on the command line `--optimizer.lr`.
"""

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What commands and checks need to know about a field beyond its type."""

    resumable: bool = False
    """Whether it may change when a run resumes: it affects where and how fast a run computes, not the result."""
    in_sweep: Literal["varies", "no effect", "not comparable"] = "varies"
    """Whether the trials of a sweep may differ in it, or why they may not."""
    variable: str = ""
    """Environment variable that is used if the field is empty."""


FACTS = {
    "recipe": Facts(in_sweep="no effect"),
    "model.checkpoint_activations": Facts(resumable=True, in_sweep="no effect"),
    "run.name": Facts(in_sweep="no effect"),
    "run.storage": Facts(resumable=True, in_sweep="no effect", variable="MASKFORMER_STORAGE"),
    "run.sample_log": Facts(resumable=True, in_sweep="no effect"),
    "run.non_finite": Facts(resumable=True, in_sweep="no effect"),
    "run.patience": Facts(resumable=True, in_sweep="not comparable"),
    "run.steps": Facts(in_sweep="not comparable"),
    "run.epochs": Facts(in_sweep="not comparable"),
    "data.train": Facts(resumable=True, in_sweep="not comparable", variable="MASKFORMER_TRAIN_DATA"),
    "data.val": Facts(resumable=True, in_sweep="not comparable", variable="MASKFORMER_VAL_DATA"),
    "data.samples_per_task": Facts(resumable=True, in_sweep="no effect"),
    "data.object_store_gb": Facts(resumable=True, in_sweep="no effect"),
    "data.prefetch": Facts(resumable=True, in_sweep="no effect"),
    "data.damaged": Facts(resumable=True, in_sweep="no effect"),
    "scaling": Facts(resumable=True, in_sweep="no effect"),
    "checkpoint": Facts(resumable=True, in_sweep="no effect"),
    "evaluation": Facts(resumable=True, in_sweep="not comparable"),
    "tracking.uri": Facts(resumable=True, in_sweep="no effect", variable="MLFLOW_TRACKING_URI"),
    "tracking": Facts(resumable=True, in_sweep="no effect"),
}
"""Facts by field, or by part of the configuration for those of its fields that are not listed. Fields that are in
neither affect the result: they may not change on resume, and a sweep may vary them."""

ESSENTIAL = (
    "data.train", "data.val",
    "run.storage", "run.name", "run.epochs", "run.steps", "run.global_batch", "run.seed",
    "tracking.uri", "checkpoint.every", "evaluation.every",
    "scaling.device", "scaling.workers", "scaling.cpus_per_worker", "scaling.data_cpus",
    "weights", "precision", "model.num_classes", "optimizer.lr",
    "loss.classification_weight", "loss.focal_weight", "loss.dice_weight",
)  # fmt: skip
"""Settings that `--help` shows, in this order: those that a user must set or usually sets."""


def facts(name: str) -> Facts:
    """Return the facts about a field."""
    return FACTS.get(name) or FACTS.get(name.partition(".")[0]) or Facts()


def field_types(kind: type = TrainConfig, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field by its dotted name, including those of nested dataclasses."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found.update(field_types(typing.cast(type, hint), f"{prefix}{name}."))
        else:
            found[prefix + name] = hint
    return found


def without_none(hint: Any) -> Any:
    """Return X for the type `X | None`, any other type unchanged."""
    if isinstance(hint, types.UnionType) and type(None) in hint.__args__:
        return next(inner for inner in hint.__args__ if inner is not type(None))
    return hint


def convert(hint: Any, value: Any) -> Any:
    """Convert `value`, as Python or JSON represents it, to the type `hint`.

    Raises:
        TypeError: `value` is not of that type.
    """
    if isinstance(hint, types.UnionType):
        if type(value) in hint.__args__:
            return value
        return convert(hint.__args__[0], value)
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
    elif typing.get_origin(hint) is tuple:
        if isinstance(value, (list, tuple)):
            items = typing.get_args(hint)
            items = items[:1] * len(value) if items[-1] is Ellipsis else items
            if len(items) == len(value):
                return tuple(convert(item, each) for item, each in zip(items, value, strict=True))
    elif hint is float:
        # The limit excludes infinity and NaN, which are not JSON but which Python reads, and ints beyond a float.
        if type(value) in (int, float) and abs(value) <= sys.float_info.max:
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def describe_type(hint: Any) -> str:
    """Describe a type in words, such as `an integer`."""
    if isinstance(hint, types.UnionType):
        return ", or ".join("none" if kind is type(None) else describe_type(kind) for kind in hint.__args__)
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        return f"a list{'' if items[-1] is Ellipsis else f' of {len(items)}'}, each {describe_type(items[0])}"
    return {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}[hint]
