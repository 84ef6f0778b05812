"""Save a model in the native format or in that of mmdetection or transformers."""

import filecmp
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from torch import Tensor

from maskformer.config import WeightFormat
from maskformer.model import MaskFormer
from maskformer.taxonomy import COCO, Taxonomy
from maskformer.weights.description import describe
from maskformer.weights.huggingface import HUGGINGFACE, constants, model_json, processor_json
from maskformer.weights.mmdet import MMDET_2, MMDET_3
from maskformer.weights.model_card import ModelDetails, model_card


def save(
    model: MaskFormer,
    path: str | Path,
    format: WeightFormat = "native",
    taxonomy: Taxonomy | None = None,
    details: ModelDetails | None = None,
) -> None:
    """Write a model to `path`, which appears only when it is complete.

    Args:
        format: the file format; `huggingface` writes a folder, the others a file.
        taxonomy: the classes, whose names are written too. None uses COCO's if the number of classes is equal, else no
            names.
        details: for `huggingface`, the sizes and thresholds and what the model card says; those of the published
            models if None.

    Raises:
        ValueError: the format is unknown or cannot represent the model, the taxonomy has another number of classes, or
            `path` exists with other content.
    """
    if format not in get_args(WeightFormat):
        raise ValueError(f"There is no format {format!r} to write. Use one of {', '.join(get_args(WeightFormat))}.")
    path = Path(path)
    config = model.config
    if taxonomy is None and config.num_classes == COCO.num_classes:
        taxonomy = COCO
    if taxonomy is not None and taxonomy.num_classes != config.num_classes:
        raise ValueError(
            f"The model has {config.num_classes} classes, the taxonomy {taxonomy.num_classes}. Give the categories "
            f"that the model was trained on."
        )
    names = None if taxonomy is None else taxonomy.names
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    everything = {**state, **_window_constants(state)}
    encoder = config.encoder_layers > 0
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if format == "native":
            _save_safetensors(state, part, {"maskformer": json.dumps(describe(config, taxonomy))})
        elif format == "mmdet":
            meta = {"dataset_meta": {"classes": names}} if names else {}
            _save_torch({"meta": meta, "state_dict": MMDET_3.to_foreign(everything, encoder)}, part)
        elif format == "mmdet2":
            meta = {"CLASSES": names} if names else {}
            _save_torch({"meta": meta, "state_dict": MMDET_2.to_foreign(everything, encoder)}, part)
        else:
            details = details or ModelDetails()
            about = model_json(config, taxonomy)
            tensors = {**HUGGINGFACE.to_foreign(everything, encoder), **constants(config)}
            part.mkdir()
            _save_safetensors(tensors, part / "model.safetensors", {"format": "pt"})
            (part / "config.json").write_text(json.dumps(about, indent=2) + "\n", "utf-8")
            processor = json.dumps(processor_json(config, details), indent=2) + "\n"
            (part / "preprocessor_config.json").write_text(processor, "utf-8")
            (part / "README.md").write_text(model_card(config, taxonomy, details), "utf-8")
        _put_in_place(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def _save_safetensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    safetensors.torch.save_file(tensors, path, metadata)  # pyright: ignore[reportUnknownMemberType]  # PathLike without its type argument


def _save_torch(content: dict[str, Any], part: Path) -> None:
    # Given a path, torch would store the file name, and files of equal models would differ.
    with part.open("wb") as file:
        torch.save(content, file)


def _put_in_place(part: Path, path: Path) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if _same(part, path):
            return
        raise ValueError(f"{path} already exists with other content. Choose another output, or delete it.")
    part.replace(path)


def _same(part: Path, path: Path) -> bool:
    if part.is_dir() != path.is_dir():
        return False
    if not part.is_dir():
        return filecmp.cmp(part, path, shallow=False)
    names = sorted(file.name for file in part.iterdir())
    if names != sorted(file.name for file in path.iterdir()):
        return False
    return not any(filecmp.cmpfiles(part, path, names, shallow=False)[1:])


def _window_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Swin's relative position indices, which other implementations store with their weights."""
    indices: dict[str, Tensor] = {}
    for name, table in state.items():
        if name.endswith("relative_position_bias_table"):
            side = int(len(table) ** 0.5)  # 2 * window - 1
            cell = torch.arange((side + 1) // 2)
            y, x = (axis.flatten() for axis in torch.meshgrid(cell, cell, indexing="ij"))
            down, across = (axis[:, None] - axis[None, :] + len(cell) - 1 for axis in (y, x))
            indices[name.replace("bias_table", "index")] = down * side + across
    return indices
