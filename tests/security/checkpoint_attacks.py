"""Hostile checkpoints, made by code. Each attack writes a file or a folder below a folder and returns its path.

Attacks that would run code create a file named `witness` in that folder if they succeed.
"""

import io
import json
import os
import stat
import struct
import time
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import maskformer
from maskformer import ModelConfig, Taxonomy, build_model, weights
from maskformer.checkpoint import load
from maskformer.weights.description import describe
from pipelines.checkpoints import pretrained, state
from pipelines.checkpoints.state import TrainingState, step_folder
from pipelines.config.recipes import DEMO
from pipelines.storage import locate, sha256

Attack = Callable[[Path], Path]

# ---- what is attacked; each returns something short


def read_weights(path: str) -> list[str]:
    found = weights.read(path).tensors
    assert sum(tensor.nbytes for tensor in found.values()) <= 2 * _bytes(Path(path))
    return [f"{name} {tuple(tensor.shape)} {tensor.sum()}" for name, tensor in found.items()][:5]


def load_model(path: str) -> str:
    return type(load(path, "cpu")).__name__


def load_state(path: str) -> int:
    return state.load(locate(path)).step


def open_model(path: str) -> int:
    return pretrained.open_model(path, maskformer.taxonomy.COCO).step


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def try_all(function: Callable[[str], Any], paths: list[str], output: str) -> int:
    """Write, as JSON, how each call ended (`result`, `refused` or `error`), its text and its seconds."""
    ends = [try_one(function, path) for path in paths]
    Path(output).write_text(json.dumps(ends))
    return len(ends)


def try_one(function: Callable[[str], Any], path: str) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        kind, text = "result", repr(function(path))
    except ValueError as error:
        kind, text = "refused", str(error)
    except Exception as error:
        kind, text = "error", f"{type(error).__name__}: {str(error)[:200]!r}"
    return kind, text[:3000], time.monotonic() - start


# ---- pickles, opcode by opcode


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def numbers(values: tuple[int, ...]) -> bytes:
    return tuple_of(*map(integer, values))


def call(name: str, *arguments: bytes) -> bytes:
    return named(name) + tuple_of(*arguments) + b"R"


def storage(kind: str = "Float", key: str = "0", elements: int = 4) -> bytes:
    return tuple_of(text("storage"), named(f"torch.{kind}Storage"), text(key), text("cpu"), integer(elements)) + b"Q"


