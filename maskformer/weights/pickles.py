"""What a checkpoint's pickle may contain. Everything else is refused, so reading a file never runs code from it.

Two readers are fed from here: torch's (`torch.load(weights_only=True)`), which allows tensors and plain values and is
told of a few more names, and a restricted one for the plain pickles of detectron2's model zoo.
"""

import collections
import io
import pickle
from _codecs import encode
from collections.abc import Callable
from typing import Any, BinaryIO, SupportsIndex, cast

import numpy as np
import torch
from torch._utils import _rebuild_tensor_v2  # pyright: ignore[reportPrivateUsage, reportUnknownVariableType]  # files name it


def _rebuilder(value: object, protocol: SupportsIndex) -> Callable[..., Any]:
    """Return the function that a pickle of `value` calls. numpy has moved them; files name the old or the new place."""
    return cast("tuple[Any, ...]", value.__reduce_ex__(protocol))[0]


_ARRAYS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **{
        f"numpy.{package}.{name}": function
        for package in ("core", "_core")
        for name, function in {
            "multiarray._reconstruct": _rebuilder(np.array(0), 2),
            "multiarray.scalar": _rebuilder(np.float64(0), 2),
            "numeric._frombuffer": _rebuilder(np.array(0), 5),
        }.items()
    },
    "_codecs.encode": encode,
}


class _HistoryBuffer:
    """Stands in for mmengine's log of a loss, of which nothing is wanted."""


def _attribute(*_: object) -> None:
    """Stand in for `getattr`, by which mmengine's logs name their own methods: reach for nothing."""


_MMENGINE: dict[str, Callable[..., Any]] = {
    "mmengine.logging.history_buffer.HistoryBuffer": _HistoryBuffer,
    "builtins.getattr": _attribute,
    "__builtin__.getattr": _attribute,
}


class RefusedError(ValueError):
    """The file names a function or class that no checkpoint needs; the message is that name."""


def load_torch(file: BinaryIO) -> Any:
    """Read what `torch.save` wrote, in its zip or its older format.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: of many kinds, if the file is damaged.
    """
    # torch also asks for the class of the data type that it builds: one for each letter of numpy's numbers.
    number_types = {f"numpy.dtypes.{type(t).__name__}": type(t) for t in map(np.dtype, "?bhilqBHILQefd")}
    allowed = {**_ARRAYS, **_MMENGINE, **number_types}
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _PLAIN[f"{module_name}.{global_name}"]
        except KeyError:
            raise RefusedError(f"{module_name}.{global_name}") from None


def load_pickle(file: BinaryIO) -> Any:
    """Read a plain pickle, as detectron2's model zoo has them.

    Raises:
        RefusedError: the file holds more than tensors, arrays and plain values.
        Exception: of many kinds, if the file is damaged.
    """
    return _Unpickler(file, encoding="latin1").load()  # the older ones were written by Python 2


def _load_storage(data: bytes) -> Any:
    return load_torch(io.BytesIO(data))


_PLAIN: dict[str, Callable[..., Any]] = {
    **_ARRAYS,
    "collections.OrderedDict": collections.OrderedDict,
    # How a tensor looks that was pickled without torch.save; its storage is a file of torch.save's inside the pickle.
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch.storage._load_from_bytes": _load_storage,
}
