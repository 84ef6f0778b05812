"""Describe what a pickled checkpoint holds, as JSON, without calling anything that the file names.

`pickles.py` starts this script in a process of its own with limits on memory and time, so that whatever a file does to
it ends this process alone. It needs nothing but the standard library and starts in milliseconds.

    python -I -S -B unpickle.py {zip|legacy|plain} BYTES_OF_THE_FILE

The script gets no file. It asks for bytes on standard output, a pair of 64-bit numbers (offset, count), and gets them
on standard input. The pair (-1, count) announces the result, JSON of `count` bytes with one of

    "content" and "storages"    the content; each storage is the place of its bytes
    "refused"                   a function or class that no checkpoint needs
    "damaged"                   a reason

A place is [offset, count] in the file or, of bytes that were pickled as text, [offset, count, text offset, text count],
where the text is UTF-8 and becomes the bytes as Latin-1; a count of -1 is all of them. In the content, null, booleans,
numbers and strings are themselves, everything else is a list with a letter in front:

    d  keys and values in turn      T  tensor: storage (its index), type, offset in elements, shape, strides
    l  t  s  list, tuple, set       A  array: numpy's type, shape, whether in Fortran's order, place
    c  complex: real, imaginary     !  what cannot be read, and why
                                    x  what is of no use to a reader of weights
"""

import io
import json
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TypeGuard, cast

MEMORY = 512 * 2**20
"""Bytes of address space."""
CPU_SECONDS = 6
OPCODES = 2_000_000
NODES = 1_000_000
"""Values in the description, each time that they occur."""
DEPTH = 100
CHARACTERS = 8 * 2**20
"""Characters of text in the description."""
LONGEST_TEXT = 2**20
"""Longer texts are not described."""
LONGEST_INTEGER = 256
"""Bytes of an integer."""
REQUEST = 2**16
"""Most bytes asked for at a time; a pipe holds as many."""

STORAGES = {
    "Float": "float32",
    "Double": "float64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
    "Untyped": "uint8",
}
"""Types of elements by the names of storages."""
BYTES_OF = {
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    **dict.fromkeys(("float32", "int32", "uint32", "qint32"), 4),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    "complex128": 16,
}
"""Bytes of an element; 1 of all other types."""


class Refused(Exception):  # what it says is a name
    """The name of a function or class that no checkpoint needs."""


class Damaged(Exception):
    """Why the file cannot be read."""


# A value of a file is None, a boolean, a number, one of the four classes below, or a list with a letter in front, as in
# the description: ["t", 1, 2] is a tuple. Here, a tensor ("T") has a Storage, and an array ("A") the state that numpy
# pickles: version, shape, NumberType, whether in Fortran's order, Data.


class Data:
    """Bytes or text, which stay in the file."""

    __slots__ = ("at", "encoded", "inside", "size", "text", "utf8")

    def __init__(self, at: int, size: int, inside: tuple[int, ...], utf8: bool, text: str | None = None) -> None:
        self.at, self.size, self.inside, self.utf8, self.text = at, size, inside, utf8, text
        self.encoded = False

    def place(self) -> list[int]:
        """Return the place of the bytes."""
        if not self.utf8:
            return [self.at, self.size, *self.inside]
        if self.inside or not self.encoded:
            raise Damaged("text where bytes are needed")
        return [0, -1, self.at, self.size]


class Name:
    """An allowed function or class."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class NumberType:
    """A `numpy.dtype`."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class Storage:
    """The values of tensors. The place is not known before all of a legacy file is read."""

    __slots__ = ("kind", "number", "place")

    def __init__(self, kind: str, number: int, place: list[int] | None) -> None:
        self.kind, self.number, self.place = kind, number, place


def _is(value: Any, letters: str) -> TypeGuard[list[Any]]:
    """Return whether a value is a list with one of these letters in front."""
    return isinstance(value, list) and cast("list[Any]", value)[0] in letters


# ---- what a file may name


def _text(value: Any) -> str:
    if isinstance(value, Data) and value.text is not None:
        return value.text
    raise Damaged("something else where a text is needed")