def tensor(
    where: bytes | None = None,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    metadata = named("collections.OrderedDict") + b")R"
    parts = where or storage(), integer(offset), numbers(shape), numbers(strides), b"\x89", metadata
    return call("torch._utils._rebuild_tensor_v2", *parts)


def model(*values: bytes, names: tuple[str, ...] = ("a", "b", "c")) -> bytes:
    """Return a pickle of {"a": first value, "b": second value, ...}."""
    return pickled(b"}(" + b"".join(text(name) + value for name, value in zip(names, values, strict=False)) + b"u")


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


VALUES = struct.pack("<4f", 1, 2, 3, 4)


def zipped(content: bytes, values: Mapping[str, bytes] | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        for key, data in ({"0": VALUES} if values is None else values).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", b"3\n")
    return file.getvalue()


def legacy(content: bytes, keys: bytes = b"]" + text("0") + b"a", values: bytes | None = None) -> bytes:
    head = pickled(integer(0x1950A86A20F9469CFC6C)) + pickled(integer(1001)) + pickled(b"}")
    return head + content + pickled(keys) + (struct.pack("<q", 4) + VALUES if values is None else values)


def array(number: bytes, shape: tuple[int, ...], data: bytes) -> bytes:
    """Return a numpy array; `data` is the opcodes of its bytes."""
    fresh = call("numpy.core.multiarray._reconstruct", named("numpy.ndarray"), numbers((0,)), b"C\x01b")
    return fresh + tuple_of(integer(1), numbers(shape), number, b"\x89", data) + b"b"


def number_type(code: str, order: str = "<") -> bytes:
    end = integer(-1) * 2 + integer(0)
    return call("numpy.dtype", text(code), b"\x89", b"\x88") + tuple_of(integer(3), text(order), b"NNN", end) + b"b"


FLOATS = number_type("f4")


def doubled(start: bytes, wrap: bytes, times: int) -> bytes:
    """Return a value whose size doubles with each of `times` steps; `wrap` makes one value of two."""
    return start + b"".join(b"2" + wrap for _ in range(times))


# ---- files of weights


def file(content: Callable[[], bytes], name: str = "weights.pth") -> Attack:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content())
        return folder / name

    return write


def _in_every_format(name: str, content: Callable[[], bytes]) -> dict[str, Attack]:
    return {
        f"{name}, plain": file(content),
        f"{name}, zip": file(lambda: zipped(content())),
        f"{name}, legacy": file(lambda: legacy(content())),
    }


def pickle_bombs() -> dict[str, Attack]:
    bombs: dict[str, Callable[[], bytes]] = {
        "tuples nested 1e6 deep": lambda: pickled(b"K\x01" + b"\x85" * 10**6),
        "a key of tuples nested 1e5 deep": lambda: pickled(b"}" + b"K\x01" + b"\x85" * 10**5 + b"Ns"),
        "lists nested 1e5 deep": lambda: pickled(b"]" * 10**5 + b"a" * (10**5 - 1)),
        "dictionaries nested 1e5 deep": lambda: pickled((b"}" + text("k")) * 10**5 + b"N" + b"s" * 10**5),
        "a tuple doubled 60 times": lambda: pickled(doubled(b"K\x01", b"\x86", 60)),
        "a set of a tuple doubled 60 times": lambda: pickled(b"\x8f(" + doubled(b"K\x01", b"\x86", 60) + b"\x90"),
        "a frozen set doubled 40 times": lambda: pickled(doubled(b"(K\x01\x91", b"\x86q\x00(h\x00h\x00\x91", 40)),
        "a text of 1 MB, 100,000 times": lambda: pickled(text("x" * 10**6) + b"q\x00]q\x01(" + b"h\x00" * 10**5 + b"e"),
        "a list in itself": lambda: pickled(b"]q\x00h\x00a"),
        "a dictionary in itself": lambda: pickled(b"}q\x00" + text("k") + b"h\x00s"),
        "3 million steps": lambda: pickled(b"]" + b"N0" * 1_500_000),
        "2 million values": lambda: pickled(b"](" + b"N" * 1_990_000 + b"e"),
        "a memo of 500,000 places": lambda: pickled(
            b"N" + b"".join(b"r" + struct.pack("<I", 2**31 + n) for n in range(500_000))
        ),
        "integers with equal hashes": lambda: pickled(
            b"}(" + b"".join(integer((2**61 - 1) * n) + b"N" for n in range(1, 100_000)) + b"u"
        ),
        "tuples with equal hashes": lambda: pickled(
            b"}(" + b"".join(integer((2**61 - 1) * n) + b"\x85N" for n in range(1, 50_000)) + b"u"
        ),
        "an integer of 1 MB": lambda: pickled(b"\x8b" + struct.pack("<i", 2**20) + b"\x01" * 2**20),
        "an integer of 4,000 digits": lambda: pickled(b"I" + b"9" * 4000 + b"\n"),
        "bytearray of a number": lambda: model(call("builtins.bytearray", integer(2**40))),
        "bytes of a number": lambda: model(call("builtins.bytes", integer(2**40))),
        "bytearrays of numbers": lambda: pickled(b"](" + call("builtins.bytearray", integer(2**20)) * 2000 + b"e"),
        "encoding 1 MB 20,000 times": lambda: pickled(
            text("x" * 2**20)
            + b"q\x000]("
            + (named("_codecs.encode") + b"(h\x00" + text("latin1") + b"tR") * 20_000
            + b"e"
        ),
        "encoding to another encoding": lambda: model(call("_codecs.encode", text("x"), text("uu"))),
        "a text longer than the file": lambda: pickled(b"\x8d" + struct.pack("<Q", 2**62) + b"x"),
        "bytes longer than the file": lambda: pickled(b"\x8e" + struct.pack("<Q", 2**63) + b"x"),
        "a negative length": lambda: pickled(b"T" + struct.pack("<i", -5) + b"x"),
        "a frame longer than the file": lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"\x85\x85\x85",
        "no stop": lambda: b"\x80\x02" + b"N" * 100,
        "an empty stack": lambda: pickled(b"" + b"0" * 50),
        "no mark": lambda: pickled(b"tetu"),
        "an unknown memo": lambda: pickled(b"h\x07"),
        "an unknown opcode": lambda: pickled(b"\xff"),
        "protocol 200": lambda: b"\x80\xc8N.",
        "a buffer outside the file": lambda: pickled(b"\x97"),
        "an unfinished name": lambda: b"\x80\x02cos",
        "a name of 1 MB": lambda: pickled(b"c" + b"x" * 10**6 + b"\nsystem\n"),
        "a name of surrogates": lambda: pickled(text("\ud800os") + text("\x1b[2Jsystem") + b"\x93"),
        "a key that is no text": lambda: model(tensor(), names=("x\x1b[31m\n",)),
        "a key of 1 MB": lambda: model(tensor(), names=("x" * 10**6,)),
        "a persistent id that is no tuple": lambda: pickled(text("storage") + b"Q"),
        "a persistent id of nonsense": lambda: pickled(tuple_of(text("storage"), b"N", b"N", b"N", b"N") + b"Q"),
        "a persistent id of nested tuples": lambda: pickled(b"N" + b"\x85" * 10**5 + b"Q"),
        "items of a text": lambda: pickled(text("x") + b"(NNu"),
        "items of a number": lambda: pickled(b"K\x01(NNe"),
        "an attribute of a list": lambda: pickled(b"]" + b"}" + text("append") + b"Ns" + b"b"),
    }
    attacks: dict[str, Attack] = {}
    for name, content in bombs.items():
        attacks |= {f"{name}, plain": file(content)}
    chosen = ("tuples nested 1e6 deep", "a tuple doubled 60 times", "3 million steps", "bytearray of a number")
    chosen += ("encoding 1 MB 20,000 times", "a set of a tuple doubled 60 times", "a persistent id of nonsense")
    for name in chosen:
        attacks |= _in_every_format(name, bombs[name])
    return attacks


TRUE_EX = b"\x88s\x92"  # the keyword is true, and NEWOBJ_EX


def code() -> dict[str, Attack]:
    """Return attempts to run code through every opcode that could call something."""

    def touch(folder: Path) -> bytes:
        return text(f"touch {folder / 'witness'}")

    def source(folder: Path) -> bytes:
        return text(f"open({str(folder / 'witness')!r}, 'w')")

    attempts: dict[str, Callable[[Path], bytes]] = {
        "REDUCE": lambda folder: call("os.system", touch(folder)),
        "REDUCE posix": lambda folder: call("posix.system", touch(folder)),
        "eval": lambda folder: call("builtins.eval", source(folder)),
        "exec of Python 2": lambda folder: call("__builtin__.exec", source(folder)),
        "STACK_GLOBAL": lambda folder: text("os") + text("system") + b"\x93" + tuple_of(touch(folder)) + b"R",
        "INST": lambda folder: b"(" + touch(folder) + b"ios\nsystem\n",
        "OBJ": lambda folder: b"(" + named("os.system") + touch(folder) + b"o",
        "NEWOBJ": lambda folder: named("subprocess.Popen") + tuple_of(touch(folder), b"K\x00", b"N") + b"\x81",
        "NEWOBJ_EX": lambda folder: named("subprocess.Popen") + tuple_of(touch(folder)) + b"}" + text("a") + TRUE_EX,
        "NEWOBJ_EX of an allowed class": lambda folder: named("collections.OrderedDict") + b")}" + text("x") + TRUE_EX,
        "BUILD with a dictionary": lambda folder: named("collections.OrderedDict") + b")R}" + text("__setstate__")
        + named("os.system") + b"sb" + touch(folder) + b"b",
        "BUILD of a function": lambda folder: named("_codecs.encode") + b"}" + text("__code__") + b"Nsb",
        "EXT1": lambda folder: b"\x82\x01" + tuple_of(touch(folder)) + b"R",
        "EXT4": lambda folder: b"\x84\x01\x00\x00\x00" + tuple_of(touch(folder)) + b"R",
        "getattr": lambda folder: call("builtins.getattr", named("collections.OrderedDict"), text("fromkeys"))
        + tuple_of(touch(folder)) + b"R",
        "a chain of getattr": lambda folder: call(
            "builtins.getattr", call("builtins.getattr", named("numpy.ndarray"), text("__init__")), text("__globals__")
        ) + tuple_of(touch(folder)) + b"R",
        "a dotted name": lambda folder: text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93",
        "torch.load": lambda folder: call("torch.load", text(str(folder / "weights.pth"))),
        "torch.hub": lambda folder: call("torch.hub.load", text("a/b"), text("c")),
        "torch.classes": lambda folder: call("torch._classes._Classes.load_library", touch(folder)),
        "torch.jit": lambda folder: call("torch.jit._script.RecursiveScriptModule._construct", touch(folder)),
        "torch's _rebuild_from_type": lambda folder: call(
            "torch._tensor._rebuild_from_type_v2", named("os.system"), b"N", tuple_of(touch(folder)), b"N"
        ),
        "torch's _rebuild_from_type of itself": lambda folder: call(
            "torch._tensor._rebuild_from_type_v2", named("torch._tensor._rebuild_from_type_v2"), b"N", b")", b"N"
        ),
        "pickle.loads": lambda folder: call("pickle.loads", b"C\x01."),
        "_pickle.loads": lambda folder: call("_pickle.loads", b"C\x01."),
        "copyreg": lambda folder: call("copyreg._reconstructor", named("os.system"), b"N", b"N"),
        "numpy's load": lambda folder: call("numpy.load", text("x"), b"N", b"\x88"),
        "functools": lambda folder: call("functools.partial", named("os.system"), touch(folder)),
        "runpy": lambda folder: call("runpy._run_code", source(folder), b"}"),
        "logging": lambda folder: call("logging.config.dictConfig", b"}"),
        "a plain module": lambda folder: named("antigravity.geohash"),
        "a call of a text": lambda folder: text("os.system") + tuple_of(touch(folder)) + b"R",
        "a call of a tensor": lambda folder: tensor() + tuple_of(touch(folder)) + b"R",
        "yacs": lambda folder: named("yacs.config.CfgNode") + b")\x81",
        "argparse": lambda folder: named("argparse.Namespace") + b")\x81",
    }  # fmt: skip

    def write(content: Callable[[Path], bytes], wrap: Callable[[bytes], bytes]) -> Attack:
        def attack(folder: Path) -> Path:
            (folder / "weights.pth").write_bytes(wrap(model(b"N", content(folder))))
            return folder / "weights.pth"

        return attack

    attacks = {f"code by {name}": write(content, bytes if number % 2 else zipped)
               for number, (name, content) in enumerate(attempts.items())}  # fmt: skip
    inside = lambda data: pickled(call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(data)) + data))  # noqa: E731
    for name in ("REDUCE", "STACK_GLOBAL", "INST"):
        attacks[f"code by {name}, legacy"] = write(attempts[name], legacy)
        attacks[f"code by {name}, in a storage"] = write(attempts[name], lambda data: inside(legacy(data)))
    nested = lambda data: inside(legacy(inside(legacy(data))))  # noqa: E731
    attacks["storages in storages"] = write(attempts["REDUCE"], nested)
    return attacks


