"""Load a file of any known format into a native state dict, with a report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskformer.config import ModelConfig
from maskformer.model import build_model
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped
from maskformer.weights.architecture import recognize
from maskformer.weights.classes import HEAD, move_classes
from maskformer.weights.description import model_fields
from maskformer.weights.names import Renamed
from maskformer.weights.reading import Source, Weights, read

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class LoadReport:
    """What was done with the tensors of a file."""

    source: str
    """The file, for messages."""
    format: str
    """Name of the detected layout, such as `mmdet 3.x`."""
    missing: tuple[str, ...]
    """Tensors of the model that the file does not have."""
    unused: tuple[str, ...]
    """Tensors of the file that the model does not have, such as a classifier or constants."""
    reshaped: tuple[str, ...]
    """Tensors of the model whose values were stacked, permuted, or moved to other classes."""
    cast: tuple[str, ...]
    """Tensors of the model that have another data type in the file."""
    classes_found: tuple[str, ...] = ()
    """If classes were moved: classes of the data set that the file has."""
    classes_new: tuple[str, ...] = ()
    """If classes were moved: classes that the file does not have, which are initialized randomly."""

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.format}"]
        lines += [
            f"  {what}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in (
                ("missing", self.missing),
                ("unused", self.unused),
                ("reshaped", self.reshaped),
                ("cast to another data type", self.cast),
                ("classes found by name", self.classes_found),
                ("classes initialized randomly", self.classes_new),
            )
            if names
        ]
        return "\n".join(map(escaped, lines))

    def require_complete(self) -> None:
        """Check that no tensor is missing, as evaluation and conversion require.

        Raises:
            ValueError: a tensor of the model is missing.
        """
        if self.missing:
            raise ValueError(
                f"{self.source} is not a complete model: it lacks {len(self.missing)} tensors, first "
                f"{self.missing[0]}. Give a checkpoint of the complete MaskFormer."
            )


def load(source: Source, config: ModelConfig, taxonomy: Taxonomy | None = None) -> tuple[dict[str, Tensor], LoadReport]:
    """Read weights of any known format for a model of `config`.

    Args:
        source: a checkpoint of mmdetection (2.x, 3.x), detectron2 or Hugging Face, a native one, or a backbone of
            torchvision, Swin, timm or detectron2; as a path, an open file, a state dict, or the result of `read`.
        taxonomy: the classes of the data set. If those of the file differ, its class head is fitted by class name.

    Returns:
        the state dict, in float32, and a report. A backbone alone gives names under `backbone.` only.

    Raises:
        ValueError: the file cannot be read, holds another network, other classes or tensors that are not weights, or
            contains NaN or infinity.
    """
    if taxonomy is not None and taxonomy.num_classes != config.num_classes:
        raise ValueError(
            f"The model has {config.num_classes} classes, the taxonomy {taxonomy.num_classes}. Set model.num_classes "
            f"to {taxonomy.num_classes}."
        )
    weights = read(source)
    layout = recognize(weights)
    renamed = layout.to_native(weights.tensors, weights.source)
    expected = _expected(config)
    heads = model_fields(weights).get("num_heads", config.num_heads)
    if heads != config.num_heads:
        raise ValueError(
            f"{weights.source} has {heads} attention heads, the configuration {config.num_heads}, which gives "
            f"different results with the same tensors. Set model.num_heads to {heads}."
        )
    _check_names(weights, renamed, expected, config)
    _check_kinds(weights, renamed, expected)
    moved = None
    if taxonomy is not None and all(name in renamed.tensors for name in HEAD):
        moved = move_classes(weights, renamed.tensors, taxonomy)
        if moved is not None:
            renamed = replace(renamed, tensors={**renamed.tensors, **moved.head})
    state, cast = _checked(weights, renamed, expected)
    for name in expected:
        # Frozen batch norms do not use their counter, and detectron2's have none.
        if name.endswith("num_batches_tracked") and name.replace("num_batches_tracked", "running_var") in state:
            state.setdefault(name, torch.tensor(0))
    reshaped = {*renamed.changed, *(moved.head if moved else ())}
    report = LoadReport(
        weights.source,
        layout.name,
        missing=tuple(name for name in expected if name not in state),
        unused=(*renamed.leftovers, *renamed.unknown),
        reshaped=tuple(name for name in expected if name in reshaped),
        cast=tuple(name for name in expected if name in cast),
        classes_found=moved.found if moved else (),
        classes_new=moved.new if moved else (),
    )
    return {name: state[name] for name in expected if name in state}, report


def check_fit(source: str, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Check that native tensors are those of a model of `config`, before it is built.

    Args:
        source: the file, for the message.

    Raises:
        ValueError: a tensor is missing, or not of the model, or has another shape.
    """
    expected = _expected(config)
    for name in (*expected, *tensors):
        found = tuple(tensors[name].shape) if name in tensors else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "not in the model"
        if found != wanted:
            raise ValueError(
                f"{source} does not fit its own configuration: the tensor {escaped(name, 300)} is {found}, where the "
                f"configuration gives {wanted}. Give an undamaged copy of it."
            )


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    """Return the tensors of a model without values."""
    with torch.device("meta"), _Uninitialized():
        return build_model(config).state_dict()


