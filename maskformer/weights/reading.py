"""Read a checkpoint of any format, detected from its content, without running code from it."""

import os
import reprlib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from maskformer.untrusted import escaped, open_regular, parse_json, read_json
from maskformer.weights.pickles import RefusedError, describe, kind_of
from maskformer.weights.safetensors_header import is_safetensors, read_header
from maskformer.weights.stored import MAX_NAME, MAX_TENSORS, StoredTensor, Unreadable, read_tensors

_MAX_SHARDS = 1000
_FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights in a native folder or one of Hugging Face. An index lists the shards of a large model."""
_WRAPPER = "module."


@dataclass(frozen=True)
class Weights:
    """The tensors of a file by their names in the file, and its metadata."""

    source: str
    """The file, for messages."""
    tensors: dict[str, Tensor]
    """Tensors by their name in the file."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """`config.json` next to the file, the metadata inside a native file, or `meta` of an OpenMMLab file."""


Source = str | Path | BinaryIO | Mapping[str, Tensor] | Weights
"""A path, an open file (whose `name` appears in messages), a state dict, or the result of `read`."""


def read(source: Source) -> Weights:
    """Read tensors by name from `torch.save`, a detectron2 pickle, safetensors, or a folder with `config.json`.

    If all names begin with `module.`, as in a checkpoint of torch's DistributedDataParallel, this prefix is removed.

    Raises:
        ValueError: the file does not exist, is damaged, has an unknown format, holds more than data, or is a URI; or
            one of its tensors is not dense or has a data type that torch does not support.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, Mapping):
        return _unwrap(dict(source), "The state dict")
    if not isinstance(source, str | Path):
        return _read_file(source, str(getattr(source, "name", "The file")))
    if "://" in str(source):
        raise ValueError(
            f"Weights are read from local files, got the URI {source}. Give an open file with its content."
        )
    path = Path(source)
    try:
        if path.is_dir():
            return _read_folder(path)
        if path.name in _FOLDER_FILES and path.suffix == ".json":
            return _read_index(path)
        with open_regular(path) as file:
            weights = _read_file(file, str(path))
        if path.name in _FOLDER_FILES and (path.parent / "config.json").is_file():
            return Weights(weights.source, weights.tensors, _read_json(path.parent / "config.json"))
        return weights
    except FileNotFoundError:
        raise ValueError(f"There is no file {path}. Give the path of a checkpoint.") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}. Give a readable checkpoint.") from error