def tensors() -> dict[str, Attack]:
    """Return tensors that do not fit their bytes."""

    def same(shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> bytes:
        return zipped(model(tensor(None, offset, shape, strides)))

    def embedded(data: bytes) -> bytes:
        return call("torch.storage._load_from_bytes", b"B" + struct.pack("<I", len(data)) + data)

    found: dict[str, Callable[[], bytes]] = {
        "strides of 0": lambda: same((2**40 - 1, 4), (0, 1)),
        "strides of 0 in a loop": lambda: same((10**6, 10**6, 4), (0, 0, 1)),
        "small strides": lambda: same((2, 4), (0, 1)),
        "negative strides": lambda: same((4,), (-1,), 3),
        "a negative offset": lambda: same((4,), (1,), -4),
        "a negative size": lambda: same((-4,), (1,)),
        "two negative sizes": lambda: same((-2, -2), (2, 1)),
        "a huge offset": lambda: same((4,), (1,), 2**62),
        "a huge size": lambda: same((2**62,), (1,)),
        "a product beyond 64 bits": lambda: same((2**32, 2**32, 4), (2**34, 4, 1)),
        "huge and no elements": lambda: same((0, 2**62), (1, 1)),
        "1,000 dimensions": lambda: same((1,) * 1000, (1,) * 1000),
        "more strides than dimensions": lambda: same((4,), (1, 1)),
        "a size that is a text": lambda: zipped(
            model(call("torch._utils._rebuild_tensor_v2", storage(), integer(0), tuple_of(text("4")), numbers((1,))))
        ),
        "a size that is a boolean": lambda: zipped(
            model(call("torch._utils._rebuild_tensor_v2", storage(), integer(0), tuple_of(b"\x88"), numbers((1,))))
        ),
        "a storage of more elements than its bytes": lambda: zipped(model(tensor(storage(elements=2**60)))),
        "a storage of fewer elements than its bytes": lambda: zipped(model(tensor(storage(elements=1)))),
        "a storage of negative elements": lambda: zipped(model(tensor(storage(elements=-4)))),
        "a storage of two types": lambda: zipped(model(tensor(), tensor(storage("Int")))),
        "a storage of an unknown type": lambda: zipped(model(tensor(storage("Evil")))),
        "a missing storage": lambda: zipped(model(tensor()), {}),
        "a storage of another folder": lambda: zipped(model(tensor(storage(key="../version")))),
        "a storage named by a path": lambda: zipped(model(tensor(storage(key="/etc/passwd")))),
        "deflated": lambda: zipped(model(tensor()), compression=zipfile.ZIP_DEFLATED),
        "deflated storage of 128 MB": _deflated_bomb,
        "compressed with LZMA": lambda: zipped(model(tensor()), compression=zipfile.ZIP_LZMA),
        "overlapping storages": _overlapping,
        "two entries of one name": _twice,
        "two pickles": lambda: zipped(model(tensor())).replace(b"archive/version", b"second/data.pkl"),
        "100,000 entries": _many_entries,
        "a directory count that is wrong": lambda: _end(zipped(model(tensor())), 10, struct.pack("<HH", 65535, 65535)),
        "a directory outside the file": lambda: _end(zipped(model(tensor())), 16, struct.pack("<I", 2**31)),
        "a directory that is huge": lambda: _end(zipped(model(tensor())), 12, struct.pack("<I", 2**31)),
        "no directory": lambda: zipped(model(tensor()))[:-22],
        "a zip file without a pickle": lambda: zipped(model(tensor())).replace(b"data.pkl", b"data.pkx"),
        "encrypted": lambda: zipped(model(tensor())).replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
        ),
        "TorchScript": lambda: _script(),
        "legacy without storages": lambda: legacy(model(tensor()), b"]", b""),
        "legacy with a storage twice": lambda: legacy(
            model(tensor()), b"](" + text("0") * 2 + b"e", 2 * (struct.pack("<q", 4) + VALUES)
        ),
        "legacy with an unknown storage": lambda: legacy(model(tensor()), b"](" + text("0") + text("1") + b"e"),
        "legacy of another size": lambda: legacy(model(tensor()), values=struct.pack("<q", 2**60) + VALUES),
        "legacy of a huge size": lambda: legacy(
            model(tensor(storage(elements=2**60))), values=struct.pack("<q", 2**60) + VALUES
        ),
        "legacy without values": lambda: legacy(model(tensor()), values=struct.pack("<q", 4)),
        "legacy of keys that are no list": lambda: legacy(model(tensor()), b"K\x05"),
        "an array of objects": lambda: model(array(number_type("O8", "|"), (1,), b"C\x08" + b"A" * 8)),
        "an array of pointers in numbers": lambda: model(array(number_type("V8", "|"), (1,), b"C\x08" + b"A" * 8)),
        "an array with fewer bytes": lambda: model(array(FLOATS, (2**40,), b"C\x04" + b"A" * 4)),
        "an array with negative sizes": lambda: model(array(FLOATS, (-1, -1), b"C\x04" + b"A" * 4)),
        "an array of nested tuples": lambda: model(array(FLOATS, (1,), b"N" + b"\x85" * 10**5)),
        "an array without a type": lambda: model(array(b"N", (1,), b"C\x04" + b"A" * 4)),
        "an array in itself": lambda: model(call("numpy.core.multiarray.scalar", b"N", b"Nq\x01") + b"q\x00h\x00b"),
        "a storage in bytes that ends early": lambda: model(tensor(embedded(b"\x80\x02N."))),
        "a storage in bytes without values": lambda: model(tensor(embedded(legacy(pickled(storage()), b"]", b"")))),
        "a sparse tensor": lambda: _saved({"a": torch.eye(3).to_sparse()}),
        "a tensor of the meta device": lambda: _saved({"a": torch.zeros(3, device="meta")}),
        "10,001 tensors": lambda: zipped(
            pickled(b"}(" + b"".join(text(f"n{n}") + tensor(shape=(1,)) for n in range(10_001)) + b"u")
        ),
        "1,000 tensors of one storage": lambda: zipped(
            pickled(b"}(" + b"".join(text(f"n{n}") + tensor(shape=(2**16,)).replace(
                storage(), storage(elements=2**16)) for n in range(1000)) + b"u"), {"0": bytes(2**18)}
        ),
        "no bytes": lambda: b"",
        "zeros": lambda: bytes(10**6),
        "a page": lambda: b"<html>",
        "big endian": lambda: zipped(model(tensor())).replace(b"little", b"bigbig"),
    }  # fmt: skip
    return {name: file(content) for name, content in found.items()}


