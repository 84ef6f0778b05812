"""Read a checkpoint of any format, detected from its content, without running code from it."""

import json
import pickle
import reprlib
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from maskformer.untrusted import escaped
from maskformer.weights.pickles import PickledArray, PickledTensor, RefusedError, load_pickle, load_torch

_ZIP = b"PK\x03\x04"
_OLD_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the magic number of torch.save before 1.6, pickled
_LARGEST_HEADER = 100_000_000  # of a safetensors file, by its specification
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
        with path.open("rb") as file:
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
    if not files or not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise ValueError(
            f"{path} is not the index of a model: its weight_map must name a file of the same folder for each tensor. "
            f"Copy or download it again."
        )
    tensors: dict[str, Tensor] = {}
    for part in (path.with_name(file) for file in sorted(files)):
        if not part.is_file():
            raise ValueError(f"There is no file {part}, which the index {path} lists. Copy or download it too.")
        with part.open("rb") as file:
            tensors.update(_read_file(file, str(part)).tensors)
    config = path.with_name("config.json")
    return Weights(str(path.parent), tensors, _read_json(config) if config.is_file() else {})


def _read_file(file: BinaryIO, name: str) -> Weights:
    head = file.read(512)
    file.seek(0)
    try:
        if head.startswith(_ZIP) or head[2 : 2 + len(_OLD_TORCH)] == _OLD_TORCH:
            content = load_torch(file)
        elif head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
            content = _load_safetensors(file.read())
        elif head.startswith(b"\x80"):
            content = load_pickle(file)
        else:
            content = None
    except RefusedError as error:
        raise ValueError(
            f"{name} is not opened: besides tensors it holds {error}, which could run code. Give a file of weights "
            f"only: save the model's state_dict() with torch.save, or as safetensors."
        ) from error
    except Exception as error:  # each library raises many types for a file that it cannot read
        reason = textwrap.shorten(f"{type(error).__name__}: {error}".rstrip(": "), 300, placeholder=" ...")
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises to turn the protection off
            reason = "its pickle holds more than plain data"
        raise ValueError(
            f"{name} is damaged, truncated, or not a file of weights only ({reason}). Copy or download it again and "
            f"compare the sizes."
        ) from error
    if content is None:
        raise ValueError(f"{name} {_describe_unknown(head)} Give a checkpoint: .pth, .pt, .bin, .pkl or .safetensors.")
    return _unwrap(content, name)


def _describe_unknown(head: bytes) -> str:
    if not head:
        return "is empty."
    if head.lstrip().startswith(b"<"):
        return "is a web page, not a checkpoint: the download failed. Open the URL in a browser to see why."
    if head.startswith(b"version https://git-lfs"):
        return "is only a pointer to a file in git-lfs. Run `git lfs pull` in its repository."
    return f"has an unknown format: it begins with {head[:8]!r}."


def _load_safetensors(data: bytes) -> dict[str, Any]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    about = json.loads(header.get("__metadata__", {}).get("maskformer", "{}"))
    return {"state_dict": safetensors.torch.load(data), "about": about}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Copy or download it again.") from error
    if not _is_dict(content):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}. Copy or download it again.")
    return content


def _unwrap(content: Any, name: str) -> Weights:
    """Find the state dict: the file itself, or its `state_dict` (OpenMMLab, timm) or `model` (detectron2, Swin)."""
    about: dict[str, Any] = {}
    if _is_dict(content):
        content = _plain(content)
        if _is_dict(content.get("about")):
            about = content["about"]
        elif _is_dict(content.get("meta")):
            about = {"meta": content["meta"]}
        inner = next((content[key] for key in ("state_dict", "model") if _is_dict(content.get(key))), content)
        tensors = {
            key: tensor for key, value in _plain(inner).items() if (tensor := _as_tensor(value, key, name)) is not None
        }
        if tensors:
            if all(key.startswith(_WRAPPER) for key in tensors):
                tensors = {key.removeprefix(_WRAPPER): tensor for key, tensor in tensors.items()}
            return Weights(name, tensors, about)
    raise ValueError(
        f"{name} holds no tensors by name, but {_describe(content)}. Give a state dict, alone or under the key "
        f"state_dict or model."
    )


def _plain(content: dict[str, Any]) -> dict[str, Any]:
    # A file can set attributes of the dictionaries that torch reads, such as `items` and `get`.
    return dict(dict[str, Any].items(content))


def _is_dict(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _as_tensor(value: object, key: object, name: str) -> Tensor | None:
    try:
        if isinstance(value, PickledArray):
            value = value.to_numpy()
        if isinstance(value, PickledTensor):
            value = value.to_torch()
        if _is_array(value):
            array = value.astype(f"{value.dtype.kind}{value.dtype.itemsize}")  # a copy in this machine's byte order
            value = torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  # torch leaves it untyped
    except Exception as error:  # numpy and torch raise many types
        raise ValueError(
            f"{name} is not used: its tensor {_shown(key)} cannot be read ({error}). Save it in float32."
        ) from error
    if not isinstance(value, Tensor):
        return None
    if not isinstance(key, str) or not key.isprintable():
        raise ValueError(f"{name} is not used: the key {_shown(key)} of a tensor is not a name. Give a state dict.")
    if value.layout is not torch.strided or value.is_quantized or value.is_nested:
        raise ValueError(
            f"{name} is not used: its tensor {_shown(key)} is sparse, quantized or nested. Save it as a dense one in "
            f"float32."
        )
    return Tensor.detach(value)  # value.detach might be an attribute set by the file


def _is_array(value: object) -> TypeGuard[npt.NDArray[Any]]:
    return isinstance(value, np.ndarray)


def _describe(content: object) -> str:
    if _is_dict(content):
        return f"a dict with the keys {', '.join(map(_shown, list(content)[:5])) or '(none)'}"
    return f"a {type(content).__name__}"


def _shown(key: object) -> str:
    return escaped(key if isinstance(key, str) else reprlib.repr(key), 200)