def _read_folder(folder: Path) -> Weights:
    name = next((name for name in _FOLDER_FILES if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(
            f"The folder {folder} holds no checkpoint: it has none of {', '.join(_FOLDER_FILES)}. Give a folder "
            f"written by save_pretrained, a checkpoints/step_* folder of a run, or a file."
        )
    return read(folder / name)


def _read_index(path: Path) -> Weights:
    names = _read_json(path).get("weight_map")
    files = set(names.values()) if _is_dict(names) else set[Any]()
    if not files or not all(map(_is_file_name, files)):
        raise ValueError(
            f"{path} is not the index of a model: its weight_map must name a file of the same folder for each tensor. "
            f"Copy or download it again."
        )
    if len(files) > _MAX_SHARDS:
        raise ValueError(
            f"{path} lists {len(files)} files, more than {_MAX_SHARDS}, so it is not the index of a MaskFormer. Give "
            f"another checkpoint."
        )
    tensors: dict[str, Tensor] = {}
    for part in (path.with_name(file) for file in sorted(files)):
        if not part.is_file():
            raise ValueError(f"There is no file {part}, which the index {path} lists. Copy or download it too.")
        with open_regular(part) as file:
            found = _read_file(file, str(part)).tensors
        twice = next((name for name in found if name in tensors), None)
        if twice is not None or len(tensors) + len(found) > MAX_TENSORS:
            what = f"the tensor {escaped(twice, 100)} twice" if twice else f"more than {MAX_TENSORS:,} tensors"
            raise ValueError(f"The files that {path} lists hold {what}. Copy or download them again.")
        tensors.update(found)
    config = path.with_name("config.json")
    return Weights(str(path.parent), tensors, _read_json(config) if config.is_file() else {})


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) < 256 and Path(value).name == value


def _read_file(file: BinaryIO, name: str) -> Weights:
    head = file.read(512)
    size = file.seek(0, os.SEEK_END)
    kind = kind_of(head)
    try:
        if kind is not None:
            return _unwrap(describe(file, size, kind), name, (file, size))
        if is_safetensors(head):
            return _unwrap(_safetensors(file, size), name, (file, size))
    except RefusedError as error:
        raise ValueError(
            f"{name} is not opened: besides tensors it holds {error}, which could run code. Give a file of weights "
            f"only: save the model's state_dict() with torch.save, or as safetensors."
        ) from error
    except _UnusableError:
        raise
    except ValueError as error:
        reason = textwrap.shorten(escaped(error), 300, placeholder=" ...")
        raise ValueError(
            f"{name} is damaged, truncated, or not a file of weights only ({reason}). Copy or download it again and "
            f"compare the sizes."
        ) from error
    raise ValueError(f"{name} {_describe_unknown(head)} Give a checkpoint: .pth, .pt, .bin, .pkl or .safetensors.")


class _UnusableError(ValueError):
    """A file that can be read but has no weights, with a message for users."""


def _describe_unknown(head: bytes) -> str:
    if not head:
        return "is empty."
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: the download failed. Open the URL in a browser to see why."
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer to a file in git-lfs. Run `git lfs pull` in its repository."
    return f"has an unknown format: it begins with {head[:8]!r}."


def _safetensors(file: BinaryIO, size: int) -> dict[str, Any]:
    tensors, metadata = read_header(file, size)
    return {"state_dict": tensors, "about": parse_json(metadata.get("maskformer", "{}"))}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {escaped(error, 200)}. Copy or download it again.") from error
    if not _is_dict(content):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. Copy or download it again.")
    return content


def _unwrap(content: Any, name: str, file: tuple[BinaryIO, int] | None = None) -> Weights:
    """Find the state dict: the file itself, or its `state_dict` (OpenMMLab, timm) or `model` (detectron2, Swin).

    Args:
        file: the file, and its size, in which stored tensors are.
    """
    about: dict[str, Any] = {}
    if _is_dict(content):
        if _is_dict(content.get("about")):
            about = content["about"]
        elif _is_dict(content.get("meta")):
            about = {"meta": content["meta"]}
        inner = next((content[key] for key in ("state_dict", "model") if _is_dict(content.get(key))), content)
        found = {key: value for key, value in inner.items() if _is_tensor(value)}
        if len(found) > MAX_TENSORS:
            raise _UnusableError(
                f"{name} has {len(found):,} tensors, more than {MAX_TENSORS:,}, so it is not a MaskFormer. Give "
                f"another checkpoint."
            )
        tensors = _tensors(found, name, file)
        if tensors:
            if all(key.startswith(_WRAPPER) for key in tensors):
                tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in tensors.items()}
            return Weights(name, tensors, about)
    raise _UnusableError(
        f"{name} holds no tensors by name, but {_describe(content)}. Give a state dict, alone or under the key "
        f"state_dict or model."
    )


def _tensors(found: Mapping[Any, Any], name: str, file: tuple[BinaryIO, int] | None) -> dict[str, Tensor]:
    tensors: dict[str, Any] = {}
    for key, value in found.items():
        try:
            if isinstance(value, Unreadable):
                raise ValueError(value.reason)
            if isinstance(value, StoredTensor) and file is not None:
                value.check(file[1])
            tensors[key] = _from_array(value) if _is_array(value) else value
        except Exception as error:  # numpy and torch raise many types
            raise _UnusableError(
                f"{name} is not used: its tensor {_shown(key)} cannot be read ({error}). Save it in float32."
            ) from error
        if not isinstance(key, str) or not key.isprintable() or len(key) > MAX_NAME:
            raise _UnusableError(
                f"{name} is not used: the key {_shown(key)} of a tensor is not a name. Give a state dict."
            )
    if file is not None:
        read = read_tensors(*file, tensors.values())
        return {key: read[value] for key, value in tensors.items()}
    for key, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_nested:
            raise _UnusableError(
                f"{name} is not used: its tensor {_shown(key)} is sparse, quantized or nested. Save it as a dense one "
                f"in float32."
            )
    return {key: value.detach() for key, value in tensors.items()}


def _is_dict(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | np.ndarray | StoredTensor | Unreadable)


def _from_array(array: npt.NDArray[Any]) -> Tensor:
    native = array.astype(f"{array.dtype.kind}{array.dtype.itemsize}")  # a copy in this machine's byte order
    return torch.from_numpy(native)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it untyped


def _is_array(value: object) -> TypeGuard[npt.NDArray[Any]]:
    return isinstance(value, np.ndarray)


def _describe(content: object) -> str:
    if _is_dict(content):
        return f"a dict with the keys {', '.join(map(_shown, list(content)[:5])) or '(none)'}"
    return "a Tensor" if isinstance(content, StoredTensor) else f"a {type(content).__name__}"


def _shown(key: object) -> str:
    return escaped(key if isinstance(key, str) else reprlib.repr(key), 200)