class _Uninitialized(TorchFunctionMode):
    """Skips torch.nn.init: to draw normal numbers for the meta device, torch imports its compiler, in seconds."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func is Tensor.normal_:
            return given.get("tensor", args[0] if args else None)
        return func(*args, **given)


def in_classifier(name: str) -> bool:
    """Return whether an ImageNet classifier with this backbone has the tensor; it lacks Swin's output norms."""
    return name.startswith("backbone.") and not name.startswith("backbone.norms.")


def _check_names(weights: Weights, renamed: Renamed, expected: Mapping[str, Tensor], config: ModelConfig) -> None:
    foreign = [name for name in renamed.tensors if name not in expected]
    if foreign:
        raise ValueError(
            f"{weights.source} holds another network than the configuration describes (backbone {config.backbone}, "
            f"encoder_layers {config.encoder_layers}, decoder_layers {config.decoder_layers}): {len(foreign)} of its "
            f"tensors are not in the model, first {renamed.foreign[foreign[0]]}. Set the configuration to the file's; "
            f"maskformer.weights.detect_config returns it."
        )
    backbone_only = all(name.startswith("backbone.") for name in renamed.tensors)
    missing = [
        name
        for name in expected
        if name not in renamed.tensors
        and not name.endswith("num_batches_tracked")
        and (in_classifier(name) or not backbone_only)
    ]
    if missing and renamed.unknown:
        raise ValueError(
            f"{weights.source} is of another architecture: it lacks {len(missing)} tensors of the model, first "
            f"{missing[0]}, and {len(renamed.unknown)} of its tensors are unknown, first {renamed.unknown[0]}. Give "
            f"the checkpoint of a MaskFormer."
        )


def _check_kinds(weights: Weights, renamed: Renamed, expected: Mapping[str, Tensor]) -> None:
    for name, tensor in renamed.tensors.items():
        known = _FLOATS if expected[name].is_floating_point() else _INTEGERS
        if tensor.dtype not in known or tensor.is_meta:
            raise ValueError(
                f"{weights.source} is not used: its tensor {renamed.foreign[name]} is of {tensor.dtype}"
                f"{' without values (on the meta device)' if tensor.is_meta else ''}, where {name} must be one of "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in known)}. Save it as one of them."
            )


def _checked(
    weights: Weights, renamed: Renamed, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Sequence[str]]:
    """Return the tensors in the model's data types, and which of them were cast."""
    state: dict[str, Tensor] = {}
    cast: list[str] = []
    for name, tensor in renamed.tensors.items():
        shape, foreign = tuple(expected[name].shape), renamed.foreign[name]
        if tuple(tensor.shape) != shape:
            advice = "Set the configuration to the file's; maskformer.weights.detect_config returns it."
            if name in HEAD:
                advice = (
                    "The file has other classes than the model: give the taxonomy of the data set to fit them by "
                    "class name, or set model.num_classes to the file's."
                )
            raise ValueError(
                f"{weights.source} does not fit the model: its tensor {foreign} has the shape {tuple(tensor.shape)} "
                f"where {name} has {shape}. {advice}"
            )
        if tensor.dtype != expected[name].dtype:
            tensor = tensor.to(expected[name].dtype)
            cast.append(name)
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{weights.source} is not used: its tensor {foreign} holds NaN or infinity in float32, so the training "
                f"that wrote it probably diverged. Give an earlier checkpoint."
            )
        state[name] = tensor
    return state, cast
