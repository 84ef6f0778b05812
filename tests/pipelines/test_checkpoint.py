"""What was saved comes back bit for bit or not at all, and reading it never runs anything."""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from maskformer import build_model
from maskformer.optim import build_optimizer
from maskformer.taxonomy import COCO, Taxonomy
from pipelines import checkpoint
from pipelines.checkpoint import BackgroundWriter, DamagedCheckpoint, TrainingState
from pipelines.errors import UserError
from pipelines.recipes import DEMO
from pipelines.storage import Location, locate, sha256

CONFIG = replace(
    DEMO,
    model=replace(DEMO.model, hidden_dim=16, feedforward_dim=16, num_queries=4, encoder_layers=0, decoder_layers=1),
)
TAXONOMY = Taxonomy(COCO.categories[:7])
FILES = {"model.safetensors", "state.pt", "config.json", "manifest.json"}


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of a model and an optimizer that have done a step."""
    torch.manual_seed(0)
    model = build_model(CONFIG.model)
    optimizer = build_optimizer(model, CONFIG.optimizer)
    output = model(torch.rand(1, 3, 32, 32), None)
    (output.class_logits.sum() + output.mask_logits.sum()).backward()
    optimizer.step()
    return model.state_dict(), optimizer.state_dict()


@pytest.fixture
def state(trained: tuple[dict[str, Any], dict[str, Any]]) -> Callable[[int], TrainingState]:
    """Return a function that makes the state after a step; each step has weights of its own."""

    def after(step: int) -> TrainingState:
        model, optimizer = (checkpoint.snapshot(part) for part in trained)
        next(iter(model.values())).flatten()[0] = step
        return TrainingState(step, model, optimizer, {"workers": 2, "torch": "2.14.1"})

    return after


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


def save(run: Location, state: TrainingState) -> Path:
    place = checkpoint.folder(run, state.step)
    checkpoint.save(place, state, CONFIG, TAXONOMY)
    return Path(place.path)


def assert_same(ours: Any, theirs: Any) -> None:
    """Compare nests of tensors to the bit, types included."""
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert ours.numpy().tobytes() == theirs.numpy().tobytes()
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_same(mine, other)
    else:
        assert ours == theirs


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_state_comes_back_bit_for_bit(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, state: Callable[[int], TrainingState]
) -> None:
    run = locate(str(tmp_path) if kind == "local" else request.getfixturevalue("bucket")) / "run"
    saved = state(120)
    saved.model["odd"] = torch.tensor([float("nan"), -0.0, 1e-45])
    checkpoint.save(checkpoint.folder(run, 120), saved, CONFIG, TAXONOMY)
    assert (run / "checkpoints").names() == ["step_00000120"]
    assert set((run / "checkpoints" / "step_00000120").names()) == FILES
    loaded = checkpoint.newest(run)
    assert loaded is not None
    assert_same(vars(loaded), vars(saved))
    model = checkpoint.load_model(run)
    assert (model.step, model.config, model.taxonomy) == (120, CONFIG, TAXONOMY)
    assert_same(model.weights, saved.model)


def test_no_checkpoint(run: Location) -> None:
    assert checkpoint.newest(run) is None
    (run / "checkpoints" / "step_00000005" / "state.pt").write_bytes(b"cut off")
    (run / "checkpoints" / "notes.txt").write_bytes(b"")
    assert checkpoint.newest(run) is None


def test_ten_digits_are_newer_than_eight(run: Location, state: Callable[[int], TrainingState]) -> None:
    for step in (99_999_999, 1_000_000_000):
        save(run, state(step))
    assert [loaded.step for loaded in [checkpoint.newest(run)] if loaded] == [1_000_000_000]


def remove_manifest(place: Path) -> None:
    (place / "manifest.json").unlink()


def truncate_manifest(place: Path) -> None:
    content = (place / "manifest.json").read_bytes()
    (place / "manifest.json").write_bytes(content[: len(content) // 2])


def empty_manifest(place: Path) -> None:
    (place / "manifest.json").write_text("[]")


def truncate_state(place: Path) -> None:
    os.truncate(place / "state.pt", (place / "state.pt").stat().st_size // 2)


def flip_bit_of_weights(place: Path) -> None:
    data = bytearray((place / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (place / "model.safetensors").write_bytes(data)


def remove_weights(place: Path) -> None:
    (place / "model.safetensors").unlink()


def other_version(place: Path) -> None:
    manifest = json.loads((place / "manifest.json").read_text())
    (place / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))


DAMAGES: dict[Callable[[Path], None], str] = {
    truncate_manifest: "cannot be read",
    empty_manifest: "cannot be read",
    truncate_state: "state.pt does not have the hash",
    flip_bit_of_weights: "model.safetensors does not have the hash",
    remove_weights: "model.safetensors",
    other_version: "version 99",
}


def test_a_folder_without_manifest_was_never_finished(
    run: Location, state: Callable[[int], TrainingState], caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10):
        place = save(run, state(step))
    remove_manifest(place)
    found = checkpoint.newest(run)
    assert found is not None
    assert_same(vars(found), vars(state(5)))
    assert caplog.messages == []  # nothing is wrong with that


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(
    run: Location, state: Callable[[int], TrainingState], damage: Callable[[Path], None], caplog: Any
) -> None:
    for step in (5, 10):
        place = save(run, state(step))
    damage(place)
    with pytest.raises(DamagedCheckpoint, match=DAMAGES[damage]):
        checkpoint.load(checkpoint.folder(run, 10))
    found = checkpoint.newest(run)
    assert found is not None
    assert_same(vars(found), vars(state(5)))
    (message,) = caplog.messages
    assert "step_00000010" in message
    assert DAMAGES[damage] in message


def test_all_damaged_is_refused_rather_than_begun_anew(run: Location, state: Callable[[int], TrainingState]) -> None:
    for step in (5, 10):
        flip_bit_of_weights(save(run, state(step)))
    with pytest.raises(UserError) as error:
        checkpoint.newest(run)
    for word in ("step_00000005", "step_00000010", "model.safetensors", f"delete the folder {run}/checkpoints"):
        assert word in str(error.value)
    with pytest.raises(UserError, match=r"step_00000010.*step_00000005"):
        checkpoint.load_model(run)


def test_unreachable_storage_is_not_a_damaged_checkpoint(
    bucket: str, state: Callable[[int], TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = locate(bucket) / "run" / "checkpoints" / "step_00000005"
    checkpoint.save(place, state(5), CONFIG, TAXONOMY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        checkpoint.load(locate(place.uri))


def test_only_the_newest_are_kept(run: Location, state: Callable[[int], TrainingState]) -> None:
    writer = BackgroundWriter(run, keep=2)
    kept = []
    for step in (5, 10, 15, 20):
        writer.submit(state(step), CONFIG, TAXONOMY)
        writer.wait()
        kept.append(checkpoint.steps_saved(run))
    assert kept == [[5], [5, 10], [10, 15], [15, 20]]
    assert checkpoint.load(checkpoint.folder(run, 15)).step == 15


def test_a_run_that_went_back_does_not_lose_what_it_saves(run: Location, state: Callable[[int], TrainingState]) -> None:
    """After damage a run goes on from an older checkpoint; the damaged ones ahead must not push out the new ones."""
    for step in (5, 10, 15, 20):
        save(run, state(step))
    writer = BackgroundWriter(run, keep=2)
    writer.submit(state(10), CONFIG, TAXONOMY)
    writer.wait()
    assert checkpoint.steps_saved(run) == [5, 10, 15, 20]


def test_a_failed_save_is_raised_at_the_next_call(tmp_path: Path, state: Callable[[int], TrainingState]) -> None:
    (tmp_path / "file").write_bytes(b"")
    writer = BackgroundWriter(locate(tmp_path / "file"), keep=2)
    writer.submit(state(5), CONFIG, TAXONOMY)
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        writer.wait()


def test_an_overwritten_folder_is_never_half_of_each(
    run: Location, state: Callable[[int], TrainingState], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after each single write or deletion: the folder is the old one, the new one, or no checkpoint."""
    old, new = state(5), replace(state(6), step=5)
    place = checkpoint.folder(run, 5)
    seen = []
    for allowed in range(10):
        checkpoint.save(place, old, CONFIG, TAXONOMY)
        with monkeypatch.context() as patch:
            left = iter(range(allowed))
            for name in ("write_bytes", "delete"):
                patch.setattr(Location, name, cut_off(getattr(Location, name), left))
            try:
                checkpoint.save(place, new, CONFIG, TAXONOMY)
                whole = True
            except KeyboardInterrupt:
                whole = False
        found = checkpoint.newest(run)
        if found is not None:
            assert_same(vars(found), vars(new if whole else old))
        seen.append("none" if found is None else "new" if whole else "old")
        if whole:
            break
    assert seen == ["old", "none", "none", "none", "none", "new"]


