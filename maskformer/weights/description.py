"""What a file says about the model beside its tensors: the names of its classes and its configuration."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from maskformer.config import ModelConfig
from maskformer.taxonomy import COCO, Taxonomy
from maskformer.weights.reading import Weights


def describe(config: ModelConfig, taxonomy: Taxonomy | None) -> dict[str, Any]:
    """Return what our own files say; the `config.json` of a training's checkpoint says it in the same places."""
    return {
        "config": {"model": dataclasses.asdict(config)},
        "categories": None if taxonomy is None else taxonomy.to_coco(),
    }


def class_names(weights: Weights) -> tuple[str, ...] | None:
    """Return the names of the classes by class index; None if the file has none."""
    about = weights.about
    meta = _mapping(about.get("meta"))
    dataset = _mapping(meta.get("dataset_meta"))
    labels = _mapping(about.get("id2label"))
    if about.get("categories"):
        return Taxonomy.from_coco(about["categories"]).names
    for names in (
        dataset.get("classes"),  # mmdet 3
        dataset.get("CLASSES"),  # its release candidates
        meta.get("CLASSES"),  # mmdet 2
        [labels.get(str(index)) for index in range(len(labels))] or None,  # Hugging Face
    ):
        # LABEL_0 is what transformers calls a class without a name.
        if _is_names(names) and not all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return tuple(names)
    return None


def stated_taxonomy(weights: Weights) -> Taxonomy | None:
    """Return the file's classes if they are all known: those of our own files, and COCO's, told by their names."""
    if weights.about.get("categories"):
        return Taxonomy.from_coco(weights.about["categories"])
    return COCO if class_names(weights) == COCO.names else None


def model_fields(weights: Weights) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that the file states: all in our own files, few or none in others.

    Raises:
        ValueError: it states fields that this version does not have.
    """
    own = _mapping(_mapping(weights.about.get("config")).get("model"))
    if own:
        unknown = own.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown:
            raise ValueError(
                f"{weights.source} has a configuration with {', '.join(sorted(unknown))}, which this version does "
                f"not know. Use the version that wrote it."
            )
        return {name: tuple(value) if _is_list(value) else value for name, value in own.items()}
    heads = _mapping(weights.about.get("decoder_config")).get("decoder_attention_heads")
    return {"num_heads": heads} if isinstance(heads, int) else {}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if _is_mapping(value) else {}


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_names(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)  # pyright: ignore[reportUnknownVariableType]  # checked here


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