def _saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _deflated_bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", model(tensor(storage(elements=2**28))), zipfile.ZIP_STORED)
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(2**7):
                entry.write(bytes(2**20))
    return buffer.getvalue()


def _overlapping() -> bytes:
    """Return a file whose second storage is the first one, moved by 4 bytes, with a header of its own inside it."""
    inner = b"PK\x03\x04" + bytes(22) + struct.pack("<HH", 0, 0) + bytes(34)
    data = zipped(
        model(tensor(storage(elements=16), shape=(16,)), tensor(storage(key="1", elements=16), shape=(16,))),
        {"0": inner, "1": bytes(64)},
    )
    first = data.index(inner)
    entry = data.rindex(b"archive/data/1") - 46 + 42  # the place of its header, in the directory
    return data[:entry] + struct.pack("<I", first) + data[entry + 4 :]


def _twice() -> bytes:
    data = zipped(model(tensor()), {"0": VALUES, "1": VALUES})
    return data.replace(b"archive/data/1", b"archive/data/0")


def _many_entries() -> bytes:
    name = b"archive/data/%06d"
    local = b"PK\x03\x04" + bytes(26)
    entry = b"PK\x01\x02" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 33, 0, 0, 0, 19, 0, 0, 0, 0, 0, 0)
    directory = b"".join(entry + name % number for number in range(100_000))
    count = struct.pack("<HHHHLLH", 0, 0, 65535, 65535, len(directory), len(local), 0)
    return local + directory + b"PK\x05\x06" + count


