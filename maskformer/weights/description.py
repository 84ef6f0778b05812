"""Metadata of a weights file: its class names and its model configuration."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard, get_args, get_type_hints

from maskformer.config import ModelConfig
from maskformer.taxonomy import COCO, Taxonomy
from maskformer.untrusted import escaped, shown
from maskformer.weights.reading import Weights


def describe(config: ModelConfig, taxonomy: Taxonomy | None) -> dict[str, Any]:
    """Return the metadata of a native file; `config.json` of a training checkpoint has it under the same keys."""
    return {
        "config": {"model": dataclasses.asdict(config)},
        "categories": None if taxonomy is None else taxonomy.to_coco(),
    }


def class_names(weights: Weights) -> tuple[str, ...] | None:
    """Return the class names by class index; None if the file has none.

    Raises:
        ValueError: the categories of a native file are damaged.
    """
    about = weights.about
    meta = _mapping(about.get("meta"))
    dataset = _mapping(meta.get("dataset_meta"))
    labels = _mapping(about.get("id2label"))
    if (native := _native_taxonomy(weights)) is not None:
        return native.names
    for names in (
        dataset.get("classes"),  # mmdet 3
        dataset.get("CLASSES"),  # its release candidates
        meta.get("CLASSES"),  # mmdet 2
        [labels.get(str(index)) for index in range(len(labels))] or None,  # Hugging Face
    ):
        # transformers names a class without a name LABEL_0.
        if _is_names(names) and not all(re.fullmatch(r"LABEL_\d+", name) for name in names):
            return tuple(names)
    return None


def stated_taxonomy(weights: Weights) -> Taxonomy | None:
    """Return the taxonomy of a file if it is known: the one it states, or COCO if the class names are COCO's.

    Native files state one, and folders for transformers that were written here.

    Raises:
        ValueError: as for `class_names`.
    """
    native = _native_taxonomy(weights)
    return COCO if native is None and class_names(weights) == COCO.names else native


def model_fields(weights: Weights) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that the file states: all in a native file, few or none in others.

    Raises:
        ValueError: the file states fields or values that this version does not have.
    """
    native = _mapping(_mapping(weights.about.get("config")).get("model"))
    if native:
        unknown = native.keys() - {field.name for field in dataclasses.fields(ModelConfig)}
        if unknown:
            raise ValueError(
                f"{weights.source} has a configuration with {escaped(', '.join(sorted(map(str, unknown))), 200)}, "
                f"which this version does not know. Use the version that wrote it."
            )
        fields = {name: tuple(value) if _is_list(value) else value for name, value in native.items()}
        if fields.get("backbone") not in get_args(get_type_hints(ModelConfig)["backbone"]):
            raise ValueError(
                f"{weights.source} has a configuration with the backbone {shown(fields.get('backbone'))}, which this "
                f"version does not know. Use the version that wrote it."
            )
        defaults = ModelConfig()
        odd = [name for name, value in fields.items() if not _is_like(value, getattr(defaults, name))]
        if odd:
            raise ValueError(
                f"{weights.source} has a configuration whose {odd[0]} is {shown(fields[odd[0]])}, where a value like "
                f"{getattr(defaults, odd[0])!r} is expected. Give an undamaged copy of the file."
            )
        return fields
    heads = _mapping(weights.about.get("decoder_config")).get("decoder_attention_heads")
    return {"num_heads": heads} if type(heads) is int else {}


def _native_taxonomy(weights: Weights) -> Taxonomy | None:
    categories = weights.about.get("categories")
    if not categories:
        return None
    try:
        taxonomy = Taxonomy.from_coco(categories)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{weights.source} has categories that are not a list of classes ({escaped(error, 500)}). Give an "
            f"undamaged copy of the file."
        ) from error
    # A folder of transformers may have been trained on other classes since: it keeps unknown fields of config.json.
    labels = weights.about.get("id2label")
    named = labels is None or labels == {str(index): name for index, name in enumerate(taxonomy.names)}
    return taxonomy if named else None


def _is_like(value: object, default: object) -> bool:
    if _is_tuple(value) and _is_tuple(default):
        return len(value) == len(default) and all(map(_is_like, value, default))
    return isinstance(value, int | float if isinstance(default, float) else type(default))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if _is_mapping(value) else {}


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)


def _is_names(value: object) -> TypeGuard[Sequence[str]]:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)  # pyright: ignore[reportUnknownVariableType]  # checked here


def _is_tuple(value: object) -> TypeGuard[tuple[object, ...]]:
    return isinstance(value, tuple)


def _is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)
