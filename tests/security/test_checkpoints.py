"""Hostile checkpoints end in a refusal or a correct result, within limits, and never run code.

Attacks share a process, a dozen each; if it dies or is too slow, each is repeated alone, so that it is named.
"""

import io
import json
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from maskformer.weights import pickles
from tests.security import checkpoint_attacks as attacks
from tests.security.checkpoint_attacks import Attack, load_model, load_state, open_model, read_weights
from tests.security.isolated import MEMORY, SECONDS, run

WEIGHTS = {
    **attacks.pickle_bombs(),
    **attacks.code(),
    **attacks.tensors(),
    **attacks.truncated(),
    **attacks.headers(),
    **attacks.paths(),
    **attacks.indexes(),
}
RUNS = attacks.runs()
MODELS = {**attacks.models(), **attacks.registered(), **RUNS}
STATES = attacks.states()
TARGETS: dict[Callable[[str], Any], Mapping[str, Attack]] = {
    read_weights: WEIGHTS,
    load_model: MODELS,
    open_model: RUNS,
    load_state: STATES,
}
EACH = 12


def groups() -> Iterator[Any]:
    for function, named in TARGETS.items():
        names = list(named)
        for start in range(0, len(names), EACH):
            yield pytest.param(function, names[start : start + EACH], id=f"{function.__name__}: {names[start]}, ...")


@pytest.mark.parametrize(("function", "names"), list(groups()))
def test_hostile_checkpoints_are_refused(function: Callable[[str], Any], names: list[str], tmp_path: Path) -> None:
    paths: dict[str, str] = {}
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths[name] = str(TARGETS[function][name](folder))
    together = run(attacks.try_all, function, list(paths.values()), str(tmp_path / "ends"), seconds=60)
    if together.kind == "result":
        assert together.memory < MEMORY, together
        ends = json.loads((tmp_path / "ends").read_text())
    else:
        alone = [run(function, path) for path in paths.values()]
        ends = [(outcome.kind, outcome.text, outcome.seconds) for outcome in alone]
    assert len(ends) == len(names)
    for number, (name, (kind, text, seconds)) in enumerate(zip(names, ends, strict=True)):
        assert kind == "refused", (name, kind, text)
        assert seconds < SECONDS, (name, seconds)
        assert text.isprintable(), (name, text)
        assert str(tmp_path / str(number)) in text, (name, text)
        assert 20 < len(text) < 2000, (name, text)
    assert not list(tmp_path.rglob("witness"))


def test_there_are_enough_attacks() -> None:
    assert len(WEIGHTS) + len(MODELS) + len(STATES) >= 120


def test_a_witness_would_be_there(tmp_path: Path) -> None:
    path = attacks.code()["code by INST, legacy"](tmp_path)
    with path.open("rb") as file:
        for _ in range(3):
            pickle.load(file)
        pickle.load(file)
    assert (tmp_path / "witness").exists()


# ---- mutated files


def good_files() -> dict[str, bytes]:
    """Return a small file of every format."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"a.weight": torch.rand(4, 3, generator=generator), "b": torch.arange(5), "c": torch.ones(2).half()}
    content = {"meta": {"epoch": 3, "CLASSES": ("cat", "sky")}, "state_dict": tensors, "optimizer": {"lr": 0.1}}
    arrays = {"model": {name: tensor.numpy() for name, tensor in tensors.items()}, "rate": np.float64(0.5)}
    old = io.BytesIO()
    torch.save(content, old, _use_new_zipfile_serialization=False)
    new = io.BytesIO()
    torch.save(content, new)
    return {
        "zip": new.getvalue(),
        "legacy": old.getvalue(),
        "plain 2": pickle.dumps(arrays, 2),
        "plain 4": pickle.dumps(arrays, 4),
        "plain, of tensors": pickle.dumps({"model": tensors}, 4),
        "safetensors": safetensors.torch.save(tensors, {"maskformer": '{"categories": null}'}),
    }


def mutated(data: bytes, random: random.Random) -> bytes:
    """Return bytes with one to four changes."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(content))
        size = random.choice((1, 2, 4, 8, 30))
        match random.randrange(7):
            case 0:
                content[at] ^= 1 << random.randrange(8)
            case 1:
                content[at] = random.choice((0, 1, 0x28, 0x2E, 0x52, 0x7F, 0x80, 0xFF))
            case 2:
                content[at : at + size] = random.randbytes(size)
            case 3:
                del content[at : at + size]
            case 4:
                content[at:at] = content[at : at + size] * random.choice((1, 2, 50))
            case 5:
                number = random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1))
                content[at : at + 8] = struct.pack("<Q", number)
            case _:
                del content[at + 1 :]
    return bytes(content)


GOOD = good_files()


def fuzz(seeds: range, folder: Path) -> None:
    """Mutate a file of each format, and the files of a run, with each seed, and read the results in one process."""
    paths: dict[Callable[[str], Any], list[str]] = {read_weights: [], load_state: [], load_model: []}
    for seed in seeds:
        chance = random.Random(seed)
        kind = list(GOOD)[seed % len(GOOD)] if seed % 8 < 6 else "run"
        if kind != "run":
            path = folder / f"{seed}.x"
            path.write_bytes(mutated(GOOD[kind], chance))
            paths[read_weights].append(str(path))
        else:
            name = chance.choice(["state.pt", "state.pt", "model.safetensors", "config.json", "manifest.json"])
            data = mutated(attacks.good_run()[f"{attacks.STEP}/{name}"], chance)
            path = attacks.write_run(folder / str(seed), {name: data})
            paths[load_state if name == "state.pt" else load_model].append(str(path))
    for function, files in paths.items():
        outcome = run(attacks.try_all, function, files, str(folder / "ends"), seconds=100)
        assert outcome.kind == "result", (function, files, outcome)
        assert outcome.memory < MEMORY, outcome
        ends = json.loads((folder / "ends").read_text())
        assert len(ends) == len(files)
        for path, (kind, text, seconds) in zip(files, ends, strict=True):
            assert kind in ("result", "refused"), (path, kind, text)
            assert seconds < SECONDS, (path, seconds)
            assert kind == "result" or (text.isprintable() and str(folder) in text), (path, text)


@pytest.mark.parametrize("first", range(0, 700, 100))
def test_mutated_files(first: int, tmp_path: Path) -> None:
    fuzz(range(first, first + 100), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10_000, 20_000, 100))
def test_more_mutated_files(first: int, tmp_path: Path) -> None:
    fuzz(range(first, first + 100), tmp_path)


def test_good_files_are_read(tmp_path: Path) -> None:
    for kind, data in GOOD.items():
        (tmp_path / "good").write_bytes(data)
        assert len(read_weights(str(tmp_path / "good"))) == 3, kind
    folder = attacks.write_run(tmp_path, {})
    assert load_state(str(folder)) == 5
    assert open_model(str(folder)) == 5
    assert load_model(str(folder)) == "Segmenter"
    (tmp_path / "native.safetensors").write_bytes(attacks.native(attacks.about()))
    assert load_model(str(tmp_path / "native.safetensors")) == "Segmenter"


def test_mutations_that_touch_no_structure_change_only_values(tmp_path: Path) -> None:
    """A changed byte of a value changes this value, in every format whose values have no checksum."""
    values = struct.pack("<4f", 1, 2, 3, 4)
    for data in (attacks.zipped(attacks.model(attacks.tensor())), attacks.legacy(attacks.model(attacks.tensor()))):
        file = io.BytesIO(data.replace(values, struct.pack("<4f", 1, 2, 5, 4)))
        assert pickles.load(file)["a"].tolist() == [1, 2, 5, 4]
