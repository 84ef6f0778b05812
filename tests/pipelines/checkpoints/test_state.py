"""A saved state is read back bit for bit or not at all, and reading it never runs code."""

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer import build_model
from maskformer.optim import build_optimizer
from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import load_model
from pipelines.checkpoints.state import (
    DamagedCheckpointError,
    TrainingState,
    check_files,
    load,
    newest,
    read_manifest,
    step_folder,
)
from pipelines.config.recipes import DEMO
from pipelines.errors import UserError
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
    config = replace(CONFIG, scaling=replace(CONFIG.scaling, workers=3, threads=5, device="cpu"))
    folder = step_folder(run, 5)
    checkpoint.save(folder, state(5), config, TAXONOMY)
    for name in FILES - {"manifest.json"}:
        (folder / name).write_bytes(bytes((folder / name).size()))  # not what was written, but as long
    manifest = newest(run, check_files)
    assert manifest is not None
    assert manifest["step"] == 5
    assert manifest["files"].keys() == FILES - {"manifest.json"}
    found = manifest["environment"]
    assert (found["workers"], found["threads"], found["device"]) == (3, 5, "cpu")
    assert found["torch"] == torch.__version__
    assert found.keys() == {"workers", "threads", "device", "torch", "cpu"}
    with pytest.raises(DamagedCheckpointError, match=r"is damaged: model\.safetensors, state\.pt"):
        load(folder)


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
def test_unreadable_storage_is_not_a_damaged_checkpoint(
    run: Location, state: Callable[[int], TrainingState], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """test_storage.py checks that an unreachable server is the UserError that is raised here."""
    for step in (5, 10):
        save(run, state(step))
    read_bytes = Location.read_bytes

    def unreachable(self: Location) -> bytes:
        if self.name == file:
            raise UserError(f"Cannot read {self}: could not connect.")
        return read_bytes(self)

    monkeypatch.setattr(Location, "read_bytes", unreachable)
    for read in (lambda: load(step_folder(run, 10)), lambda: newest(run, load)):
        with pytest.raises(UserError, match=f"^Cannot read .*step_00000010/{file}: could not connect"):
            read()


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
            for name in ("write_bytes", "delete"):
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