def _end(data: bytes, at: int, value: bytes) -> bytes:
    """Replace bytes of the record that ends a zip file."""
    start = len(data) - 22 + at
    return data[:start] + value + data[start + len(value) :]


def _script() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", model(tensor()))
        archive.writestr("archive/constants.pkl", pickled(b")"))
        archive.writestr("archive/code/__torch__.py", "import os")
        archive.writestr("archive/data/0", VALUES)
    return buffer.getvalue()


def truncated() -> dict[str, Attack]:
    whole = {
        "zip": zipped(model(tensor(), tensor(storage(key="1"))), {"0": VALUES, "1": VALUES}),
        "legacy": legacy(model(tensor())),
        "plain": model(array(FLOATS, (4,), b"C\x10" + VALUES)),
        "safetensors": safetensors.torch.save({"a": torch.arange(4.0)}),
    }
    return {
        f"{kind} cut after {share:.0%}": file(lambda data=data, share=share: data[: int(share * len(data))])
        for kind, data in whole.items()
        for share in (0.2, 0.45, 0.7, 0.99)
    }


def header(entries: object, values: bytes = VALUES, length: int | None = None) -> bytes:
    """Return a safetensors file."""
    content = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + values


def headers() -> dict[str, Attack]:
    def entry(first: int = 0, last: int = 16, shape: Any = (4,), kind: Any = "F32") -> dict[str, Any]:
        return {"dtype": kind, "shape": shape, "data_offsets": [first, last]}

    found: dict[str, Callable[[], bytes]] = {
        "a header of 2**63 bytes": lambda: header({"a": entry()}, length=2**63),
        "a header of 2**39 bytes": lambda: header({"a": entry()}, length=2**39),
        "a header of 20 MB": lambda: header(b"{" + b" " * (20 * 2**20) + b"}"),
        "a header of 10,001 tensors": lambda: header({str(n): entry(0, 0, (0,)) for n in range(10_001)}, b""),
        "a header nested 100,000 deep": lambda: header(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "a header with a number of 5,000 digits": lambda: header(b'{"a": ' + b"9" * 5000 + b"}"),
        "a header that is a list": lambda: header(b"{}".replace(b"{}", b"{]")),
        "a range outside the file": lambda: header({"a": entry(0, 2**40, (2**38,))}),
        "a negative range": lambda: header({"a": entry(-16, 0)}),
        "a reversed range": lambda: header({"a": entry(16, 0)}),
        "overlapping ranges": lambda: header({"a": entry(0, 16), "b": entry(4, 16, (3,))}),
        "a gap": lambda: header({"a": entry(4, 16, (3,))}),
        "bytes after the end": lambda: header({"a": entry()}, VALUES * 2),
        "a name twice": lambda: header(
            b'{"a":'
            + json.dumps(entry(0, 8, (2,))).encode()
            + b',"a":'
            + json.dumps(entry(8, 16, (2,))).encode()
            + b"}"
        ),
        "a shape of another size": lambda: header({"a": entry(shape=(5,))}),
        "a shape with zeros": lambda: header({"a": entry(shape=(0, 2**62))}),
        "a shape with a boolean": lambda: header({"a": entry(shape=(True, 4))}),
        "a shape with fractions": lambda: header({"a": entry(shape=(4.0,))}),
        "a shape that is a text": lambda: header({"a": entry(shape="4")}),
        "a shape beyond 64 bits": lambda: header({"a": entry(shape=(2**32, 2**32, 2**32))}),
        "an unknown type": lambda: header({"a": entry(kind="X\x1b[2J")}),
        "a type that is a list": lambda: header({"a": entry(kind=["F32"])}),
        "an entry that is null": lambda: header({"a": None}),
        "an entry without a range": lambda: header({"a": {"dtype": "F32", "shape": [4]}}),
        "three offsets": lambda: header({"a": {**entry(), "data_offsets": [0, 8, 16]}}),
        "metadata that are a list": lambda: header({"__metadata__": [], "a": entry()}),
        "metadata nested 100,000 deep": lambda: header({"__metadata__": {"maskformer": "[" * 10**5}, "a": entry()}),
        "metadata with a number of 5,000 digits": lambda: header(
            {"__metadata__": {"maskformer": "9" * 5000}, "a": entry()}
        ),
        "a name with escape sequences": lambda: header({"a\x1b[31m": entry()}),
        "a name of surrogates": lambda: header(b'{"\\ud800": ' + json.dumps(entry()).encode() + b"}"),
    }
    return {name: file(content, "model.safetensors") for name, content in found.items()}


# ---- paths


def special(make: Callable[[Path], object], name: str = "weights.pth", below: str = "") -> Attack:
    def attack(folder: Path) -> Path:
        folder = folder / "model"
        folder.mkdir()
        if name != "model.safetensors":
            (folder / "model.safetensors").write_bytes(safetensors.torch.save({"a": torch.zeros(4)}))
        make(folder / name)
        return folder / below

    return attack


def paths() -> dict[str, Attack]:
    kinds: dict[str, Callable[[Path], object]] = {
        "a FIFO": os.mkfifo,
        "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
        "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to nothing": lambda path: path.symlink_to("/nonexistent/file"),
        "a folder": Path.mkdir,
    }
    found = {f"{kind} as a checkpoint": special(make, below="weights.pth") for kind, make in kinds.items()}
    for kind in ("a FIFO", "a link to /dev/zero"):
        found[f"{kind} in a folder"] = special(kinds[kind], "model.safetensors")
        found[f"{kind} as an index"] = special(
            kinds[kind], "model.safetensors.index.json", "model.safetensors.index.json"
        )
        found[f"{kind} as pytorch_model.bin"] = special(kinds[kind], "pytorch_model.bin", "pytorch_model.bin")
    return found


def indexes() -> dict[str, Attack]:
    """Return JSON files of a folder that are hostile."""
    contents: dict[str, bytes] = {
        "nested 100,000 deep": b"[" * 10**5,
        "a number of 5,000 digits": b'{"a": ' + b"9" * 5000 + b"}",
        "surrogates": b'{"weight_map": {"\\ud800": "\\ud800"}}',
        "40 MB": b'{"a": "' + b"x" * (40 * 2**20) + b'"}',
        "not UTF-8": b'{"a": "\xff"}',
        "NaN": b"NaN",
        "2,000 shards": json.dumps({"weight_map": {str(n): f"{n}.safetensors" for n in range(2000)}}).encode(),
        "shards that are itself": b'{"weight_map": {"a": "model.safetensors.index.json"}}',
        "shards with slashes": b'{"weight_map": {"a": "../../etc/passwd"}}',
        "shards with a null byte": b'{"weight_map": {"a": "a\\u0000b"}}',
        "a shard with an escape sequence": b'{"weight_map": {"a": "\\u001b[31mb"}}',
        "a shard of 10,000 characters": json.dumps({"weight_map": {"a": "x" * 10_000}}).encode(),
    }

    def write(content: bytes) -> Attack:
        def attack(folder: Path) -> Path:
            (folder / "model.safetensors.index.json").write_bytes(content)
            return folder / "model.safetensors.index.json"

        return attack

    return {f"an index of {name}": write(content) for name, content in contents.items()}


# ---- native files and folders

SMALL = ModelConfig(
    backbone="small",
    num_classes=2,
    num_queries=3,
    hidden_dim=8,
    num_heads=2,
    feedforward_dim=8,
    encoder_layers=0,
    decoder_layers=1,
)
TAXONOMY = Taxonomy.from_coco([{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}])


@cache
def small_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(build_model(SMALL).state_dict())


def native(about: object, tensors: Mapping[str, torch.Tensor] | None = None) -> bytes:
    text = about if isinstance(about, str) else json.dumps(about)
    return safetensors.torch.save(dict(tensors or small_state()), {"maskformer": text})


def about(**changes: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(describe(SMALL, TAXONOMY)))
    found["config"]["model"] |= changes
    return found


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "1e9 encoder layers": {"encoder_layers": 10**9},
    "99 encoder layers": {"encoder_layers": 99},
    "1e30 queries": {"num_queries": 1e30},
    "10**30 queries": {"num_queries": 10**30},
    "2,000 queries": {"num_queries": 2000},
    "2**62 channels": {"hidden_dim": 2**62},
    "40,000 channels": {"hidden_dim": 40_000},
    "8,192 channels": {"hidden_dim": 8192, "decoder_layers": 100},
    "infinite channels": {"hidden_dim": float("inf")},
    "a boolean of layers": {"decoder_layers": True},
    "0 heads": {"num_heads": 0},
    "negative heads": {"num_heads": -2},
    "10**18 heads": {"num_heads": 10**18, "hidden_dim": 4 * 10**18},
    "2**31 classes": {"num_classes": 2**31},
    "50,000 classes": {"num_classes": 50_000},
    "feed-forward of 2**40": {"feedforward_dim": 2**40},
    "a text of layers": {"decoder_layers": "\x1b[31m6"},
    "a list of layers": {"decoder_layers": [6]},
    "null layers": {"decoder_layers": None},
    "NaN dropout": {"dropout": float("nan")},
    "a backbone of paths": {"backbone": "../../etc/passwd\x1b[2J"},
    "a backbone that is a list": {"backbone": ["small"]},
    "another backbone": {"backbone": "swin_l"},
    "NaN means": {"pixel_mean": [float("nan")] * 3},
    "zero deviations": {"pixel_std": [0.0, 0.0, 0.0]},
    "four means": {"pixel_mean": [1.0, 2.0, 3.0, 4.0]},
    "nested means": {"pixel_mean": [[1.0], 2.0, 3.0]},
    "an unknown field": {"__class__\x1b[2J": 1},
    "a recomputation that is a number": {"checkpoint_activations": 7},
}

