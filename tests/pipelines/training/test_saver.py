"""Checkpoints are written in the background: the newest and the best are kept, and an outage ends nothing at once."""

import errno
import json
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.storage
from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints.state import (
    TrainingState,
    check_files,
    load,
    read_best,
    step_folder,
    steps_saved,
)
from pipelines.checkpoints.state import save as save_checkpoint
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError
from pipelines.storage import Location, _patience_here, locate
from pipelines.training import saver as module
from pipelines.training.saver import Saver, snapshot

CONFIG = replace(DEMO, checkpoint=replace(DEMO.checkpoint, keep=2))
IMPATIENT = replace(CONFIG, scaling=replace(CONFIG.scaling, storage_patience=0))
TAXONOMY = Taxonomy(COCO.categories[:7])


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


@pytest.fixture(autouse=True)
def tries_follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_WAIT", 0.001)
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.001)


def state(step: int) -> TrainingState:
    return TrainingState(step, {"weight": torch.full((3,), float(step))}, {})


def saver(run: Location, config: TrainConfig = CONFIG) -> Saver:
    return Saver(config, run, TAXONOMY)


def save(saver: Saver, step: int) -> None:
    saver.save(state(step))
    saver.finish()


def settle(writer: Saver) -> None:
    """Wait as `finish` does, without a check of the patience."""
    if writer._thread is not None:
        writer._thread.join(60)


