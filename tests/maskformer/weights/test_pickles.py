"""A malicious pickle cannot do anything to this process."""

import codecs
import io
import pickle
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._utils import _rebuild_tensor_v2

from maskformer.weights import read


class Planted:
    """Pickles as any call, with any state."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def rebuilder(value: Any, protocol: int = 2) -> Any:
    return value.__reduce_ex__(protocol)[0]


OBJECTS = Planted(np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0))
"""A data type that claims to hold no references, which numpy accepts."""
SET_ITEM = b"K\x00U\x01xs."
ADDRESS = b"A" * 8
POINTERS = {
    "ndarray": Planted(np.ndarray, ((1,), np.dtype("O"), bytearray(ADDRESS))),
    "reconstruct": Planted(rebuilder(np.array(0)), (np.ndarray, (0,), b"b"), (1, (1,), OBJECTS, False, ADDRESS)),
    "frombuffer": Planted(rebuilder(np.array(0), 5), (bytearray(ADDRESS), OBJECTS, (1,), "C")),
}


def test_numpy_follows_no_pointer_of_a_file(tmp_path: Path) -> None:
    """Setting an item of an object array releases the old item: here, an object at 0x4141414141414141."""
    for name, array in POINTERS.items():
        (tmp_path / f"{name}.item").write_bytes(pickle.dumps(array, 5)[:-1] + SET_ITEM)
        (tmp_path / f"{name}.model").write_bytes(pickle.dumps({"model": {"a": array}}, 5))
    files = sorted(map(str, tmp_path.iterdir()))
    code = """
import sys
from maskformer.weights import read
for path in sys.argv[1:]:
    try:
        read(path)
    except ValueError as error:
        print(error)
"""
    child = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr) == (0, "")
    lines = child.stdout.splitlines()
    assert len(lines) == len(files)
    for path, line in zip(files, lines, strict=True):
        reason = "damaged.*it adds items to what has none|not used: its tensor a cannot be read"
        assert re.match(rf"{path} is ({reason})", line)


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "torch._utils _rebuild_tensor_v2",
        "torch.storage _load_from_bytes",
        "_codecs encode",
        "numpy dtype",
        "numpy ndarray",
        "numpy.core.multiarray scalar",
        "collections OrderedDict",
    ],
)
def test_a_file_sets_no_attribute_of_what_it_names(name: str, slots: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rebuild_tensor_v2, "__defaults__", _rebuild_tensor_v2.__defaults__)
    attributes = {"__defaults__": ("planted",)}
    state = pickle.dumps((None, attributes) if slots else attributes, 2)[2:-1]
    data = b"\x80\x02c" + name.replace(" ", "\n").encode() + b"\n" + state + b"b."
    with pytest.raises(ValueError, match=rf"is damaged, .*it sets attributes of {name.replace(' ', '.')}\)"):
        read(io.BytesIO(data))
    assert _rebuild_tensor_v2.__defaults__ == (None,)


def test_attributes_of_dictionaries_do_nothing() -> None:
    """A file can set them in torch's reader."""
    for write in (torch.save, pickle.dump):
        items = iter([("a", torch.zeros(2))])
        file = io.BytesIO()
        write({"model": Planted(OrderedDict, (), {"items": 5, "get": 5}, None, items)}, file)
        file.seek(0)
        assert read(file).tensors["a"].tolist() == [0, 0]


def test_only_the_encoding_of_bytes() -> None:
    data = pickle.dumps({"model": Planted(codecs.encode, ("x", "uu\n" * 500))}, 2)
    with pytest.raises(ValueError, match=r"it holds _codecs\.encode to uu\\nuu") as error:
        read(io.BytesIO(data))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


ARRAYS = {
    "C": np.arange(6, dtype=np.float32).reshape(2, 3),
    "Fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.arange(6, dtype=">i2").reshape(3, 2),
    "half": np.array([0.5, -2], np.float16),
    "bool": np.array([True, False]),
    "byte": np.array([1, 255], np.uint8),
    "one": np.array(7),
    "scalar": np.float32(0.25),
    "none": np.zeros((0, 3), np.float32),
}