def _items(value: Any) -> list[Any]:
    if _is(value, "lt"):
        return value[1:]
    raise Damaged("something else where a list is needed")


def _numbers(value: Any) -> list[int]:
    numbers = _items(value)
    if len(numbers) <= 64 and all(type(each) is int for each in numbers):
        return numbers
    raise Damaged("something else where a shape is needed")


def _size(sizes: Any) -> list[Any]:
    return ["t", *_numbers(sizes)]


def _dict(items: Any = None) -> list[Any]:
    if _is(items, "d"):
        return list(items)
    pairs: list[Any] = ["d"]
    for item in _items(["t"] if items is None else items):
        pair = _items(item)
        if len(pair) != 2:
            raise Damaged("something else where a key and a value are needed")
        pairs += pair
    return pairs


def _set(items: Any = None) -> list[Any]:
    return ["s", *_items(["t"] if items is None else items)]


def _bytes(*arguments: Any) -> Data:
    """Return the bytes of `bytes` or `bytearray`; never as many as a number says."""
    if not arguments:
        return Data(0, 0, (), False)
    if isinstance(arguments[0], Data) and len(arguments) == 1 and (not arguments[0].utf8 or arguments[0].encoded):
        return arguments[0]
    if isinstance(arguments[0], Data) and len(arguments) == 2:
        return _encode(*arguments)
    raise Damaged("bytes of something else than bytes")


def _encode(text: Any, encoding: Any) -> Data:
    name = _text(encoding)
    if name not in ("latin1", "latin-1"):
        raise Refused(f"_codecs.encode to {name}")
    if not isinstance(text, Data):
        raise Damaged("something else where a text is needed")
    data = Data(text.at, text.size, text.inside, text.utf8, text.text)
    data.encoded = True
    return data


def _complex(real: Any, imaginary: Any) -> list[Any]:
    if type(real) in (int, float) and type(imaginary) in (int, float):
        return ["c", real, imaginary]
    raise Damaged("something else where a number is needed")


def _number_type(code: Any, *_: Any) -> NumberType:
    return NumberType(_text(code))


def _array(*_: Any) -> list[Any]:
    return ["A"]


def _scalar(number: Any, data: Any = None) -> list[Any]:
    return ["A", 1, ["t"], number, False, data]


def _frombuffer(data: Any, number: Any, shape: Any, order: Any, axes: Any = None) -> list[Any]:
    if axes is not None or _text(order) not in ("C", "F"):
        return ["!", "an array whose axes are in another order; numpy.ascontiguousarray() changes it"]
    return ["A", 1, shape, number, _text(order) == "F", data]


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any = None, __: Any = None, metadata: Any = None
) -> list[Any]:
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise Damaged("a tensor without a storage")
    if _is(metadata, "d") and len(metadata) > 1:
        return ["!", "to be negated or conjugated; resolve_neg() and resolve_conj() do this"]
    if storage.kind.startswith("q"):
        return _sparse()
    return ["T", storage, storage.kind, offset, _numbers(shape), _numbers(strides)]


def _tensor_3(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, kind: Any, metadata: Any = None
) -> list[Any]:
    if not isinstance(kind, Name) or not kind.name.startswith("torch."):
        raise Damaged("a tensor without a type")
    tensor = _tensor(storage, offset, shape, strides, metadata=metadata)
    if tensor[0] == "T":
        tensor[2] = kind.name.removeprefix("torch.")
    return tensor


def _first(value: Any, *_: Any) -> Any:
    return value


def _sparse(*_: Any) -> list[Any]:
    return ["!", "sparse, quantized or nested"]


def _meta(*_: Any) -> list[Any]:
    return ["!", "without values (on the meta device)"]