class Storage:
    """Stands before `save`: it can hold up writes and fail on command, and remembers what was asked of it."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()
        self.tries = threading.Semaphore(0)
        self.tried: list[int] = []
        self.patience: list[float | None] = []
        self.written: list[int] = []

    def save(self, folder: Location, state: TrainingState, config: TrainConfig, taxonomy: Taxonomy) -> None:
        self.tried.append(state.step)
        self.patience.append(_patience_here.get())
        self.tries.release()
        assert self.open.wait(60)
        if self.error is not None:
            raise self.error
        save_checkpoint(folder, state, config, taxonomy)
        self.written.append(state.step)

    def wait_for_tries(self, number: int) -> None:
        for _ in range(number):
            assert self.tries.acquire(timeout=60)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    storage = Storage()
    monkeypatch.setattr(module, "save", storage.save)
    return storage


# ---- what is written and what is kept


def test_only_the_newest_are_kept(run: Location) -> None:
    writer, kept = saver(run), []
    assert writer.saved is None
    for step in (5, 10, 15, 20):
        save(writer, step)
        assert writer.saved == step
        kept.append(steps_saved(run))
    assert kept == [[5], [5, 10], [10, 15], [15, 20]]
    for step in (15, 20):
        loaded = load(step_folder(run, step))
        assert (loaded.step, loaded.model["weight"].tolist()) == (step, [step] * 3)


def test_an_earlier_checkpoint_is_not_deleted_for_later_ones(run: Location) -> None:
    """After damage, a run resumes from an older checkpoint; the damaged later ones must not replace the new ones."""
    for step in (5, 10, 15, 20):
        save_checkpoint(step_folder(run, step), state(step), CONFIG, TAXONOMY)
    save(saver(run), 10)
    assert steps_saved(run) == [5, 10, 15, 20]


def test_folders_of_interrupted_writes_are_deleted_and_do_not_count(run: Location) -> None:
    writer = saver(run)
    save(writer, 5)
    for step in (7, 12):
        (step_folder(run, step) / "state.pt").write_bytes(b"cut off")
    save(writer, 10)
    assert steps_saved(run) == [5, 10, 12]
    save(writer, 15)
    assert steps_saved(run) == [10, 15]


def test_the_state_is_copied_before_save_returns(run: Location, storage: Storage) -> None:
    storage.open.clear()
    submitted = TrainingState(
        5, {"w": torch.zeros(2)}, {"state": {0: {"m": torch.zeros(2)}}}, {"w": torch.zeros(2)}, {"best": [1]}
    )
    writer = saver(run)
    writer.save(submitted)
    submitted.model["w"] += 1
    submitted.optimizer["state"][0]["m"] += 1
    assert submitted.averaged is not None
    submitted.averaged["w"] += 1
    submitted.progress["best"].append(2)
    storage.open.set()
    writer.finish()
    loaded = load(step_folder(run, 5))
    assert loaded.averaged is not None
    tensors = [loaded.model["w"], loaded.optimizer["state"][0]["m"], loaded.averaged["w"]]
    assert [tensor.tolist() for tensor in tensors] == [[0.0, 0.0]] * 3
    assert loaded.progress == {"best": [1]}


def test_a_snapshot_keeps_types() -> None:
    weights = torch.zeros(2)
    copied = snapshot({"a": [weights, 1], "b": (weights,), "c": None})
    assert (type(copied["a"]), type(copied["b"]), copied["a"][1], copied["c"]) == (list, tuple, 1, None)


def test_a_slow_write_never_holds_the_training_up_and_the_newest_state_wins(run: Location, storage: Storage) -> None:
    storage.open.clear()
    writer = saver(run)
    for step in (5, 10, 15, 20):
        writer.save(state(step))
        storage.wait_for_tries(step == 5)
        writer.check()
    assert (storage.tried, writer.saved) == ([5], None)
    storage.open.set()
    writer.finish()
    assert (storage.written, writer.saved) == ([5, 20], 20)
    assert steps_saved(run) == [5, 20]


# ---- failures


@pytest.mark.parametrize(
    "error", [StorageUnavailableError("No answer."), UserError("Disk full."), OSError(errno.EIO, "I/O error")]
)
def test_a_failed_save_is_repeated_until_it_works_and_told_once(
    run: Location, storage: Storage, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    storage.error = error
    writer = saver(run)
    writer.save(state(5))
    storage.wait_for_tries(4)
    writer.check()
    assert writer.saved is None
    storage.error = None
    writer.finish()
    assert (storage.written, writer.saved) == ([5], 5)
    first, last = caplog.messages
    assert first.startswith("A checkpoint could not be saved. The training continues, ")
    assert "tried again for 15 minutes" in first
    assert str(error) in first
    assert last.startswith("Checkpoints are saved again, after ")
    assert last.endswith("the newest is of step 5.")
    assert storage.patience[:4] == [10, 0, 0, 0]  # then the storage itself does not wait, nor log each time
    assert _patience_here.get() is None

    storage.error = error  # another outage is told again
    writer.save(state(10))
    while storage.tried.count(10) < 2:
        storage.wait_for_tries(1)
    storage.error = None
    writer.finish()
    assert len(caplog.messages) == 4


def test_a_newer_state_takes_the_place_of_one_that_cannot_be_saved(run: Location, storage: Storage) -> None:
    storage.error = StorageUnavailableError("No answer.")
    writer = saver(run)
    writer.save(state(5))
    storage.wait_for_tries(2)
    storage.open.clear()
    storage.wait_for_tries(1)
    writer.save(state(10))  # while a try is under way
    storage.open.set()
    while storage.tried[-1] != 10:
        storage.wait_for_tries(1)
    storage.error = None
    writer.finish()
    assert storage.written == [10]
    assert storage.tried == sorted(storage.tried)
    assert steps_saved(run) == [10]


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (StorageUnavailableError("No answer."), StorageUnavailableError, "No answer."),
        (UserError("No."), UserError, "No."),
        (StorageRefusedError("Disk full."), StorageRefusedError, "Disk full."),
        (OSError(errno.EIO, "I/O error"), StorageUnavailableError, "I/O error"),
    ],
)
def test_the_training_ends_when_the_patience_is_over(
    run: Location, storage: Storage, error: Exception, kind: type[Exception], message: str
) -> None:
    storage.error = error
    writer = saver(run, IMPATIENT)
    writer.save(state(5))
    for call in (writer.finish, writer.check, writer.check):
        with pytest.raises(kind, match=rf"^No checkpoint could be saved for \d+ seconds\. .*{message}") as raised:
            call()
        assert raised.type is kind
    storage.error = None
    settle(writer)
    writer.check()
    assert writer.saved == 5


def test_a_real_storage_that_refuses_is_a_failed_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    writer = saver(locate(tmp_path / "file"), IMPATIENT)
    writer.save(state(5))
    with pytest.raises(UserError, match=r"No checkpoint could be saved .*(Not a directory|File exists)"):
        writer.finish()
    os.unlink(tmp_path / "file")
    settle(writer)
    assert writer.saved == 5


def test_a_network_mount_that_is_away_for_a_while_costs_nothing(
    run: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It fails at every write in turn, and no error is any but that of the system."""
    monkeypatch.setattr(module, "_PATIENCE", 0)
    replace_file, calls = pipelines.storage._replace, iter(range(1, 100))

    def away(target: Path, fill: Any) -> Any:
        if next(calls) in (1, 3, 6, 10):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return replace_file(target, fill)

    monkeypatch.setattr(pipelines.storage, "_replace", away)
    writer = saver(run)
    save(writer, 5)
    assert load(step_folder(run, 5)).step == 5
    assert next(calls) == 15  # 1, 2, 3 and 4 files, the last of which failed, and then all 4
    assert [message.split(".")[0] for message in caplog.messages] == [
        "A checkpoint could not be saved",
        "Checkpoints are saved again, after 0 seconds; the newest is of step 5",
    ]


