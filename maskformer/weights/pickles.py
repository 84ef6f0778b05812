"""What a checkpoint's pickle may contain. Everything else is refused, so reading a file never runs code from it.

Two readers are fed from here: torch's (`torch.load(weights_only=True)`), which allows tensors and plain values and is
told of a few more names, and a restricted one for the plain pickles of detectron2's model zoo. A pickle may also call
what it names, store items in it and set its attributes, and numpy trusts the pointers that it is given; so what
numpy's names lead to are stand-ins of our own, which become arrays when the whole file is read.
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
    """The file names a function or class that no checkpoint needs; the message is that name."""

    def __init__(self, name: str) -> None:
        super().__init__(name if len(name) <= 100 and name.isprintable() else f"{name[:100]!r}...")


class _NumberType:
    """Stands in for `numpy.dtype`."""

    __slots__ = ("_code", "_order")
    _code: object
    _order: object

    def __new__(cls, code: object = None, *_: object) -> "_NumberType":
        made = super().__new__(cls)
        made._code, made._order = code, "="
        return made

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]  # the first is a version, and the rest is about structures

    def to_numpy(self) -> np.dtype[Any]:
        """Return the data type; ValueError if it is none of numbers."""
        code = f"{self._order}{self._code}" if isinstance(self._code, str) and isinstance(self._order, str) else ""
        if not re.fullmatch(r"[<>|=][biuf][1248]", code):
            raise ValueError(f"its numpy data type {code[:20]!r} is not one of numbers in 1 to 8 bytes")
        return np.dtype(code)


class PickledArray:
    """Stands in for `numpy.ndarray` and numpy's scalars."""

    __slots__ = ("_state",)
    _state: Any

    def __new__(cls, *_: object) -> "PickledArray":
        made = super().__new__(cls)
        made._state = None
        return made

    def __setstate__(self, state: object) -> None:
        self._state = state

    def to_numpy(self) -> npt.NDArray[Any]:
        """Return the array; ValueError if it is none of numbers, or its bytes are more or fewer than its shape says."""
        try:
            _, shape, number, is_fortran, data = self._state
            dtype = _NumberType.to_numpy(number)
            # What Python 2 wrote as bytes is read as Latin-1.
            content = data.encode("latin1") if isinstance(data, str) else memoryview(data)
            sizes = tuple(map(operator.index, shape))
        except (TypeError, AttributeError):
            raise ValueError("it is not an array of numbers") from None
        if min(sizes, default=0) < 0 or math.prod(sizes) * dtype.itemsize != len(content):
            raise ValueError(f"its {len(content)} bytes are not as many as its shape says")
        return np.reshape(np.frombuffer(content, dtype), sizes, order="F" if is_fortran else "C")


class PickledTensor(NamedTuple):
    """Stands in for a tensor that was pickled without torch.save, which keeps its storage as a file of torch.save's."""

    storage: tuple[Any]
    """In a tuple, out of the file's reach."""
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def to_torch(self) -> Tensor:
        """Return the tensor; an Exception of many kinds if it is damaged."""
        (storage,) = self.storage
        parts = storage, self.offset, self.size, self.stride, False, OrderedDict[str, Any]()
        return cast("Tensor", _rebuild_tensor_v2(*parts))


class _HistoryBuffer:
    """Stands in for mmengine's log of a loss, of which nothing is wanted."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


class _OrderedDict(dict[Any, Any]):
    """Stands in for `collections.OrderedDict`, without the attributes that modules give to theirs."""

    __slots__ = ()

    def __setstate__(self, _: object) -> None:
        pass


def _attribute(*_: object) -> None:
    """Stand in for `getattr`, by which mmengine's logs name their own methods: reach for nothing."""


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
        f"numpy.{package}.{name}": stand_in  # numpy has moved them; files name the old or the new place
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
    """Read what `torch.save` wrote, in its zip or its older format; arrays stay `PickledArray`.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: of many kinds, if the file is damaged.
    """
    allowed = {**_ARRAYS, **_MMENGINE}
    with torch.serialization.safe_globals([(value, name) for name, value in allowed.items()]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # torch's own text advises to switch the protection off.
            _, found, after = str(error).partition("GLOBAL ")
            name = after.partition(" ")[0]
            if not found or name.endswith("."):  # without an end, the file is cut off inside the name
                raise
            raise RefusedError(name) from None
        except RuntimeError as error:
            if "TorchScript" not in str(error):
                raise
            raise RefusedError("a TorchScript program") from None


class _Name(tuple[Callable[..., Any]]):
    """What a plain pickle gets for a name that it may call: a tuple, whose attributes cannot be set."""

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
    """Read a plain pickle, as detectron2's model zoo has them; arrays and tensors stay `Pickled...`.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: of many kinds, if the file is damaged.
    """
    return _Unpickler(file, encoding="latin1").load()  # the older ones were written by Python 2
