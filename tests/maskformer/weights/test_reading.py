"""Every format is detected from its content, and no file runs code."""

import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from maskformer.weights import Weights, class_names, read

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


def same(weights: Weights) -> bool:
    expected = {name: tensor.tolist() for name, tensor in TENSORS.items()}
    return {name: tensor.tolist() for name, tensor in weights.tensors.items()} == expected


def zipped(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def legacy(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def arrays() -> dict[str, Any]:
    model = OrderedDict((name, tensor.numpy()) for name, tensor in TENSORS.items())
    return {"model": model, "__author__": "third_party", "matching_heuristics": True}


FILES: dict[str, Callable[[], bytes]] = {
    "zip": lambda: zipped(TENSORS),
    "zip with a state_dict": lambda: zipped({"meta": {"epoch": 3}, "state_dict": TENSORS, "optimizer": {"lr": 1.0}}),
    "zip with a model": lambda: zipped({"model": TENSORS, "iteration": 7, "rate": np.float64(0.5)}),
    "legacy": lambda: legacy(OrderedDict(TENSORS)),
    "safetensors": lambda: safetensors.torch.save(TENSORS),
    **{
        f"pickle of arrays, protocol {protocol}": lambda p=protocol: pickle.dumps(arrays(), p)
        for protocol in range(2, 6)
    },
    # Arrays before numpy 2 named its old modules.
    "pickle of arrays by numpy 1": lambda: pickle.dumps(arrays(), 2).replace(b"numpy._core", b"numpy.core"),
    "pickle of tensors": lambda: pickle.dumps({"model": TENSORS}, 4),
    "pickle of foreign byte order": lambda: pickle.dumps(
        {name: array.astype(array.dtype.newbyteorder(">")) for name, array in arrays()["model"].items()}
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_every_format_under_any_file_name(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.of.some.kind"
    path.write_bytes(FILES[kind]())
    assert same(read(path))
    assert same(read(str(path)))
    with path.open("rb") as file:
        assert same(read(file))


def test_the_file_of_numpy_1_has_its_module_names() -> None:
    assert b"numpy.core.multiarray" in FILES["pickle of arrays by numpy 1"]()


def test_a_pickle_by_python_2() -> None:
    """Its strings are bytes, and so are an array's values: {"model": {"b": float32 [-1.5]}}."""
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    state = b"(K\x01K\x01\x85" + dtype + b"\x89U\x04\x00\x00\xc0\xbftb"
    weights = read(io.BytesIO(b"\x80\x02}U\x05model}U\x01b" + array + state + b"ss."))
    assert {name: tensor.tolist() for name, tensor in weights.tensors.items()} == {"b": [-1.5]}


def test_an_open_file_is_named_in_messages() -> None:
    file = io.BytesIO(b"")
    file.name = "s3://bucket/weights.pth"  # pyright: ignore[reportAttributeAccessIssue]  # as opened from a URI
    with pytest.raises(ValueError, match=r"^s3://bucket/weights\.pth is empty"):
        read(file)


# ---- folders


def write_folder(folder: Path, files: dict[str, bytes], config: object) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name).write_bytes(data)


def sharded() -> dict[str, bytes]:
    shards = {f"model-0000{index}-of-00002.safetensors": {name: TENSORS[name]} for index, name in enumerate(TENSORS, 1)}
    index = {"weight_map": {name: file for file, tensors in shards.items() for name in tensors}}
    files = {file: safetensors.torch.save(tensors) for file, tensors in shards.items()}
    return {**files, "model.safetensors.index.json": json.dumps(index).encode()}


FOLDERS = {
    "safetensors": lambda: {"model.safetensors": safetensors.torch.save(TENSORS)},
    "shards": sharded,
    "bin": lambda: {"pytorch_model.bin": zipped(TENSORS)},
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_of_hugging_face(kind: str, tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", FOLDERS[kind](), {"id2label": {"1": "cat", "0": "dog"}})
    weights = read(tmp_path / "folder")
    assert same(weights)
    assert class_names(weights) == ("dog", "cat")


def test_the_file_inside_a_folder_knows_its_configuration(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", FOLDERS["safetensors"](), {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}})
    weights = read(tmp_path / "folder" / "model.safetensors")
    assert weights.about == {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert class_names(weights) is None  # transformers writes these if classes have no names


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", sharded(), {})
    (tmp_path / "folder" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"no file .*model-00002-of-00002\.safetensors, which the index .*index\.json lists"
    ):
        read(tmp_path / "folder")


def test_an_index_is_read_as_its_folder(tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", sharded(), {"id2label": {"0": "cat"}})
    weights = read(tmp_path / "folder" / "model.safetensors.index.json")
    assert same(weights)
    assert (weights.source, class_names(weights)) == (str(tmp_path / "folder"), ("cat",))


@pytest.mark.parametrize(
    "index",
    [{}, *({"weight_map": files} for files in ({}, ["a"], {"a": 1}, {"a": "../a"}, {"a": "/etc/passwd"}))],
)
def test_a_damaged_index_is_explained(index: object, tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", {"model.safetensors.index.json": json.dumps(index).encode()}, {})
    with pytest.raises(ValueError, match=r"index\.json is not the index of a model: its weight_map must"):
        read(tmp_path / "folder")


def test_an_index_is_no_part_of_itself(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors.index.json"}}
    write_folder(tmp_path / "folder", {"model.safetensors.index.json": json.dumps(index).encode()}, {})
    with pytest.raises(ValueError, match=r"index\.json has an unknown format"):
        read(tmp_path / "folder")


@pytest.mark.parametrize(
    "meta",
    [
        {"CLASSES": ("dog", "cat")},
        {"dataset_meta": {"CLASSES": ["dog", "cat"]}},
        {"dataset_meta": {"classes": ("dog", "cat"), "palette": None}},
    ],
)
def test_class_names_of_mmdet(meta: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"meta": meta, "state_dict": TENSORS}, tmp_path / "mmdet.pth")
    assert class_names(read(tmp_path / "mmdet.pth")) == ("dog", "cat")


# ---- mmengine's training checkpoints


@pytest.fixture
def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """Return a class that pickles like mmengine's, until `forget_mmengine`."""

    class HistoryBuffer:
        methods: dict[str, Any]

        def __init__(self) -> None:
            self.max_length = 1_000_000
            self.log = np.array([0.5, 0.25])
            self.count = np.array([1, 1])
            self.last = np.float64(0.25)
            self.methods = {"min": HistoryBuffer.min}

        def min(self) -> float:
            return float(self.log.min())

    name = "mmengine.logging.history_buffer"
    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = name, "HistoryBuffer"
    HistoryBuffer.min.__module__, HistoryBuffer.min.__qualname__ = name, "HistoryBuffer.min"
    for depth in (1, 2, 3):
        part = ".".join(name.split(".")[:depth])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = HistoryBuffer  # pyright: ignore[reportAttributeAccessIssue]  # a module made here
    return HistoryBuffer


@pytest.mark.parametrize("write", [zipped, legacy])
def test_a_training_checkpoint_of_mmengine_without_mmengine(
    write: Callable[[object], bytes], history_buffer: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = {"train/loss": history_buffer()}
    data = write({"meta": {"epoch": 1}, "state_dict": TENSORS, "message_hub": {"log_scalars": logs}})
    assert b"getattr" in data
    for part in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
        monkeypatch.delitem(sys.modules, part)
    assert same(read(io.BytesIO(data)))
    assert "mmengine" not in sys.modules


# ---- files with code in them


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def touch(canary: Path) -> dict[str, Callable[..., Any]]:
    return {
        "exec": lambda: Calls(exec, f"open({str(canary)!r}, 'w')"),
        "system": lambda: Calls(os.system, f"touch {canary}"),
    }


WRITERS: dict[str, Callable[[object], bytes]] = {
    "zip": zipped,
    "legacy": legacy,
    "pickle 2": lambda content: pickle.dumps(content, 2),
    "pickle 4": lambda content: pickle.dumps(content, 4),
    # A storage inside a pickled tensor is a file of torch.save's, which could hold anything.
    "inside a storage": lambda content: pickle.dumps({"model": Calls(torch.storage._load_from_bytes, legacy(content))}),
}


@pytest.mark.parametrize("code", ["exec", "system"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_pickle_with_code_is_refused(writer: str, code: str, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "weights.pth"
    path.write_bytes(WRITERS[writer]({"state_dict": TENSORS, "more": touch(canary)[code]()}))
    with pytest.raises(
        ValueError, match=rf"weights\.pth is not opened: .* holds ((__)?builtins?(__)?\.|posix\.)?{code}, which"
    ):
        read(path)
    assert not canary.exists()


def test_the_canary_would_have_been_touched(tmp_path: Path) -> None:
    for code, bomb in touch(tmp_path / "canary").items():
        pickle.loads(pickle.dumps(bomb()))
        assert (tmp_path / "canary").exists(), code
        (tmp_path / "canary").unlink()


@pytest.mark.parametrize("write", [zipped, legacy, lambda content: pickle.dumps(content, 2)])
def test_nothing_is_reached_through_an_allowed_name(
    write: Callable[[object], bytes], history_buffer: Any, tmp_path: Path
) -> None:
    """mmengine's class may be named and so may getattr, but calling what getattr finds there does nothing."""

    def erase(path: str) -> None:
        Path(path).write_text("")

    erase.__module__, erase.__qualname__ = history_buffer.__module__, "HistoryBuffer.erase"
    history_buffer.erase = erase
    data = write({"state_dict": TENSORS, "more": Calls(history_buffer.erase, str(tmp_path / "canary"))})
    with pytest.raises(ValueError, match=r"^The file is (not opened|damaged)"):
        read(io.BytesIO(data))
    assert not (tmp_path / "canary").exists()


def test_getattr_reaches_nothing(history_buffer: Any) -> None:
    data = zipped({"state_dict": TENSORS, "meta": {"CLASSES": history_buffer.min}})
    assert read(io.BytesIO(data)).about == {"meta": {"CLASSES": None}}


# ---- files that are no checkpoints


BROKEN = {
    "is empty": lambda: b"",
    "is a web page": lambda: b"\n<!DOCTYPE html><html>404</html>",
    "pointer to a file in git-lfs": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n",
    "unknown format: it begins with b'GIF89a": lambda: b"GIF89a.........",
    "holds no tensors by name, but a dict with the keys epoch": lambda: zipped({"epoch": 3}),
    "holds no tensors by name, but a Tensor": lambda: zipped(torch.zeros(3)),
    "holds no tensors by name, but a list": lambda: pickle.dumps([1, 2], 4),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_file_that_is_no_checkpoint_is_explained(message: str, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(BROKEN[message]())
    with pytest.raises(ValueError, match=rf"^{tmp_path}/weights\.pth .*{message}") as error:
        read(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "pickle of arrays, protocol 2", "pickle of tensors"])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_files_are_explained(kind: str, share: float, tmp_path: Path) -> None:
    data = FILES[kind]()
    (tmp_path / "weights.pth").write_bytes(data[: max(20, int(share * len(data)))])
    with pytest.raises(ValueError, match=r"weights\.pth is damaged, truncated, or not a file of weights") as error:
        read(tmp_path / "weights.pth")
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive")
def test_torchscript_is_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:  # by which torch recognizes one
        archive.writestr("model/constants.pkl", pickle.dumps(()))
        archive.writestr("model/version", "3")
    with pytest.raises(ValueError, match="besides tensors it holds a TorchScript program") as error:
        read(io.BytesIO(file.getvalue()))
    assert "weights_only" not in str(error.value)


def test_reasons_are_short() -> None:
    with pytest.raises(ValueError, match=r"only \(it ends early\)\. Copy"):
        read(io.BytesIO(legacy(TENSORS)[:20]))
    names = pickle.dumps(("os\nsystem", "x" * 9000), 2)
    with pytest.raises(ValueError, match=r"holds os\\nsystem\.xxx") as error:
        read(io.BytesIO(names[:-4] + b"\x93."))  # STACK_GLOBAL instead of a tuple
    assert len(str(error.value)) < 400


def test_missing_paths_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"There is no file {tmp_path}/nothing\. Give"):
        read(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no checkpoint: it has none of model\.safetensors"):
        read(tmp_path)
    write_folder(tmp_path / "folder", FOLDERS["safetensors"](), [1])
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object, got list"):
        read(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read(tmp_path / "folder")


def test_state_dicts() -> None:
    """Of tensors or arrays, alone or in a checkpoint, with or without DistributedDataParallel's prefix."""
    wrapped = {f"module.{name}": tensor for name, tensor in TENSORS.items()}
    checkpoint: Any = {"meta": {"CLASSES": ("cat",)}, "state_dict": TENSORS}
    for content in (arrays()["model"], arrays(), checkpoint, wrapped):
        assert same(read(content))
        assert same(read(io.BytesIO(zipped(content))))
    assert class_names(read(checkpoint)) == ("cat",)
    assert read({**wrapped, "a": torch.zeros(1)}).tensors.keys() == {*wrapped, "a"}


NO_TENSORS: dict[str, Callable[[], dict[Any, Any]]] = {
    "the key 1 of a tensor is not a name": lambda: {**TENSORS, 1: torch.zeros(1)},
    "the key a\\\\nb of a tensor is not a name": lambda: {"a\nb": torch.zeros(1)},
    "its tensor c is sparse, quantized or nested": lambda: {"c": torch.eye(2).to_sparse()},
    "its tensor d is sparse, quantized or nested": lambda: {
        "d": torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.qint8)
    },
    "its tensor e cannot be read": lambda: {"e": np.zeros(2, np.longdouble)},
}


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("message", NO_TENSORS)
def test_entries_that_are_not_named_tensors_are_refused(message: str) -> None:
    with pytest.raises(ValueError, match=f"^The state dict is not used: {message}"):
        read(NO_TENSORS[message]())


def test_a_state_dict_is_returned_unchanged() -> None:
    weights = read(TENSORS)
    assert same(weights)
    assert read(weights) is weights
    assert all(isinstance(tensor, Tensor) for tensor in weights.tensors.values())
