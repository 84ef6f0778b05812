"""Tensors that are still in a file. They are checked against the file before any memory is taken for them."""

import io
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAX_TENSORS = 10_000
"""Most tensors in a file of weights."""
MAX_NAME = 300
"""Most characters in the name of a tensor."""
MAX_DIMENSIONS = 32
_MAX_SIZE = 2**40  # of a dimension, so that a product of all fits in memory


class Place(NamedTuple):
    """Where the bytes of a storage are."""

    at: int
    size: int
    """Number of bytes; -1 is all of the text."""
    text: tuple[int, int] | None = None
    """Offset and bytes of a text in UTF-8, if the bytes were pickled as Latin-1 text: `at` counts in these bytes."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor whose values are in a file. Equal by identity: a file may have shapes with equal hashes."""

    place: Place
    dtype: torch.dtype
    offset: int
    """First element in the storage."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    big_endian: bool = False
    fills: bool = False
    """Whether it must have all elements of its storage, as a numpy array and a tensor of safetensors have."""

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def check(self, file_size: int) -> None:
        """Check that the tensor lies inside its storage, without overlapping itself, and its storage inside the file.

        Raises:
            ValueError: it does not. The message is the reason.
        """
        at, size = self.place.text or self.place[:2]
        if not 0 <= at <= file_size or not 0 <= size <= file_size - at:
            raise ValueError("its values lie outside the file")
        if len(self.shape) > MAX_DIMENSIONS or len(self.strides) != len(self.shape):
            raise ValueError(f"its shape has {len(self.shape)} dimensions and its strides {len(self.strides)}")
        if self.fills and min(self.shape, default=0) < 0:
            raise ValueError(f"its {size} bytes do not fit its shape")
        if any(not 0 <= number < _MAX_SIZE for number in (self.offset, *self.shape, *self.strides)):
            raise ValueError("its shape, strides or offset is negative or too large")
        if self.place.text is None:
            self.check_inside(self.place.size)

    def check_inside(self, storage_size: int) -> None:
        """Check that the tensor lies inside a storage of so many bytes.

        Raises:
            ValueError: it does not.
        """
        if self.fills and storage_size != self.size:
            raise ValueError(f"its {storage_size} bytes do not fit its shape")
        if storage_size % self.dtype.itemsize:
            raise ValueError(f"its {storage_size} bytes are not a multiple of {self.dtype.itemsize}")
        if not self.size:
            return
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if last >= storage_size // self.dtype.itemsize:
            raise ValueError("its shape is out of bounds of its storage")
        free = 1
        for stride, size in sorted((stride, size) for size, stride in zip(self.shape, self.strides, strict=True)):
            if size > 1:
                if stride < free:
                    raise ValueError("its elements share memory, as those of Tensor.expand do")
                free = stride * size


@dataclass(frozen=True)
class Unreadable:
    """What stands for a tensor that cannot be read."""

    reason: str


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a tensor in C's order."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= max(size, 1)
    return tuple(strides)


def read_tensors(file: BinaryIO, file_size: int, tensors: Iterable[StoredTensor]) -> dict[StoredTensor, Tensor]:
    """Read tensors that `StoredTensor.check` accepts, straight from the file. Tensors of one storage share its memory.

    Raises:
        ValueError: storages overlap, or the tensors have more than twice the bytes of the file, or it is shorter.
    """
    named = list(tensors)
    if len(named) > 4 * MAX_TENSORS:  # an optimizer has three for each of the network
        raise ValueError(f"it has more than {4 * MAX_TENSORS:,} tensors")
    if sum(tensor.size for tensor in named) > 2 * file_size:
        raise ValueError("its tensors have more than twice as many bytes as the file")
    _refuse_overlaps({tensor.place.text or (tensor.place.at, tensor.place.size) for tensor in named})
    storages: dict[tuple[Place, bool, int], Tensor] = {}
    read: dict[StoredTensor, Tensor] = {}
    for tensor in named:
        # Elements of another size in the other order of bytes would be other bytes.
        key = tensor.place, tensor.big_endian, tensor.dtype.itemsize if tensor.big_endian else 0
        if key not in storages:
            storages[key] = _read_storage(file, tensor)
        storage = storages[key]
        tensor.check_inside(storage.numel())
        whole = storage.untyped_storage()
        read[tensor] = torch.empty(0, dtype=tensor.dtype).set_(whole, tensor.offset, tensor.shape, tensor.strides)
    return read


def _refuse_overlaps(ranges: Iterable[tuple[int, int]]) -> None:
    end = 0
    for at, size in sorted(each for each in ranges if each[1] > 0):
        if at < end:
            raise ValueError("the values of two of its tensors overlap in the file")
        end = at + size


def _read_storage(file: BinaryIO, tensor: StoredTensor) -> Tensor:
    place = tensor.place
    if place.text is None:
        storage = _taken(place.size)
        _read_into(file, place.at, _bytes_of(storage))
    else:
        text = bytearray(place.text[1])
        _read_into(file, place.text[0], memoryview(text))
        data = text.decode("utf-8", "surrogatepass").encode("latin1")
        size = len(data) if place.size < 0 else place.size
        if not 0 <= place.at <= len(data) or size > len(data) - place.at:
            raise ValueError("its values lie outside the file")
        storage = _taken(size)
        _bytes_of(storage)[:] = data[place.at : place.at + size]
    if tensor.big_endian != (sys.byteorder == "big") and tensor.dtype.itemsize > 1:
        if storage.numel() % tensor.dtype.itemsize:
            raise ValueError(f"its {storage.numel()} bytes are not a multiple of {tensor.dtype.itemsize}")
        storage = storage.view(-1, tensor.dtype.itemsize).flip(1).flatten()
    return storage


def _taken(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8)
    except (RuntimeError, MemoryError):
        raise ValueError(f"there is no memory for {size:,} bytes of it") from None


def _bytes_of(storage: Tensor) -> memoryview:
    return memoryview(cast("Buffer", storage.numpy()))


def _read_into(file: BinaryIO, at: int, target: memoryview) -> None:
    """Fill `target` from the file; an object store's file may have no `readinto`."""
    file.seek(at)
    done = 0
    while done < len(target):
        if isinstance(file, io.RawIOBase | io.BufferedIOBase):
            count = file.readinto(target[done:]) or 0
        else:
            part = file.read(len(target) - done)
            count = len(part)
            target[done : done + count] = part
        if not count:
            raise ValueError("it ends early")
        done += count


def dtypes(names: Mapping[str, str]) -> dict[str, torch.dtype]:
    """Return the types of torch by other names, without those that this version of torch does not have."""
    return {key: getattr(torch, name) for key, name in names.items() if hasattr(torch, name)}
