"""A saved state is read back bit for bit or not at all, and reading it never runs code."""

import contextlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
import torchvision

from maskformer import build_model
from maskformer.optim import build_optimizer
from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import load_model
from pipelines.checkpoints.state import (
    BestCheckpoint,
    DamagedCheckpointError,
    TrainingState,
    check_files,
    load,
    newest,
    read_best,
    read_manifest,
    step_folder,
    write_best,
)
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, locate, sha256

CONFIG = replace(
    DEMO,
    model=replace(DEMO.model, hidden_dim=16, feedforward_dim=16, num_queries=4, encoder_layers=0, decoder_layers=1),
)
TAXONOMY = Taxonomy(COCO.categories[:7])
FILES = {"model.safetensors", "state.pt", "config.json", "manifest.json"}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of a model and an optimizer after one step."""
    torch.manual_seed(0)
    model = build_model(CONFIG.model)
    optimizer = build_optimizer(model, CONFIG.optimizer)
    output = model(torch.rand(1, 3, 32, 32), None)
    (output.class_logits.sum() + output.mask_logits.sum()).backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


@pytest.fixture
def state(trained: tuple[dict[str, Any], dict[str, Any]]) -> Callable[[int], TrainingState]:
    """Return a function that makes the state after a step; weights differ between steps."""

    def after(step: int) -> TrainingState:
        model = {name: tensor.clone() for name, tensor in trained[0].items()}
        next(iter(model.values())).flatten()[0] = step
        return TrainingState(step, model, trained[1])

    return after


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


@pytest.fixture
def averaged_state(state: Callable[[int], TrainingState]) -> Callable[[int], TrainingState]:
    """Return a function that makes the state after a step of a run with averaged weights."""

    def after(step: int) -> TrainingState:
        averaged = {name: tensor / 2 for name, tensor in state(step).model.items()}
        return replace(
            state(step), averaged=averaged, progress={"best": {"step": 5, "quick_pq": 0.1 + 0.2}, "no": None}
        )

    return after


def save(run: Location, state: TrainingState) -> Path:
    folder = step_folder(run, state.step)
    checkpoint.save(folder, state, CONFIG, TAXONOMY)
    return Path(folder.path)


def assert_same(found: Any, expected: Any) -> None:
    """Compare nested tensors bit for bit, types included."""
    assert type(found) is type(expected)
    if isinstance(found, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert found.numpy().tobytes() == expected.numpy().tobytes()
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    elif isinstance(found, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_state_is_read_back_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, state: Callable[[int], TrainingState]
) -> None:
    run = locate(str(tmp_path) if kind == "local" else request.getfixturevalue("bucket")) / "run"
    saved = state(120)
    saved.model["odd"] = torch.tensor([float("nan"), -0.0, 1e-45])
    checkpoint.save(step_folder(run, 120), saved, CONFIG, TAXONOMY)
    assert (run / "checkpoints").names() == ["step_00000120"]
    assert set((run / "checkpoints" / "step_00000120").names()) == FILES
    loaded = newest(run, load)
    assert loaded is not None
    assert_same(vars(loaded), vars(saved))
    model = load_model(run)
    assert (model.step, model.config, model.taxonomy) == (120, CONFIG, TAXONOMY)
    assert_same(model.weights, saved.model)


def test_averaged_weights_are_those_to_use_and_the_trained_ones_are_resumed(
    run: Location, averaged_state: Callable[[int], TrainingState]
) -> None:
    saved = averaged_state(120)
    save(run, saved)
    loaded = newest(run, load)
    assert loaded is not None
    assert_same(vars(loaded), vars(saved))
    assert saved.averaged is not None
    assert_same(load_model(run).weights, saved.averaged)


def test_a_checkpoint_of_before_averaging_is_still_read(run: Location, state: Callable[[int], TrainingState]) -> None:
    folder, saved = save(run, state(5)), state(5)
    torch.save({"step": 5, "optimizer": saved.optimizer}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    data = (folder / "state.pt").read_bytes()
    manifest["files"]["state.pt"] = {"sha256": sha256(data), "bytes": len(data)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert_same(vars(load(step_folder(run, 5))), vars(saved))


def test_no_checkpoint(run: Location) -> None:
    assert newest(run, load) is None
    (run / "checkpoints" / "step_00000005" / "state.pt").write_bytes(b"cut off")
    (run / "checkpoints" / "notes.txt").write_bytes(b"")
    assert newest(run, load) is None


def test_steps_are_ordered_as_numbers(run: Location, state: Callable[[int], TrainingState]) -> None:
    for step in (99_999_999, 1_000_000_000):
        save(run, state(step))
    assert [loaded.step for loaded in [newest(run, load)] if loaded] == [1_000_000_000]


def test_files_are_checked_without_reading_them(run: Location, state: Callable[[int], TrainingState]) -> None:
    """A run is compared with its checkpoint on the driver, which must not read gigabytes of weights for that."""
    config = with_scaling(workers=2, threads=5, device="cpu", reduction="fast")
    folder = step_folder(run, 5)
    checkpoint.save(folder, state(5), config, TAXONOMY)
    for name in FILES - {"manifest.json"}:
        (folder / name).write_bytes(bytes((folder / name).size()))  # not what was written, but as long
    manifest = newest(run, check_files)
    assert manifest is not None
    assert manifest["step"] == 5
    assert manifest["files"].keys() == FILES - {"manifest.json"}
    found = manifest["environment"]
    assert (found["workers"], found["reduction"], found["threads"], found["device"]) == (2, "fast", 5, "cpu")
    versions = {"torch": torch, "torchvision": torchvision, "numpy": np, "pillow": PIL}
    for name, package in versions.items():
        assert found[name] == package.__version__
    assert sys.version.startswith(found["python"])
    assert found.keys() == {
        "workers",
        "reduction",
        "threads",
        "device",
        "precision",
        "compile",
        *versions,
        "python",
        "cpu",
    }
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: model\.safetensors, state\.pt"):
        load(folder)


def with_scaling(**changes: Any) -> TrainConfig:
    """Return a configuration of 24 micro-batches."""
    run = replace(CONFIG.run, global_batch=48, micro_batch=2)
    return replace(CONFIG, run=run, scaling=replace(CONFIG.scaling, **changes))


def test_counts_of_workers_with_the_same_bits_are_the_same_environment() -> None:
    exact = {
        workers: checkpoint.environment(with_scaling(workers=workers, reduction="exact"))
        for workers in (1, 2, 3, 4, 6, 8)
    }
    assert exact[1] == exact[2] == exact[4] == exact[8]
    others = [exact[1], exact[3], exact[6]]
    others += [checkpoint.environment(with_scaling(workers=workers, reduction="fast")) for workers in (1, 2, 3)]
    for index, one in enumerate(others):
        assert one not in others[:index]
    assert json.loads(json.dumps(others)) == others


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def truncate_manifest(folder: Path) -> None:
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(content[: len(content) // 2])


def empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def truncate_state(folder: Path) -> None:
    os.truncate(folder / "state.pt", (folder / "state.pt").stat().st_size // 2)


def flip_bit_of_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate_manifest: "cannot be read",
    empty_manifest: "cannot be read",
    truncate_state: "state.pt does not have the hash",
    flip_bit_of_weights: "model.safetensors does not have the hash",
    remove_weights: "model.safetensors",
}


def test_a_folder_without_manifest_was_never_completed(
    run: Location, state: Callable[[int], TrainingState], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        folder = save(run, state(step))
    remove_manifest(folder)
    found = newest(run, load)
    assert found is not None
    assert_same(vars(found), vars(state(5)))
    assert caplog.messages == []  # this is no fault


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(
    run: Location, state: Callable[[int], TrainingState], damage: Callable[[Path], None], caplog: Any
) -> None:
    for step in (5, 10):
        folder = save(run, state(step))
    damage(folder)
    with pytest.raises(DamagedCheckpointError, match=DAMAGES[damage]):
        load(step_folder(run, 10))
    found = newest(run, load)
    assert found is not None
    assert_same(vars(found), vars(state(5)))
    (message,) = caplog.messages
    assert "step_00000010" in message
    assert DAMAGES[damage] in message


@pytest.mark.parametrize("name", sorted(FILES - {"manifest.json"}))
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"short")])
def test_a_file_that_is_missing_or_of_another_size_is_found(
    run: Location, state: Callable[[int], TrainingState], name: str, damage: Callable[[Path], None]
) -> None:
    save(run, state(5))
    damage(Path(save(run, state(10))) / name)
    with pytest.raises(
        DamagedCheckpointError, match=f"step_00000010 is damaged: {name} is missing or has another size"
    ):
        check_files(step_folder(run, 10))
    manifest = newest(run, check_files)
    assert manifest is not None
    assert manifest["step"] == 5


def test_a_run_with_only_damaged_checkpoints_is_refused_rather_than_started_anew(
    run: Location, state: Callable[[int], TrainingState]
) -> None:
    for step in (5, 10):
        flip_bit_of_weights(save(run, state(step)))
    with pytest.raises(UserError) as error:
        newest(run, load)
    for word in ("step_00000005", "step_00000010", "model.safetensors", "another --run.name"):
        assert word in str(error.value)


@pytest.mark.parametrize("version", [1, 99])
@pytest.mark.parametrize("read", [load, read_manifest])
def test_another_version_is_a_user_error_with_a_remedy(
    run: Location, state: Callable[[int], TrainingState], version: int, read: Callable[[Location], object]
) -> None:
    """An older, readable checkpoint must not be used instead: the run would silently repeat steps."""
    for step in (5, 10):
        folder = save(run, state(step))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["environment"]  # version 1 had it in state.pt
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": version}))
    message = rf"{folder} has version {version}, .* reads 2\. Use .* --weights {folder}/model\.safetensors\."
    with pytest.raises(UserError, match=message):
        read(step_folder(run, 10))
    with pytest.raises(UserError, match=message):
        newest(run, read)
    with pytest.raises(UserError, match=message):
        load_model(run)


@pytest.mark.parametrize("file", ["manifest.json", "state.pt"])
@pytest.mark.parametrize("kind", [UserError, StorageUnavailableError])
def test_unreadable_storage_is_not_a_damaged_checkpoint(
    run: Location,
    state: Callable[[int], TrainingState],
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    kind: type[Exception],
) -> None:
    """test_storage.py checks that an unreachable server is the error that is raised here."""
    for step in (5, 10):
        save(run, state(step))
    read_bytes = Location.read_bytes

    def unreachable(self: Location) -> bytes:
        if self.name == file:
            raise kind(f"Cannot read {self}: could not connect.")
        return read_bytes(self)

    monkeypatch.setattr(Location, "read_bytes", unreachable)
    for read in (lambda: load(step_folder(run, 10)), lambda: newest(run, load)):
        with pytest.raises(kind, match=f"^Cannot read .*step_00000010/{file}: could not connect"):
            read()


@pytest.mark.parametrize("name", ["exists", "size", "names"])
def test_a_storage_that_does_not_answer_is_not_a_damaged_checkpoint(
    run: Location, state: Callable[[int], TrainingState], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(run, state(5))

    def unavailable(self: Location) -> None:
        raise StorageUnavailableError("No answer.")

    monkeypatch.setattr(Location, name, unavailable)
    with pytest.raises(StorageUnavailableError, match=r"^No answer"):
        newest(run, check_files)


def test_the_best_checkpoint_is_named_in_a_file(run: Location) -> None:
    assert read_best(run) is None
    write_best(run, BestCheckpoint(120, 0.1 + 0.2))
    assert json.loads((run / "best.json").read_text()) == {"step": 120, "quick_pq": 0.1 + 0.2}
    assert read_best(run) == BestCheckpoint(120, 0.1 + 0.2)
    for damaged in (b"", b"{", b"[]", b'{"step": null, "quick_pq": 1}', b'{"step": 1}', b"\xff"):
        (run / "best.json").write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"best\.json cannot be read"):
            read_best(run)


def test_an_overwritten_folder_is_never_a_mix(
    run: Location, state: Callable[[int], TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt after each single write or deletion: the folder is the old one, the new one, or no checkpoint."""
    old, new = state(5), replace(state(6), step=5)
    folder = step_folder(run, 5)
    seen = []
    for allowed in range(10):
        checkpoint.save(folder, old, CONFIG, TAXONOMY)
        with monkeypatch.context() as patch:
            left = iter(range(allowed))
            for name in ("write_bytes", "write_with", "delete"):
                patch.setattr(Location, name, interrupted(getattr(Location, name), left))
            try:
                checkpoint.save(folder, new, CONFIG, TAXONOMY)
                complete = True
            except KeyboardInterrupt:
                complete = False
        found = newest(run, load)
        if found is not None:
            assert_same(vars(found), vars(new if complete else old))
        seen.append("none" if found is None else "new" if complete else "old")
        if complete:
            break
    assert seen == ["old", "none", "none", "none", "none", "new"]


def interrupted(method: Any, left: Any) -> Any:
    def limited(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return method(*args)

    return limited


class Payload:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._folder,)


@pytest.mark.parametrize("by_torch", [True, False])
def test_loading_runs_no_code(
    run: Location, state: Callable[[int], TrainingState], tmp_path: Path, by_torch: bool
) -> None:
    trace = tmp_path / "ran"
    folder = save(run, state(5))
    if by_torch:
        torch.save({"step": 5, "optimizer": Payload(trace)}, folder / "state.pt")
    else:
        (folder / "state.pt").write_bytes(pickle.dumps(Payload(trace), protocol=2))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["state.pt"]["sha256"] = sha256((folder / "state.pt").read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpointError, match=r"^[^\n]*was not opened: its state\.pt [^\n]*$"):
        load(step_folder(run, 5))
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # torch raises it after reading a plain pickle
        torch.load(folder / "state.pt", weights_only=False)
    assert trace.exists()  # so the payload works