@pytest.mark.parametrize("protocol", range(2, 6))
def test_arrays_are_what_numpy_reads(protocol: int) -> None:
    known = {name: array for name, array in ARRAYS.items() if protocol > 2 or name != "none"}
    data = pickle.dumps({"model": known}, protocol)
    expected = pickle.loads(data)["model"]
    for name, tensor in read(io.BytesIO(data)).tensors.items():
        array = expected.pop(name)
        assert tensor.numpy().dtype == array.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert not expected


FLOAT = Planted(np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 0))


def array(*state: Any) -> Planted:
    return Planted(rebuilder(np.array(0)), (np.ndarray, (0,), b"b"), state)


ODD = {
    "its numpy data type '<f16' is not one of numbers": np.zeros(2, np.longdouble),
    "its numpy data type '|O8' is not one of numbers": np.array([None, 1]),
    "its numpy data type '<c8' is not one of numbers": np.zeros(2, np.complex64),
    "its 8 bytes do not fit its shape": array(1, (3,), FLOAT, False, b"A" * 8),
    "its 4 bytes do not fit its shape": array(1, (-1, -1), FLOAT, False, b"A" * 4),
    "it is not an array of numbers": array(1, ("x",), FLOAT, False, b"A" * 4),
    "out of bounds": Planted(_rebuild_tensor_v2, (torch.zeros(2)._typed_storage(), 0, (2,), (-9,), False, {})),
}


@pytest.mark.parametrize("message", ODD)
def test_arrays_that_cannot_be_read_are_named(message: str) -> None:
    message, value = message.replace("out of bounds", ""), ODD[message]
    with pytest.raises(
        ValueError, match=rf"^The file is not used: its tensor a\.b cannot be read \(.*{message}"
    ) as error:
        read(io.BytesIO(pickle.dumps({"model": {"a.b": value}}, 4)))
    assert "\n" not in str(error.value)


def saved(content: Any, **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_is_to_be_negated_is_refused(zipped: bool) -> None:
    """Its storage has other values: dropping the mark would change the weights silently."""
    negated = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])).conj().imag
    assert negated.is_neg()
    with pytest.raises(ValueError, match=r"to be negated or conjugated"):
        read(saved({"w": negated}, _use_new_zipfile_serialization=zipped))
    assert torch.equal(read(saved({"w": negated.resolve_neg()})).tensors["w"], torch.tensor([-3.0, -4.0]))


def test_arrays_pickled_as_much_text_are_read() -> None:
    """Protocol 2 has no bytes, so arrays are text: a ResNet has a hundred megabytes of it."""
    arrays = {f"w{number}": np.full(60_000, number, np.float32) for number in range(60)}
    found = read(io.BytesIO(pickle.dumps(arrays, 2))).tensors
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


def test_an_array_with_permuted_axes_is_refused() -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(1, 0, 2)
    data = pickle.dumps({"w": array}, 5)
    try:
        assert np.array_equal(read(io.BytesIO(data)).tensors["w"].numpy(), array)
    except ValueError as error:
        assert "ascontiguousarray" in str(error)  # noqa: PT017  # numpy decides how it pickles them


def test_many_references_to_a_tensor_are_refused() -> None:
    tensor = torch.zeros(1)
    with pytest.raises(ValueError, match=r"more than 1,000,000 values"):
        read(saved({"w": tensor, "more": [tensor] * 150_000}))


def test_a_local_header_of_another_name_is_refused() -> None:
    data = saved({"w": torch.zeros(3)}).getvalue()
    place = data.index(b"data/0")
    with pytest.raises(ValueError, match=r"zip file is not valid"):
        read(io.BytesIO(data[:place] + b"data/1" + data[place + 6 :]))