def _rebuilt(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    if not isinstance(function, Name) or function.name == "torch._tensor._rebuild_from_type_v2":
        raise Damaged("a tensor that is made of something else")
    return _call(function, arguments)


def _ignored(*_: Any) -> list[Any]:
    return ["x"]


def _both(names: Iterable[str], function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """Return the names of builtins in Python 3 and in Python 2."""
    return {f"{module}.{name}": function for module in ("builtins", "__builtin__") for name in names}


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    **_both(("set", "frozenset"), _set),
    **_both(("bytearray", "bytes"), _bytes),
    **_both(("complex",), _complex),
    **_both(("getattr",), _ignored),  # mmengine's logs refer to their methods with it
    "_codecs.encode": _encode,
    "mmengine.logging.history_buffer.HistoryBuffer": _ignored,
    "numpy.ndarray": _array,
    "numpy.dtype": _number_type,
    **{
        f"numpy.{package}.{name}": function  # numpy moved these modules; files contain the old or the new name
        for package in ("core", "_core")
        for name, function in {
            "multiarray._reconstruct": _array,
            "multiarray.scalar": _scalar,
            "numeric._frombuffer": _frombuffer,
        }.items()
    },
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.nn.parameter.Parameter": _first,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _first,
    "torch._utils._rebuild_device_tensor_from_numpy": _first,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _sparse,
    "torch._utils._rebuild_wrapper_subclass": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._tensor._rebuild_from_type_v2": _rebuilt,
    "torch.serialization._get_layout": _ignored,
    "torch.Size": _size,
    "torch.device": _ignored,
}
_WORDS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric", "Tensor"),
)
VALUES = {
    "torch.storage.UntypedStorage",
    "torch.storage.TypedStorage",
    "torch._C._disabled_torch_function_impl",
    *(f"torch.{word}" for word in _WORDS),
    *(
        f"torch.{package}{kind}{what}"
        for package in ("", "cuda.")
        for kind in STORAGES
        for what in ("Storage", "Tensor")
        if kind != "Untyped"
    ),
}
"""Names that are not called: types of tensors, storages and elements."""


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, Name) or function.name not in FUNCTIONS or not _is(arguments, "t"):
        raise Damaged("a call of something that is not a function")
    try:
        return FUNCTIONS[function.name](*arguments[1:])
    except TypeError:
        raise Damaged(f"wrong arguments for {function.name}") from None


# ---- pickle


class Budget:
    """Opcodes that are left, in a file and in the files inside it."""

    def __init__(self) -> None:
        self.opcodes = OPCODES


