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
from typing import Any, BinaryIO, NoReturn, cast

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


class Dict:
    __slots__ = ("pairs",)

    def __init__(self, pairs: list[Any]) -> None:
        self.pairs = pairs


class Set:
    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class Name:
    """An allowed function or class."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class Ignored:
    """What is of no use to a reader of weights."""

    __slots__ = ()


class Odd:
    """A tensor that cannot be read."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Complex:
    __slots__ = ("parts",)

    def __init__(self, *parts: float) -> None:
        self.parts = parts


class NumberType:
    """A `numpy.dtype`."""

    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="


class Array:
    """A `numpy.ndarray` or one of numpy's scalars; the state is as numpy pickles it."""

    __slots__ = ("state",)

    def __init__(self, *state: Any) -> None:
        self.state = state


class Storage:
    """The values of tensors. The place is not known before all of a legacy file is read."""

    __slots__ = ("kind", "number", "place")

    def __init__(self, kind: str, number: int, place: list[int] | None) -> None:
        self.kind, self.number, self.place = kind, number, place


class Tensor:
    __slots__ = ("kind", "offset", "shape", "storage", "strides")

    def __init__(
        self, storage: Storage, kind: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.storage, self.kind, self.offset, self.shape, self.strides = storage, kind, offset, shape, strides


# ---- what a file may name


def _text(value: Any) -> str:
    if isinstance(value, Data) and value.text is not None:
        return value.text
    raise Damaged("something else where a text is needed")


def _numbers(value: Any) -> tuple[int, ...]:
    numbers = tuple(_sequence(value))
    if len(numbers) <= 64 and all(type(each) is int for each in numbers):
        return numbers
    raise Damaged("something else where a shape is needed")


def _dict(items: Any = ()) -> Dict:
    if isinstance(items, Dict):
        return Dict(list(items.pairs))
    pairs: list[Any] = []
    for item in _sequence(items):
        pair = _sequence(item)
        if len(pair) != 2:
            raise Damaged("something else where a key and a value are needed")
        pairs += pair
    return Dict(pairs)


def _sequence(value: Any) -> list[Any] | tuple[Any, ...]:
    if isinstance(value, list | tuple):
        return cast("list[Any] | tuple[Any, ...]", value)
    raise Damaged("something else where a list is needed")


def _set(items: Any = ()) -> Set:
    return Set(list(_sequence(items)))


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


def _complex(real: Any, imaginary: Any) -> Complex:
    if type(real) in (int, float) and type(imaginary) in (int, float):
        return Complex(real, imaginary)
    raise Damaged("something else where a number is needed")


def _number_type(code: Any, *_: Any) -> NumberType:
    return NumberType(_text(code))


def _array(*_: Any) -> Array:
    return Array()


def _scalar(number: Any, data: Any = None) -> Array:
    return Array(1, (), number, False, data)


def _frombuffer(data: Any, number: Any, shape: Any, order: Any, axes: Any = None) -> Any:
    if axes is not None or _text(order) not in ("C", "F"):
        return Odd("an array whose axes are in another order; numpy.ascontiguousarray() changes it")
    return Array(1, shape, number, _text(order) == "F", data)


def _tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any = None, __: Any = None, metadata: Any = None
) -> Any:
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise Damaged("a tensor without a storage")
    if isinstance(metadata, Dict) and metadata.pairs:
        return Odd("to be negated or conjugated; resolve_neg() and resolve_conj() do this")
    kind = storage.kind
    if kind.startswith("q"):
        return Odd("sparse, quantized or nested")
    return Tensor(storage, kind, offset, _numbers(shape), _numbers(strides))


def _tensor_3(
    storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, kind: Any, metadata: Any = None
) -> Any:
    tensor = _tensor(storage, offset, shape, strides, metadata=metadata)
    if isinstance(tensor, Odd):
        return tensor
    if not isinstance(kind, Name) or not kind.name.startswith("torch.") or not isinstance(tensor, Tensor):
        raise Damaged("a tensor without a type")
    tensor.kind = kind.name.removeprefix("torch.")
    return tensor


def _first(value: Any, *_: Any) -> Any:
    return value


def _sparse(*_: Any) -> Odd:
    return Odd("sparse, quantized or nested")


def _meta(*_: Any) -> Odd:
    return Odd("without values (on the meta device)")