def test_a_write_without_an_end_is_noticed(run: Location, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.open.clear()
    writer = saver(run, IMPATIENT)
    writer.save(state(5))
    storage.wait_for_tries(1)
    writer.check()  # slow, for now
    monkeypatch.setattr(module, "_LONGEST_WRITE", 0)
    for call in (writer.check, writer.finish):
        with pytest.raises(StorageUnavailableError, match=r"has been written for .* without an end"):
            call()
    storage.open.set()
    settle(writer)
    writer.check()


def test_a_bug_in_the_thread_ends_the_training(run: Location, storage: Storage) -> None:
    storage.error = ZeroDivisionError("bug")
    writer = saver(run)
    writer.save(state(5))
    for call in (writer.finish, writer.check):
        with pytest.raises(RuntimeError, match="thread that writes checkpoints failed") as failure:
            call()
        assert failure.value.__cause__ is storage.error


def test_a_failed_deletion_is_logged_and_made_up_for(
    run: Location, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = saver(run, IMPATIENT)
    for step in (5, 10):
        save(writer, step)
    delete = Location.delete

    def refuse(self: Location) -> None:
        if self.name == "step_00000005":
            raise UserError(f"Cannot delete {self}.")
        delete(self)

    with monkeypatch.context() as patch:
        patch.setattr(Location, "delete", refuse)
        save(writer, 15)
    writer.check()
    assert (writer.saved, steps_saved(run)) == (15, [5, 10, 15])
    assert not (step_folder(run, 5) / "manifest.json").exists()  # what is left is no checkpoint
    (message,) = caplog.messages
    assert message.startswith("Old checkpoints could not be deleted; this is tried again at the next save. Cannot")
    save(writer, 20)
    assert steps_saved(run) == [15, 20]


# ---- the best checkpoint


@pytest.mark.parametrize("first", ["save", "mark"])
def test_the_best_is_kept_until_there_is_a_better_one(run: Location, first: str) -> None:
    writer, kept = saver(run), []
    best = {10: 0.5, 30: 0.75}
    for step in range(5, 50, 5):
        if step in best and first == "mark":
            writer.mark_best(step, best[step])
        writer.save(state(step))
        if step in best and first == "save":
            writer.mark_best(step, best[step])
        writer.finish()
        kept.append(steps_saved(run))
    assert kept == [
        [5], [5, 10], [10, 15], [10, 15, 20], [10, 20, 25], [25, 30], [30, 35], [30, 35, 40], [30, 40, 45]
    ]  # fmt: skip
    assert json.loads((run / "best.json").read_text()) == {"step": 30, "quick_pq": 0.75}


def test_the_best_file_never_names_an_incomplete_checkpoint(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look after each single write and deletion, for random qualities, as a kill may come at any of these moments."""
    looks: list[int] = []

    def watched(method: Any) -> Any:
        def call(self: Location, *args: Any) -> Any:
            result = method(self, *args)
            best = read_best(run)
            if best is not None:
                check_files(step_folder(run, best.step))
                looks.append(best.step)
            return result

        return call

    for name in ("write_bytes", "write_with", "delete"):
        monkeypatch.setattr(Location, name, watched(getattr(Location, name)))
    rng = random.Random(0)
    writer, best, marked = saver(run), 0.0, []
    for step in range(1, 60):
        quality = rng.random() * (20 + step)
        if quality > best:
            best = quality
            marked.append(step)
            writer.mark_best(step, quality)
        writer.save(state(step))
        if rng.random() < 0.3:
            writer.finish()
    writer.finish()
    writer.check()
    assert len(marked) > 5
    assert {marked[0], marked[-1]} <= set(looks) <= set(marked)
    assert read_best(run) is not None
    assert load(step_folder(run, marked[-1])).step == marked[-1]


def test_the_best_state_is_not_lost_in_an_outage(run: Location, storage: Storage) -> None:
    storage.error = StorageUnavailableError("No answer.")
    writer = saver(run)
    for step in (5, 10, 15, 20):
        writer.save(state(step))
        if step == 10:
            writer.mark_best(step, 0.5)
        while storage.tried[-1:] != [step]:
            storage.wait_for_tries(1)
    assert read_best(run) is None
    storage.error = None
    writer.finish()
    assert storage.written[-2:] == [20, 10]
    assert steps_saved(run) == [10, 20]
    assert (writer.saved, read_best(run)) == (20, module.BestCheckpoint(10, 0.5))


def test_best_json_is_written_after_an_outage_too(run: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    write, tries = module.write_best, threading.Semaphore(0)

    def failing(*args: Any) -> None:
        tries.release()
        if not answers.is_set():
            raise StorageUnavailableError("No answer.")
        write(*args)

    monkeypatch.setattr(module, "write_best", failing)
    writer = saver(run)
    writer.mark_best(5, 0.5)
    writer.save(state(5))
    for _ in range(3):
        assert tries.acquire(timeout=60)
    answers.set()
    writer.finish()
    assert (writer.saved, read_best(run)) == (5, module.BestCheckpoint(5, 0.5))


@pytest.mark.parametrize(
    ("damaged", "expected"), [(False, module.BestCheckpoint(20, 0.75)), (True, module.BestCheckpoint(10, 0.5))]
)
def test_a_resumed_run_names_the_best_again(run: Location, damaged: bool, expected: object) -> None:
    """It was killed after the checkpoint of step 10 and before best.json; or it resumed from before the best."""
    for step in (5, 10, 20):
        save_checkpoint(step_folder(run, step), state(step), CONFIG, TAXONOMY)
    writer = saver(run)
    writer.mark_best(10, 0.5)
    writer.finish()
    assert read_best(run) == module.BestCheckpoint(10, 0.5)
    writer.mark_best(20, 0.75)
    writer.finish()
    assert read_best(run) == module.BestCheckpoint(20, 0.75)
    if damaged:
        (step_folder(run, 20) / "state.pt").delete()
    writer = saver(run)
    writer.mark_best(10, 0.5)
    save(writer, 15)
    assert read_best(run) == expected
    assert 20 in steps_saved(run)


def test_a_damaged_best_json_deletes_nothing_and_is_replaced(run: Location, caplog: pytest.LogCaptureFixture) -> None:
    (run / "best.json").write_text("{")
    writer = saver(run)
    for step in (5, 10, 15):
        save(writer, step)
    assert steps_saved(run) == [5, 10, 15]
    assert "best.json cannot be read" in caplog.text
    writer.mark_best(20, 0.5)
    save(writer, 20)
    assert read_best(run) == module.BestCheckpoint(20, 0.5)
    assert steps_saved(run) == [15, 20]


def test_without_keep_best_none_is_marked(run: Location) -> None:
    writer = saver(run, replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, keep_best=False)))
    for step in (5, 10, 15):
        writer.mark_best(step, 0.5)
        save(writer, step)
    assert steps_saved(run) == [10, 15]
    assert read_best(run) is None


def test_an_idle_saver_has_no_thread(run: Location) -> None:
    before = threading.active_count()
    writer = saver(run)
    save(writer, 5)
    assert threading.active_count() == before
    save(writer, 10)
    assert writer.saved == 10