def cut_off(method: Any, left: Any) -> Any:
    def limited(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return method(*args)

    return limited


def test_a_model_is_read_from_a_run_or_from_a_checkpoint(run: Location, state: Callable[[int], TrainingState]) -> None:
    places = [save(run, state(step)) for step in (5, 10, 15)]
    flip_bit_of_weights(places[-1])
    assert checkpoint.load_model(run).step == 10
    assert checkpoint.load_model(locate(f"{places[0]}/")).step == 5
    moved = Path(run.path).with_name("step_00000005")
    shutil.copytree(places[0], moved)
    assert checkpoint.load_model(locate(moved)).uri == str(moved)
    with pytest.raises(UserError, match=r"step_00000015 is damaged"):
        checkpoint.load_model(locate(places[-1]))


@pytest.mark.parametrize("below", ["absent", ".", "run/checkpoints", "run/checkpoints/step_00000005/state.pt"])
def test_a_wrong_place_for_a_model(run: Location, state: Callable[[int], TrainingState], below: str) -> None:
    save(run, state(5))
    with pytest.raises(UserError, match=r"Name a run's folder .* or one of its checkpoints/step_\* folders"):
        checkpoint.load_model(locate(Path(run.path).parent / below))


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._folder,)


@pytest.mark.parametrize("by_torch", [True, False])
def test_loading_runs_nothing(
    run: Location, state: Callable[[int], TrainingState], tmp_path: Path, by_torch: bool
) -> None:
    trace = tmp_path / "ran"
    place = save(run, state(5))
    if by_torch:
        torch.save({"step": 5, "optimizer": Payload(trace), "surroundings": {}}, place / "state.pt")
    else:
        (place / "state.pt").write_bytes(pickle.dumps(Payload(trace), protocol=2))
    manifest = json.loads((place / "manifest.json").read_text())
    manifest["files"]["state.pt"]["sha256"] = sha256((place / "state.pt").read_bytes())
    (place / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match=r"^[^\n]*is not opened: its state\.pt [^\n]*$"):
        checkpoint.load(checkpoint.folder(run, 5))
    assert not trace.exists()
    with contextlib.suppress(RuntimeError):  # what it says after a plain pickle was read
        torch.load(place / "state.pt", weights_only=False)
    assert trace.exists()  # so it would have run


def test_a_snapshot_does_not_follow_the_training() -> None:
    weights = torch.zeros(2)
    copied = checkpoint.snapshot({"a": [weights, 1], "b": (weights,)})
    weights += 1
    assert_same(copied, {"a": [torch.zeros(2), 1], "b": (torch.zeros(2),)})