CATEGORIES: dict[str, Any] = {
    "a category that is a number": [1, 2],
    "categories that are an object": {"id": 1},
    "an id beyond 64 bits": [{"id": 2**80, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    "a negative id": [{"id": -1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    "an id that is a boolean": [{"id": True, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}],
    "a name with an escape sequence": [{"id": 1, "name": "\x1b[31mcat", "isthing": 1}],
    "a name of surrogates": [{"id": 1, "name": "\ud800", "isthing": 1}],
    "a name of two lines": [{"id": 1, "name": "cat\nsky", "isthing": 1}],
    "a name of 1 MB": [{"id": 1, "name": "x" * 10**6, "isthing": 1}],
    "an empty name": [{"id": 1, "name": "", "isthing": 1}],
    "60,000 categories": [{"id": number, "name": str(number), "isthing": 1} for number in range(60_000)],
    "a color of booleans": [{"id": 1, "name": "cat", "isthing": 1, "color": [True, 2, 3]}],
    "a color of 10**30": [{"id": 1, "name": "cat", "isthing": 1, "color": [10**30, 2, 3]}],
    "another number of categories": [{"id": 1, "name": "cat", "isthing": 1}],
}


def models() -> dict[str, Attack]:
    """Return native files with a hostile configuration, hostile classes or other tensors."""
    nan = {name: torch.full_like(tensor, float("nan")) for name, tensor in small_state().items()}
    found: dict[str, Callable[[], bytes]] = {
        **{name: lambda change=change: native(about(**change)) for name, change in CONFIGURATIONS.items()},
        **{name: lambda value=value: native({**about(), "categories": value}) for name, value in CATEGORIES.items()},
        "weights of NaN": lambda: native(about(), nan),
        "missing tensors": lambda: native(about(), dict(list(small_state().items())[:5])),
        "another tensor": lambda: native(about(), {**small_state(), "transformer_decoder.layers.99.x": torch.zeros(1)}),
        "transposed tensors": lambda: native(about(), {n: t.flatten() for n, t in small_state().items()}),
        "integers": lambda: native(about(), {n: t.int() for n, t in small_state().items()}),
        "no metadata": lambda: native("{}"),
        "metadata that are a list": lambda: native("[]"),
        "a configuration that is a list": lambda: native({"config": [1]}),
        "layers without end in names": lambda: native(
            about(), {**small_state(), f"transformer_decoder.layers.{'9' * 200}.norm.weight": torch.zeros(1)}
        ),
    }
    return {f"a model with {name}": file(content, "model.safetensors") for name, content in found.items()}


def registered() -> dict[str, Attack]:
    """Return registered models with a hostile about.json."""
    good = {
        "model": about()["config"]["model"],
        "panoptic": {},
        "categories": TAXONOMY.to_coco(),
        "short_side": 32,
        "long_side": 64,
    }
    contents: dict[str, bytes] = {
        "nested 100,000 deep": b"[" * 10**5,
        "not an object": b"[1]",
        "a number of 5,000 digits": b"9" * 5000,
        **{
            name: json.dumps({**good, **change}).encode()
            for name, change in {
                "40,000 channels": {"model": about(hidden_dim=40_000)["config"]["model"]},
                "1e9 layers": {"model": about(decoder_layers=10**9)["config"]["model"]},
                "a side of 10**9": {"short_side": 10**9, "long_side": 10**9},
                "a side of 0": {"short_side": 0},
                "a negative side": {"long_side": -5},
                "a side that is a text": {"short_side": "\x1b[2J"},
                "a side that is a fraction": {"short_side": 1.5},
                "an infinite side": {"long_side": float("inf")},
                "an unknown threshold": {"panoptic": {"x\x1b[2J": 1}},
                "a threshold of NaN": {"panoptic": {"score_threshold": float("nan")}},
                "a threshold that is a list": {"panoptic": {"score_threshold": [1]}},
                "no classes": {"categories": []},
                "a model that is a list": {"model": [1]},
            }.items()
        },
    }

    def write(content: bytes | None, make: Callable[[Path], object] | None = None) -> Attack:
        def attack(folder: Path) -> Path:
            path = folder / "artifacts"
            path.mkdir()
            (path / "model.safetensors").write_bytes(native(about()))
            if content is not None:
                (path / "about.json").write_bytes(content)
            if make is not None:
                make(path)
            return folder

        return attack

    def fifo(path: Path) -> None:
        (path / "model.safetensors").unlink()
        os.mkfifo(path / "model.safetensors")

    found = {f"about.json: {name}": write(content) for name, content in contents.items()}
    found["about.json: a FIFO for the weights"] = write(json.dumps(good).encode(), fifo)
    return found


# ---- runs


@cache
def good_run() -> dict[str, bytes]:
    """Return the files of a run's folder by their paths below it."""
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    config = replace(DEMO, model=SMALL)
    model = build_model(SMALL)
    model.load_state_dict(small_state())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with TemporaryDirectory() as scratch:
        run = locate(scratch) / "run"
        saved = TrainingState(5, small_state(), optimizer.state_dict(), progress={"best": 0.5})
        state.save(step_folder(run, 5), saved, config, TAXONOMY)
        state.write_best(run, state.BestCheckpoint(5, 0.5))
        root = Path(run.path)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


STEP = "checkpoints/step_00000005"


def write_run(folder: Path, changed: Mapping[str, bytes]) -> Path:
    """Write a run with changed files and the right hashes; return the folder of its checkpoint."""
    files = {**good_run(), **{f"{STEP}/{name}": data for name, data in changed.items()}}
    manifest = json.loads(good_run()[f"{STEP}/manifest.json"])
    for name in ("model.safetensors", "state.pt", "config.json"):
        data = files[f"{STEP}/{name}"]
        manifest["files"][name] = {"sha256": sha256(data), "bytes": len(data)}
    if "manifest.json" not in changed:
        files[f"{STEP}/manifest.json"] = json.dumps(manifest).encode()
    for name, data in files.items():
        path = folder / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "run" / STEP


def _run_with(**changed: Callable[[], bytes]) -> Attack:
    names = {"state": "state.pt", "weights": "model.safetensors", "config": "config.json", "manifest": "manifest.json"}
    return lambda folder: write_run(folder, {names[name]: data() for name, data in changed.items()})


def states() -> dict[str, Attack]:
    """Return checkpoints of a run whose hashes are right and whose state is hostile."""

    def saved(**changes: Any) -> bytes:
        return _saved({"step": 5, "optimizer": {"state": {}, "param_groups": []}, "progress": {}, **changes})

    found: dict[str, Callable[[], bytes]] = {
        "a plain pickle with code": lambda: model(call("os.system", text("true"))),
        "code in zip": lambda: zipped(model(call("os.system", text("true")))),
        "nested tuples": lambda: zipped(pickled(b"K\x01" + b"\x85" * 10**6)),
        "a tuple doubled 60 times": lambda: zipped(pickled(doubled(b"K\x01", b"\x86", 60))),
        "bytearray of a number": lambda: zipped(model(call("builtins.bytearray", integer(2**40)))),
        "strides of 0": lambda: zipped(model(tensor(None, 0, (2**30, 4), (0, 1)))),
        "a deflated storage": _deflated_bomb,
        "a step that is a text": lambda: saved(step="5"),
        "a step that is a tensor": lambda: saved(step=torch.tensor(5)),
        "a negative step": lambda: saved(step=-5),
        "an optimizer that is a list": lambda: saved(optimizer=[1]),
        "a model that is a list": lambda: saved(model=[1]),
        "a model of texts": lambda: saved(model={"a": "b"}),
        "progress that is a number": lambda: saved(progress=5),
        "nothing": lambda: b"",
        "a text": lambda: b"hello",
    }
    attacks = {f"state.pt: {name}": _run_with(state=content) for name, content in found.items()}
    manifests = {
        "nested 100,000 deep": b"[" * 10**5,
        "a number of 5,000 digits": b'{"version": ' + b"9" * 5000 + b"}",
        "a version with escape sequences": b'{"version": "\\u001b[31m"}',
        "files that are a list": b'{"version": 2, "files": []}',
        "files that are numbers": b'{"version": 2, "files": {"state.pt": 5}}',
        "no files": b'{"version": 2}',
        "surrogates": b'{"version": "\\ud800"}',
    }
    for name, content in manifests.items():
        attacks[f"manifest.json: {name}"] = _run_with(manifest=lambda content=content: content)
    attacks["safetensors of a run: overlapping"] = _run_with(
        weights=lambda: header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 20]}})
    )
    return attacks


