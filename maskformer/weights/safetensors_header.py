"""Read the header of a safetensors file: which tensors it has, and where their values are."""

from typing import Any, BinaryIO, cast

from maskformer.untrusted import escaped, parse_json
from maskformer.weights.stored import MAX_TENSORS, Place, StoredTensor, Unreadable, contiguous_strides, dtypes

MAX_HEADER = 8 * 2**20
"""Most bytes of a header, which takes up to 30 times as much memory when it is parsed."""

_TYPES = dtypes(
    {
        "BOOL": "bool",
        **{f"U{size}": f"uint{size}" for size in (8, 16, 32, 64)},
        **{f"I{size}": f"int{size}" for size in (8, 16, 32, 64)},
        **{f"F{size}": f"float{size}" for size in (16, 32, 64)},
        "BF16": "bfloat16",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
    }
)


def is_safetensors(head: bytes) -> bool:
    """Return whether a file that begins with `head` is one of safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 2**40


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, StoredTensor | Unreadable], dict[str, str]]:
    """Return the tensors by name, and the metadata, of a file of `size` bytes.

    Raises:
        ValueError: the header is not valid or too large, or it does not describe all of the file. The message is the
            reason.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    start = 8 + length
    if start > size:
        raise ValueError(f"its header is said to have {length:,} bytes, the file has {size:,}")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER:,}")
    content: object = parse_json(file.read(length))
    if not isinstance(content, dict):
        raise ValueError("its header is not an object")
    header = cast("dict[str, Any]", content)
    metadata: object = header.pop("__metadata__", {})
    texts = cast("dict[str, Any]", metadata)
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in texts.values()):
        raise ValueError("its metadata are not texts")
    if len(header) > MAX_TENSORS:
        raise ValueError(f"it has more than {MAX_TENSORS:,} tensors")
    tensors: dict[str, StoredTensor | Unreadable] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        kind, shape, first, last = _entry(name, entry)
        ranges.append((first, last))
        place = Place(start + first, last - first)
        tensors[name] = (
            StoredTensor(place, _TYPES[kind], 0, shape, contiguous_strides(shape), fills=True)
            if kind in _TYPES
            else Unreadable(f"it is of the type {escaped(kind, 20)}")
        )
    end = 0
    for first, last in sorted(ranges):
        if first != end or last < first:
            raise ValueError("its tensors overlap or leave gaps")
        end = last
    if start + end != size:
        raise ValueError(f"its tensors have {end:,} bytes, but {size - start:,} follow the header")
    return tensors, texts


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        kind, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, ValueError, KeyError):
        raise ValueError(f"the entry of its tensor {escaped(name, 100)} is not valid") from None
    if not isinstance(kind, str) or any(type(number) is not int or number < 0 for number in (first, last, *shape)):
        raise ValueError(f"the entry of its tensor {escaped(name, 100)} is not valid")
    return kind, shape, first, last