class _Unpickler:
    """Interprets pickles, one after the other, in a range of a file. Dictionaries stay pairs, and nothing is called."""

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        end: int,
        budget: Budget,
        storage: Callable[[list[Any]], Storage] | None = None,
        inside: tuple[int, ...] = (),
    ) -> None:
        self.file, self.at, self.end, self.budget, self.inside = file, start, end, budget, inside
        self.storage = storage
        self.memo: dict[int, Any] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        file.seek(start)

    def load(self) -> Any:
        """Return the next value."""
        self.memo, self.stack, self.marks = {}, [], []
        budget, opcodes = self.budget, _OPCODES
        while True:
            code = self.take(1)[0]
            if code == 46:  # STOP
                return self.pop()
            budget.opcodes -= 1
            if budget.opcodes < 0:
                raise Damaged(f"its pickle has more than {OPCODES:,} steps")
            try:
                opcode = opcodes[code]
            except KeyError:
                raise Damaged(f"its pickle has the unknown opcode {code:#04x}") from None
            opcode(self)

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.end - self.at:
            raise Damaged("it ends early")
        data = self.file.read(count)
        if len(data) != count:
            raise Damaged("it ends early")
        self.at += count
        return data

    def number(self, layout: str) -> int:
        """Return the next number, in the layout of `struct`."""
        return struct.unpack("<" + layout, self.take(struct.calcsize("<" + layout)))[0]

    def line(self) -> str:
        """Return the next line, of at most 1,000 bytes."""
        line = self.file.readline(min(1000, self.end - self.at))
        if not line.endswith(b"\n"):
            raise Damaged("it ends early")
        self.at += len(line)
        return line[:-1].decode("utf-8", "surrogatepass")

    def data(self, size: int, text: str = "") -> None:
        """Push the next bytes, which are text in an encoding or not."""
        if not 0 <= size <= self.end - self.at:
            raise Damaged("it ends early")
        data = Data(self.at, size, self.inside, text == "utf-8")
        if text and size <= LONGEST_TEXT:
            data.text = self.take(size).decode(text, "surrogatepass" if text == "utf-8" else "strict")
        else:
            self.at += size
            self.file.seek(self.at)
        self.stack.append(data)

    def push(self, *values: Any) -> None:
        self.stack += values

    def pop(self) -> Any:
        return self.last(1)[0]

    def last(self, count: int) -> list[Any]:
        """Return the last values."""
        if len(self.stack) < count:
            raise Damaged("its pickle is not valid")
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Return the values since the last mark."""
        if not self.marks:
            raise Damaged("its pickle is not valid")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def extend(self, letter: str, values: list[Any]) -> None:
        """Add values to the list, set or dictionary that is last."""
        target = self.stack[-1] if self.stack else None
        if not _is(target, letter) or (letter == "d" and len(values) % 2):
            raise Damaged("it adds items to what has none")
        target += values

    def find(self, module: str, name: str) -> None:
        """Push an allowed name."""
        full = f"{module}.{name}"
        if full not in FUNCTIONS and full not in VALUES and full != _LOAD_FROM_BYTES:
            raise Refused(full)
        self.stack.append(Name(full))

    def call(self) -> None:
        """Push the result of an allowed function."""
        function, arguments = self.last(2)
        if isinstance(function, Name) and function.name == _LOAD_FROM_BYTES:
            self.stack.append(self.embedded(arguments))
        else:
            self.stack.append(_call(function, arguments))

    def embedded(self, arguments: Any) -> Storage:
        """Return the storage of a tensor that was pickled without torch.save, a file of torch.save by itself."""
        if self.storage is not None or not _is(arguments, "t") or len(arguments) != 2:
            raise Refused(_LOAD_FROM_BYTES)
        data = arguments[1]
        if not isinstance(data, Data):
            raise Damaged("a storage without bytes")
        at, size, *inside = data.place()
        after, file = self.at, self.file
        if inside:
            file.seek(inside[0])
            content = file.read(inside[1]).decode("utf-8", "surrogatepass").encode("latin1")
            found = load_legacy(io.BytesIO(content), 0, len(content), self.budget, tuple(inside))
        else:
            found = load_legacy(file, at, at + size, self.budget)
        file.seek(after)
        if not isinstance(found, Storage):
            raise Damaged("a storage that is none")
        return found

    def build(self) -> None:
        """Set the state of an object."""
        target, state = self.last(2)
        self.push(target)
        if isinstance(target, Name):
            raise Damaged(f"it sets attributes of {target.name}")
        if _is(target, "A") and _is(state, "t"):
            target[1:] = state[1:]
        elif isinstance(target, NumberType) and _is(state, "t") and len(state) > 2:
            # The first item is a version; the rest describes structured types.
            target.order = _text(state[2])
        # Nothing else has attributes here: those of state dicts and tensors are metadata.

    def persistent(self) -> None:
        """Push a storage."""
        name = self.pop()
        if self.storage is None or not _is(name, "t"):
            raise Damaged("its pickle refers to something outside")
        self.push(self.storage(name[1:]))

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise Damaged("its pickle is not valid")
        self.push(self.memo[index])

    def remember(self, index: int) -> None:
        if not self.stack:
            raise Damaged("its pickle is not valid")
        self.memo[index] = self.stack[-1]

    def mark(self) -> None:
        """Begin values that belong together."""
        self.marks.append(self.stack)
        self.stack = []

    def integer(self, size: int) -> None:
        if not 0 <= size <= LONGEST_INTEGER:
            raise Damaged(f"its pickle has an integer of more than {LONGEST_INTEGER} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def decimal(self) -> None:
        """Push an integer or a boolean that Python 2 wrote in digits."""
        text = self.line()
        self.push(text == "01" if text in ("00", "01") else int(text))

    def protocol(self) -> None:
        if self.take(1)[0] > 5:
            raise Damaged("its pickle is of an unknown version")

    def drop(self) -> None:
        """Drop the last value, or the last mark if none follows it."""
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def dictionary(self, values: list[Any]) -> None:
        self.push(["d"])
        self.extend("d", values)

    def name_on_stack(self) -> None:
        module, name = self.last(2)
        self.find(_text(module), _text(name))


_LOAD_FROM_BYTES = "torch.storage._load_from_bytes"


_ACTIONS: dict[str, Callable[[_Unpickler], Any]] = {
    "\x80": _Unpickler.protocol,
    "\x95": lambda self: self.take(8),  # FRAME
    "(": _Unpickler.mark,
    "0": _Unpickler.drop,
    "1": _Unpickler.marked,
    "2": lambda self: self.push(*self.last(1) * 2),
    "N": lambda self: self.push(None),
    "\x88": lambda self: self.push(True),
    "\x89": lambda self: self.push(False),
    "I": _Unpickler.decimal,
    "J": lambda self: self.push(self.number("i")),
    "K": lambda self: self.push(self.number("B")),
    "M": lambda self: self.push(self.number("H")),
    "\x8a": lambda self: self.integer(self.number("B")),
    "\x8b": lambda self: self.integer(self.number("i")),
    "G": lambda self: self.push(struct.unpack(">d", self.take(8))[0]),
    "U": lambda self: self.data(self.number("B"), "latin1"),  # strings of Python 2
    "T": lambda self: self.data(self.number("i"), "latin1"),
    "C": lambda self: self.data(self.number("B")),
    "B": lambda self: self.data(self.number("I")),
    "\x8e": lambda self: self.data(self.number("Q")),
    "\x96": lambda self: self.data(self.number("Q")),
    "\x8c": lambda self: self.data(self.number("B"), "utf-8"),
    "X": lambda self: self.data(self.number("I"), "utf-8"),
    "\x8d": lambda self: self.data(self.number("Q"), "utf-8"),
    ")": lambda self: self.push(["t"]),
    "t": lambda self: self.push(["t", *self.marked()]),
    "\x85": lambda self: self.push(["t", *self.last(1)]),
    "\x86": lambda self: self.push(["t", *self.last(2)]),
    "\x87": lambda self: self.push(["t", *self.last(3)]),
    "]": lambda self: self.push(["l"]),
    "l": lambda self: self.push(["l", *self.marked()]),
    "a": lambda self: self.extend("l", self.last(1)),
    "e": lambda self: self.extend("l", self.marked()),
    "}": lambda self: self.push(["d"]),
    "d": lambda self: self.dictionary(self.marked()),
    "s": lambda self: self.extend("d", self.last(2)),
    "u": lambda self: self.extend("d", self.marked()),
    "\x8f": lambda self: self.push(["s"]),
    "\x90": lambda self: self.extend("s", self.marked()),
    "\x91": lambda self: self.push(["s", *self.marked()]),
    "c": lambda self: self.find(self.line(), self.line()),
    "\x93": _Unpickler.name_on_stack,
    "R": _Unpickler.call,
    "\x81": _Unpickler.call,
    "b": _Unpickler.build,
    "Q": _Unpickler.persistent,
    "q": lambda self: self.remember(self.number("B")),
    "r": lambda self: self.remember(self.number("I")),
    "\x94": lambda self: self.remember(len(self.memo)),
    "h": lambda self: self.recall(self.number("B")),
    "j": lambda self: self.recall(self.number("I")),
}
"""What each opcode of protocols 2 to 5 does, without those that write objects of other classes."""
_OPCODES = {ord(code): action for code, action in _ACTIONS.items()}


# ---- files


def _parts(name: list[Any]) -> tuple[str, str, int]:
    """Return type, key and number of elements of a storage by its persistent id."""
    if len(name) < 5 or _text(name[0]) != "storage" or not isinstance(name[1], Name) or type(name[4]) is not int:
        raise Damaged("its pickle refers to something outside")
    kind = name[1].name.rpartition(".")[2].removesuffix("Storage")
    if kind not in STORAGES or name[4] < 0:
        raise Damaged("a storage of an unknown type")
    return STORAGES[kind], _text(name[2]), name[4]


def load_plain(file: BinaryIO, start: int, end: int, budget: Budget) -> Any:
    """Return the content of a pickle."""
    return _Unpickler(file, start, end, budget).load()


def load_legacy(file: BinaryIO, start: int, end: int, budget: Budget, inside: tuple[int, ...] = ()) -> Any:
    """Return the content of a file as torch.save wrote it before 1.6: pickles, then the values of each storage."""
    storages: dict[str, Storage] = {}

    def find(name: list[Any]) -> Storage:
        kind, key, number = _parts(name)
        storage = storages.setdefault(key, Storage(kind, number, None))
        if (storage.kind, storage.number) != (kind, number):
            raise Damaged("a storage with two sizes")
        if len(name) > 5 and name[5] is not None:  # torch before 0.4
            raise Damaged("a storage that is a part of another one")
        return storage

    unpickler = _Unpickler(file, start, end, budget, find, inside)
    magic, version, system = unpickler.load(), unpickler.load(), unpickler.load()
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise Damaged("it is not a file of torch.save")
    if _is(system, "d"):
        for key, value in zip(system[1::2], system[2::2], strict=True):
            if isinstance(key, Data) and key.text == "little_endian" and value is not True:
                raise Damaged("it was written on a machine with the other order of bytes")
    content = unpickler.load()
    for key in _items(unpickler.load()):
        storage = storages.get(_text(key))
        if storage is None or storage.place is not None:
            raise Damaged("a storage that no tensor has, or twice the same")
        if unpickler.number("q") != storage.number:
            raise Damaged("a storage with two sizes")
        size = storage.number * _bytes_of(storage.kind)
        if size > end - unpickler.at:
            raise Damaged("it ends early")
        storage.place = [unpickler.at, size, *inside]
        unpickler.at += size
        file.seek(unpickler.at)
    if any(storage.place is None for storage in storages.values()):
        raise Damaged("it does not have the values of all tensors")
    return content


def _bytes_of(kind: str) -> int:
    return BYTES_OF.get(kind, 1)


def load_zip(file: BinaryIO, start: int, end: int, budget: Budget) -> Any:
    """Return the content of a file as torch.save writes it: a zip file with a pickle and the values of each storage."""
    import zipfile  # takes as long to import as all else here

    with zipfile.ZipFile(file) as archive:
        entries: dict[str, Any] = {}
        for entry in archive.infolist():
            if entry.filename in entries:
                raise Damaged("its zip file has two entries of the same name")
            entries[entry.filename] = entry
    folders = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if any(name.count("/") == 1 and name.endswith("/constants.pkl") for name in entries):
        raise Refused("a TorchScript program")
    if len(folders) != 1:
        raise Damaged("its zip file is not one of torch.save")
    (folder,) = folders

    def place(name: str) -> list[int]:
        entry = entries.get(folder + name)
        if entry is None:
            raise Damaged("it does not have the values of all tensors")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 0x1 or entry.compress_size != entry.file_size:
            raise Damaged("its zip file is compressed; save it again with torch.save")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) != 30 or not header.startswith(b"PK\x03\x04"):
            raise Damaged("its zip file is not valid")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        if file.read(name_size).decode("utf-8", "replace") != entry.orig_filename:
            raise Damaged("its zip file is not valid")
        at = entry.header_offset + 30 + name_size + extra_size
        if at + entry.file_size > end:
            raise Damaged("it ends early")
        return [at, entry.file_size]

    if "byteorder" in {name.removeprefix(folder) for name in entries}:
        at, size = place("byteorder")
        file.seek(at)
        if file.read(min(size, 6)) != b"little":
            raise Damaged("it was written on a machine with the other order of bytes")
    storages: dict[str, Storage] = {}
    unpickler: _Unpickler

    def find(name: list[Any]) -> Storage:
        kind, key, number = _parts(name)
        storage = storages.get(key)
        if storage is None:
            at, size = place(f"data/{key}")
            file.seek(unpickler.at)
            if size != number * _bytes_of(kind):
                raise Damaged("a storage with two sizes")
            storage = storages[key] = Storage(kind, number, [at, size])
        elif (storage.kind, storage.number) != (kind, number):
            raise Damaged("a storage with two sizes")
        return storage

    at, size = place("data.pkl")
    unpickler = _Unpickler(file, at, at + size, budget, find)
    return unpickler.load()


LOADERS = {"zip": load_zip, "legacy": load_legacy, "plain": load_plain}


# ---- the description


class _Describer:
    """Turns values into what JSON can hold."""

    def __init__(self) -> None:
        self.storages: list[list[int]] = []
        self._index: dict[tuple[int, ...], int] = {}
        self._nodes, self._characters = NODES, CHARACTERS

    def describe(self, value: Any, depth: int = 0) -> Any:
        self._count(1)
        if isinstance(value, Data):
            return self._text(value)
        if isinstance(value, Name | NumberType | Storage):
            return ["x"]
        if not isinstance(value, list):
            return value
        if depth > DEPTH:
            raise Damaged("its values are nested too deeply")
        node = cast("list[Any]", value)
        letter, *items = node
        if letter in "dlts":
            return [letter, *[self.describe(each, depth + 1) for each in items]]
        if letter == "T":
            return self._tensor(*items)
        return self._array(items) if letter == "A" else node

    def _count(self, nodes: int) -> None:
        self._nodes -= nodes
        if self._nodes < 0:
            raise Damaged(f"it has more than {NODES:,} values")

    def _text(self, data: Data) -> Any:
        if data.text is None or data.encoded:
            return ["x"]
        self._characters -= len(data.text)
        if self._characters < 0:
            raise Damaged(f"it has more than {CHARACTERS:,} characters of text")
        return data.text

    def _tensor(self, storage: Storage, kind: str, offset: int, shape: list[int], strides: list[int]) -> list[Any]:
        if storage.place is None:
            raise Damaged("it does not have the values of all tensors")
        self._count(8 + 2 * len(shape))
        index = self._index.setdefault(tuple(storage.place), len(self.storages))
        if index == len(self.storages):
            self.storages.append(storage.place)
        return ["T", index, kind, offset, shape, strides]

    def _array(self, state: list[Any]) -> list[Any]:
        self._count(8 + 64)
        try:
            _, shape, number, in_fortran_order, data = state
            code = f"{number.order}{number.code}" if isinstance(number, NumberType) else ""
            place = data.place() if isinstance(data, Data) else [0, 0]  # objects are in a list
            return ["A", code[:20], _numbers(shape), in_fortran_order is True, place]
        except (ValueError, Damaged):
            return ["!", "it is not an array of numbers"]


class Remote(io.RawIOBase):
    """The file, whose bytes the other process reads."""

    def __init__(self, size: int) -> None:
        self._size, self._at = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        """Ask for bytes."""
        count = min(len(buffer), self._size - self._at, REQUEST)
        if count <= 0:
            return 0
        os.write(1, struct.pack("<qq", self._at, count))
        done = 0
        while done < count:
            part = os.read(0, count - done)
            if not part:
                os._exit(1)  # the other process has gone
            buffer[done : done + len(part)] = part
            done += len(part)
        self._at += count
        return count


def _limit() -> None:
    for what, limit in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 16),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))


def describe(kind: str, file: BinaryIO, size: int) -> dict[str, Any]:
    """Return the result for a file."""
    try:
        describer = _Describer()
        content = describer.describe(LOADERS[kind](file, 0, size, Budget()))
        return {"content": content, "storages": describer.storages}
    except Refused as error:
        return {"refused": str(error)}
    except Damaged as error:
        return {"damaged": str(error)}
    except MemoryError:
        return {"damaged": f"reading its pickle takes more than {MEMORY >> 20} MiB of memory"}
    except RecursionError:
        return {"damaged": "its values are nested too deeply"}
    except Exception as error:
        return {"damaged": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    _limit()
    kind, size = sys.argv[1], int(sys.argv[2])
    found = json.dumps(describe(kind, io.BufferedReader(Remote(size), REQUEST // 4), size)).encode()
    reply = memoryview(struct.pack("<qq", -1, len(found)) + found)
    while reply:
        reply = reply[os.write(1, reply) :]
    os._exit(0)  # without freeing the values one by one


if __name__ == "__main__":
    main()