def runs() -> dict[str, Attack]:
    """Return runs whose configuration, best.json or weights are hostile; for `load_model` and `open_model`."""

    def config(**changes: Any) -> bytes:
        found = json.loads(good_run()[f"{STEP}/config.json"])
        found["config"]["model"] |= changes
        return json.dumps(found).encode()

    def classes(value: Any) -> bytes:
        return json.dumps({**json.loads(good_run()[f"{STEP}/config.json"]), "categories": value}).encode()

    attacks = {
        "config.json: nested 100,000 deep": _run_with(config=lambda: b"[" * 10**5),
        "config.json: a list": _run_with(config=lambda: b"[1]"),
        "config.json: no configuration": _run_with(config=lambda: b"{}"),
        "config.json: a configuration that is a number": _run_with(config=lambda: b'{"config": 5, "categories": []}'),
        "config.json: 1e9 layers": _run_with(config=lambda: config(encoder_layers=10**9)),
        "config.json: 40,000 channels": _run_with(config=lambda: config(hidden_dim=40_000)),
        "config.json: another backbone": _run_with(config=lambda: config(backbone="resnet101")),
        "config.json: more queries": _run_with(config=lambda: config(num_queries=1999)),
        "config.json: a text of queries": _run_with(config=lambda: config(num_queries="\x1b[2J")),
        "config.json: an id of 2**70": _run_with(config=lambda: classes([{"id": 2**70, "name": "a", "isthing": 1}])),
        "config.json: classes that are numbers": _run_with(config=lambda: classes([1])),
        "config.json: other classes": _run_with(config=lambda: classes([{"id": 1, "name": "a", "isthing": 1}])),
        "weights of another model": _run_with(weights=lambda: safetensors.torch.save({"a": torch.zeros(4)})),
        "weights that are a pickle": _run_with(weights=lambda: zipped(model(call("os.system", text("true"))))),
    }
    best = {
        "nested": b"[" * 10**5,
        "a huge step": b'{"step": 1e30, "quick_pq": 1}',
        "a step of 4,000 digits": b'{"step": ' + b"9" * 4000 + b', "quick_pq": 1}',
        "a step of 5,000 digits": b'{"step": ' + b"9" * 5000 + b', "quick_pq": 1}',
        "a negative step": b'{"step": -5, "quick_pq": 1}',
        "a step that is a path": b'{"step": "../../x", "quick_pq": 1}',
        "a step that is a boolean": b'{"step": true, "quick_pq": 1}',
        "not UTF-8": b"\xff",
    }

    def write(content: bytes) -> Attack:
        def attack(folder: Path) -> Path:
            write_run(folder, {})
            (folder / "run" / "best.json").write_bytes(content)
            return folder / "run@best"

        return attack

    attacks |= {f"best.json: {name}": write(content) for name, content in best.items()}

    def special_file(name: str) -> Attack:
        def attack(folder: Path) -> Path:
            step = write_run(folder, {})
            (step / name).unlink()
            os.mkfifo(step / name)
            return step

        return attack

    names = ("manifest.json", "config.json", "model.safetensors")
    return attacks | {f"a FIFO as {name} of a run": special_file(name) for name in names}