def _rebuilt(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    if not isinstance(function, Name) or function.name == "torch._tensor._rebuild_from_type_v2":
        raise Damaged("a tensor that is made of something else")
    return _call(function, arguments)


def _ignored(*_: Any) -> Ignored:
    return Ignored()


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
    "torch.Size": _numbers,
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
    if not isinstance(function, Name) or function.name not in FUNCTIONS or not isinstance(arguments, tuple):
        raise Damaged("a call of something that is not a function")
    try:
        return FUNCTIONS[function.name](*arguments)
    except TypeError:
        raise Damaged(f"wrong arguments for {function.name}") from None


# ---- pickle


class Budget:
    """Opcodes that are left, in a file and in the files inside it."""

    def __init__(self) -> None:
        self.opcodes = OPCODES


class Unpickler:
    """Interprets pickles, one after the other, in a range of a file. Dictionaries stay pairs, and nothing is called."""

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        end: int,
        budget: Budget,
        storage: Callable[[tuple[Any, ...]], Storage] | None = None,
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

    def push(self, value: Any) -> None:
        """Add a value."""
        self.stack.append(value)

    def duplicate(self) -> None:
        """Push the last value again."""
        self.stack += self.last(1) * 2

    def pop(self) -> Any:
        """Return the last value."""
        if not self.stack:
            raise Damaged("its pickle is not valid")
        return self.stack.pop()

    def last(self, count: int) -> tuple[Any, ...]:
        """Return the last values."""
        if len(self.stack) < count:
            raise Damaged("its pickle is not valid")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    def marked(self) -> list[Any]:
        """Return the values since the last mark."""
        if not self.marks:
            raise Damaged("its pickle is not valid")
        values, self.stack = self.stack, self.marks.pop()
        return values

    def extend(self, values: list[Any], kind: type, attribute: str) -> None:
        """Add values to the list, set or dictionary that is last."""
        target = self.stack[-1] if self.stack else None
        if isinstance(target, Array | NumberType | Name):
            raise Damaged(f"a {type(target).__name__} does not support item assignment")
        if not isinstance(target, kind) or (kind is Dict and len(values) % 2):
            raise Damaged("its pickle is not valid")
        (cast("list[Any]", target) if kind is list else getattr(target, attribute)).extend(values)

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
        if self.storage is not None or not isinstance(arguments, tuple) or len(cast("tuple[Any]", arguments)) != 1:
            raise Refused(_LOAD_FROM_BYTES)
        data = cast("tuple[Any]", arguments)[0]
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
        self.stack.append(target)
        if isinstance(target, Array) and isinstance(state, tuple):
            target.state = cast("tuple[Any, ...]", state)
        elif isinstance(target, NumberType) and isinstance(state, tuple) and len(cast("tuple[Any, ...]", state)) > 1:
            # The first item is a version; the rest describes structured types.
            target.order = _text(cast("tuple[Any, ...]", state)[1])
        elif isinstance(target, Name):
            raise Damaged(f"it sets attributes of {target.name}")
        # Nothing else has attributes here: those of state dicts and tensors are metadata.

    def persistent(self) -> None:
        """Push a storage."""
        name = self.pop()
        if self.storage is None or not isinstance(name, tuple):
            raise Damaged("its pickle refers to something outside")
        self.stack.append(self.storage(cast("tuple[Any, ...]", name)))

    def recall(self, index: int) -> None:
        """Push a remembered value."""
        if index not in self.memo:
            raise Damaged("its pickle is not valid")
        self.stack.append(self.memo[index])

    def remember(self, index: int) -> None:
        """Remember the last value."""
        if not self.stack:
            raise Damaged("its pickle is not valid")
        self.memo[index] = self.stack[-1]

    def mark(self) -> None:
        """Begin values that belong together."""
        self.marks.append(self.stack)
        self.stack = []

    def integer(self, size: int) -> None:
        """Push an integer."""
        if not 0 <= size <= LONGEST_INTEGER:
            raise Damaged(f"its pickle has an integer of more than {LONGEST_INTEGER} bytes")
        self.stack.append(int.from_bytes(self.take(size), "little", signed=True))

    def decimal(self) -> None:
        """Push an integer or a boolean that is written in digits."""
        text = self.line()
        if text in ("00", "01"):
            self.stack.append(text == "01")
        else:
            self.stack.append(int(text.removesuffix("L")))

    def object(self) -> None:
        """Push a new object of the first of the marked values, with the others as arguments."""
        function, *arguments = self.marked() or [None]
        self.stack += [function, tuple(arguments)]
        self.call()

    def named_object(self) -> None:
        """Push a new object of a name, with the marked values as arguments."""
        arguments = tuple(self.marked())
        self.find(self.line(), self.line())
        self.stack.append(arguments)
        self.call()

    def with_keywords(self) -> None:
        """Push a new object that has arguments with names."""
        keywords = self.pop()
        if not isinstance(keywords, Dict) or keywords.pairs:
            raise Damaged("a call with keywords")
        self.call()

    def protocol(self) -> None:
        """Check the version of pickle."""
        if self.take(1)[0] > 5:
            raise Damaged("its pickle is of an unknown version")

    def drop(self) -> None:
        """Drop the last value, or the last mark if none follows it."""
        if self.stack:
            self.stack.pop()
        else:
            self.marked()

    def pairs(self, values: list[Any]) -> None:
        """Push a dictionary."""
        self.stack.append(Dict([]))
        self.extend(values, Dict, "pairs")

    def name_on_stack(self) -> None:
        """Push the name that is the last two values."""
        module, name = self.last(2)
        self.find(_text(module), _text(name))


_LOAD_FROM_BYTES = "torch.storage._load_from_bytes"


def _refuse_extension(_: Unpickler) -> NoReturn:
    raise Refused("an extension of pickle")


def _refuse_buffer(_: Unpickler) -> NoReturn:
    raise Damaged("some of its values are outside the file")


def _push(value: Any) -> Callable[[Unpickler], None]:
    return lambda self: self.push(value)


_ACTIONS: dict[str, Callable[[Unpickler], Any]] = {
    "\x80": Unpickler.protocol,
    "\x95": lambda self: self.take(8),  # FRAME
    "(": Unpickler.mark,
    "0": Unpickler.drop,
    "1": Unpickler.marked,
    "2": Unpickler.duplicate,
    "N": _push(None),
    "\x88": _push(True),
    "\x89": _push(False),
    "I": Unpickler.decimal,
    "L": Unpickler.decimal,
    "J": lambda self: self.push(self.number("i")),
    "K": lambda self: self.push(self.number("B")),
    "M": lambda self: self.push(self.number("H")),
    "\x8a": lambda self: self.integer(self.number("B")),
    "\x8b": lambda self: self.integer(self.number("i")),
    "F": lambda self: self.push(float(self.line())),
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
    ")": lambda self: self.push(()),
    "t": lambda self: self.push(tuple(self.marked())),
    "\x85": lambda self: self.push(self.last(1)),
    "\x86": lambda self: self.push(self.last(2)),
    "\x87": lambda self: self.push(self.last(3)),
    "]": lambda self: self.push([]),
    "l": lambda self: self.push(list(self.marked())),
    "a": lambda self: self.extend([self.pop()], list, ""),
    "e": lambda self: self.extend(self.marked(), list, ""),
    "}": lambda self: self.push(Dict([])),
    "d": lambda self: self.pairs(self.marked()),
    "s": lambda self: self.extend(list(self.last(2)), Dict, "pairs"),
    "u": lambda self: self.extend(self.marked(), Dict, "pairs"),
    "\x8f": lambda self: self.push(Set([])),
    "\x90": lambda self: self.extend(self.marked(), Set, "items"),
    "\x91": lambda self: self.push(Set(self.marked())),
    "c": lambda self: self.find(self.line(), self.line()),
    "\x93": Unpickler.name_on_stack,
    "R": Unpickler.call,
    "\x81": Unpickler.call,
    "\x92": Unpickler.with_keywords,
    "o": Unpickler.object,
    "i": Unpickler.named_object,
    "b": Unpickler.build,
    "Q": Unpickler.persistent,
    "q": lambda self: self.remember(self.number("B")),
    "r": lambda self: self.remember(self.number("I")),
    "\x94": lambda self: self.remember(len(self.memo)),
    "h": lambda self: self.recall(self.number("B")),
    "j": lambda self: self.recall(self.number("I")),
    "\x82": _refuse_extension,
    "\x83": _refuse_extension,
    "\x84": _refuse_extension,
    "\x97": _refuse_buffer,
    "\x98": _refuse_buffer,
}
"""What each opcode does. Those of the text protocol (0) are unknown, except numbers and names."""
_OPCODES = {ord(code): action for code, action in _ACTIONS.items()}


# ---- files


def _parts(name: tuple[Any, ...]) -> tuple[str, str, int]:
    """Return type, key and number of elements of a storage by its persistent id."""
    if len(name) < 5 or _text(name[0]) != "storage" or not isinstance(name[1], Name) or type(name[4]) is not int:
        raise Damaged("its pickle refers to something outside")
    kind = name[1].name.rpartition(".")[2].removesuffix("Storage")
    if kind not in STORAGES or name[4] < 0:
        raise Damaged("a storage of an unknown type")
    return STORAGES[kind], _text(name[2]), name[4]


def load_plain(file: BinaryIO, start: int, end: int, budget: Budget) -> Any:
    """Return the content of a pickle."""
    return Unpickler(file, start, end, budget).load()


def load_legacy(file: BinaryIO, start: int, end: int, budget: Budget, inside: tuple[int, ...] = ()) -> Any:
    """Return the content of a file as torch.save wrote it before 1.6: pickles, then the values of each storage."""
    storages: dict[str, Storage] = {}

    def find(name: tuple[Any, ...]) -> Storage:
        kind, key, number = _parts(name)
        storage = storages.setdefault(key, Storage(kind, number, None))
        if (storage.kind, storage.number) != (kind, number):
            raise Damaged("a storage with two sizes")
        if len(name) > 5 and name[5] is not None:  # torch before 0.4
            raise Damaged("a storage that is a part of another one")
        return storage

    unpickler = Unpickler(file, start, end, budget, find, inside)
    magic, version, system = unpickler.load(), unpickler.load(), unpickler.load()
    if magic != 0x1950A86A20F9469CFC6C or version != 1001:
        raise Damaged("it is not a file of torch.save")
    if isinstance(system, Dict):
        _check_byte_order(system)
    content = unpickler.load()
    for key in _sequence(unpickler.load()):
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


def _check_byte_order(system: Dict) -> None:
    for key, value in zip(system.pairs[::2], system.pairs[1::2], strict=True):
        if isinstance(key, Data) and key.text == "little_endian" and value is not True:
            raise Damaged("it was written on a machine with the other order of bytes")


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
    unpickler: Unpickler

    def find(name: tuple[Any, ...]) -> Storage:
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
    unpickler = Unpickler(file, at, at + size, budget, find)
    return unpickler.load()


LOADERS = {"zip": load_zip, "legacy": load_legacy, "plain": load_plain}


# ---- the description


class Describer:
    """Turns values into what JSON can hold."""

    def __init__(self) -> None:
        self.storages: list[list[int]] = []
        self._index: dict[tuple[int, ...], int] = {}
        self._nodes, self._characters = NODES, CHARACTERS

    def describe(self, value: Any, depth: int = 0) -> Any:
        """Return the description of a value."""
        self._nodes -= 1
        if self._nodes < 0:
            raise Damaged(f"it has more than {NODES:,} values")
        if value is None or type(value) in (bool, int, float):
            return value
        if isinstance(value, Data):
            if value.text is None or value.encoded:
                return ["x"]
            self._characters -= len(value.text)
            if self._characters < 0:
                raise Damaged(f"it has more than {CHARACTERS:,} characters of text")
            return value.text
        if depth > DEPTH:
            raise Damaged("its values are nested too deeply")
        for kind, letter, attribute in _CONTAINERS:
            if isinstance(value, kind):
                items = cast("Iterable[Any]", getattr(value, attribute) if attribute else value)
                return [letter, *[self.describe(each, depth + 1) for each in items]]
        if isinstance(value, Tensor):
            if value.storage.place is None:
                raise Damaged("it does not have the values of all tensors")
            self._nodes -= 8 + 2 * len(value.shape)
            place = tuple(value.storage.place)
            index = self._index.setdefault(place, len(self.storages))
            if index == len(self.storages):
                self.storages.append(value.storage.place)
            return ["T", index, value.kind, value.offset, list(value.shape), list(value.strides)]
        if isinstance(value, Array):
            self._nodes -= 8 + 64
            return _describe_array(value)
        if isinstance(value, Odd):
            return ["!", value.reason]
        if isinstance(value, Complex):
            return ["c", *value.parts]
        return ["x"]


_CONTAINERS: tuple[tuple[type, str, str], ...] = (
    (Dict, "d", "pairs"),
    (tuple, "t", ""),
    (list, "l", ""),
    (Set, "s", "items"),
)


def _describe_array(array: Array) -> list[Any]:
    try:
        _, shape, number, in_fortran_order, data = array.state
        code = f"{number.order}{number.code}" if isinstance(number, NumberType) else ""
        place = data.place() if isinstance(data, Data) else [0, 0]  # objects are in a list
        return ["A", code[:20], list(_numbers(shape)), bool(in_fortran_order), place]
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
        describer = Describer()
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
