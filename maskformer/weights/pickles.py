"""Restricted readers of pickled checkpoints. They refuse unknown names, so reading a file never runs code from it.

There are two readers: torch's (`torch.load(weights_only=True)`), which allows tensors, plain values and a few more
names listed here, and a restricted unpickler for the plain pickles of detectron2's model zoo. A pickle can call the
objects it names, store items in them and set their attributes, and numpy trusts the pointers in a pickle. Numpy's names
therefore resolve to stand-ins defined here, which are converted to arrays after the complete file is read.
"""

import io
import math
import operator
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]  # no other


class RefusedError(ValueError):
    """The file names a function or class that no checkpoint needs. The message is this name."""

    def __init__(self, name: str) -> None:
        super().__init__(name if len(name) <= 100 and name.isprintable() else f"{name[:100]!r}...")


class _NumberType:
    """Stand-in for `numpy.dtype`."""

    __slots__ = ("_code", "_order")
    _code: object
    _order: object

    def __new__(cls, code: object = None, *_: object) -> "_NumberType":
        made = super().__new__(cls)
        made._code, made._order = code, "="
        return made

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]  # the first item is a version; the rest describes structured types

    def to_numpy(self) -> np.dtype[Any]:
        """Return the data type; ValueError if it is not numeric."""
        code = f"{self._order}{self._code}" if isinstance(self._code, str) and isinstance(self._order, str) else ""
        if not re.fullmatch(r"[<>|=][biuf][1248]", code):
            raise ValueError(f"its numpy data type {code[:20]!r} is not one of numbers in 1 to 8 bytes")
        return np.dtype(code)


class PickledArray:
    """Stand-in for `numpy.ndarray` and numpy's scalars."""

    __slots__ = ("_state",)
    _state: Any

    def __new__(cls, *_: object) -> "PickledArray":
        made = super().__new__(cls)
        made._state = None
        return made

    def __setstate__(self, state: object) -> None:
        self._state = state

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return the array; ValueError if it is not numeric, or its number of bytes does not fit its shape."""
        try:
            _, shape, number, is_fortran, data = self._state
            dtype = _NumberType.to_numpy(number)
            # Bytes written by Python 2 are read as a Latin-1 string.
            content = data.encode("latin1") if isinstance(data, str) else memoryview(data)
            sizes = tuple(map(operator.index, shape))
        except (TypeError, AttributeError):
            raise ValueError("it is not an array of numbers") from None
        if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(content):
            raise ValueError(f"its {len(content)} bytes do not fit its shape")
        return np.reshape(np.frombuffer(content, dtype), sizes, order="F" if is_fortran else "C")


class PickledTensor(NamedTuple):
    """Stand-in for a tensor pickled without torch.save; its storage is embedded in the format of torch.save."""

    storage: tuple[Any]
    """Wrapped in a tuple, so the file cannot set its attributes."""
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def to_torch(self) -> Tensor:
        """Return the tensor; raises exceptions of many types if it is damaged."""
        (storage,) = self.storage
        parts = storage, self.offset, self.size, self.stride, False, OrderedDict[str, Any]()
        return cast("Tensor", _rebuild_tensor_v2(*parts))


class _HistoryBuffer:
    """Stand-in for mmengine's loss log, which is discarded."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


class _OrderedDict(dict[Any, Any]):
    """Stand-in for `collections.OrderedDict`, without the attributes that state dicts carry."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


def _attribute(*_: object) -> None:
    """Stand-in for `getattr`, with which mmengine's logs refer to their methods; return None."""


def _scalar(number: object, data: object = None) -> PickledArray:
    return _frombuffer(data, number, (), "C")


def _frombuffer(data: object, number: object, shape: object, order: object) -> PickledArray:
    array = PickledArray()
    array.__setstate__((1, shape, number, order == "F", data))
    return array


def _encode(text: str, encoding: object) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise RefusedError(f"_codecs.encode to {encoding}")
    return str.encode(text, "latin1")


def _load_storage(data: bytes) -> tuple[Any]:
    return (load_torch(io.BytesIO(data)),)


def _tensor(storage: tuple[Any], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    return PickledTensor(storage, offset, size, stride)


_ARRAYS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": PickledArray,
    "numpy.dtype": _NumberType,
    **{
        f"numpy.{package}.{name}": stand_in  # numpy moved these modules; files contain the old or the new name
        for package in ("core", "_core")
        for name, stand_in in {
            "multiarray._reconstruct": PickledArray,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _frombuffer,
        }.items()
    },
}
_MMENGINE: dict[str, Callable[..., Any]] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _HistoryBuffer,
    "builtins.getattr": _attribute,
    "__builtin__.getattr": _attribute,
}
_PLAIN: dict[str, Callable[..., Any]] = {
    **_ARRAYS,
    "_codecs.encode": _encode,
    "collections.OrderedDict": _OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _load_storage,
}


def load_torch(file: BinaryIO) -> Any:
    """Read a file written by `torch.save`, in its zip or its legacy format; arrays stay `PickledArray`.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: the file is damaged; exceptions of many types.
    """
    allowed = {**_ARRAYS, **_MMENGINE}
    with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # The message of torch advises to turn the protection off.
            _, found, after = str(error).partition("GLOBAL ")
            name = after.partition(" ")[0]
            if not found or name.endswith("."):  # an unfinished name means that the file is truncated
                raise
            raise RefusedError(name) from None
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            raise RefusedError("a TorchScript program") from None


class _Name(tuple[Callable[..., Any]]):
    """Wrapper of an allowed callable in a plain pickle; a tuple, because its attributes cannot be set."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        return self[0](*arguments)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _Name((_PLAIN[f"{module_name}.{global_name}"],))
        except KeyError:
            raise RefusedError(f"{module_name}.{global_name}") from None


def load_pickle(file: BinaryIO) -> Any:
    """Read a plain pickle, as in detectron2's model zoo; arrays and tensors stay `PickledArray` and `PickledTensor`.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: the file is damaged; exceptions of many types.
    """
    return _Unpickler(file, encoding="latin1").load()  # the older files were written by Python 2
