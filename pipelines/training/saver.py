"""Saving checkpoints in the background, while the training continues."""

import logging
import threading
import time
from dataclasses import replace
from typing import Any

from torch import Tensor

from maskformer.taxonomy import Taxonomy
from pipelines.checkpoints.state import (
    BestCheckpoint,
    DamagedCheckpointError,
    TrainingState,
    check_files,
    read_best,
    save,
    step_folder,
    steps_saved,
    write_best,
)
from pipelines.config.train import TrainConfig
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location, patience

logger = logging.getLogger(__name__)

_STORAGE_ERRORS = (StorageUnavailableError, UserError, OSError)

_PATIENCE = 10.0
"""Seconds that one operation waits for the storage. It is short, so that a newer state can take the place of one that
waits. During an outage each operation is tried once, since the whole write is repeated."""
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0
"""Seconds between two tries; the wait doubles from the first to the longest."""
_LONGEST_WRITE = 3600.0
"""Seconds after which a write that neither ends nor fails counts as failed, if the patience is shorter."""


class Saver:
    """Writes checkpoints in a thread and deletes the oldest. One process of a run has one: that of rank 0.

    The training never waits for the storage, except in `finish`. While a write is under way or the storage is away,
    only the newest state waits for its turn, and the one marked as the best. A write that failed is tried again.
    """

    def __init__(self, config: TrainConfig, run: Location, taxonomy: Taxonomy) -> None:
        self._config, self._run, self._taxonomy = config, run, taxonomy
        self._changed = threading.Condition()
        """Guards what follows; notified when the thread ends."""
        self._thread: threading.Thread | None = None
        """The thread that writes. It exists only while there is something to do."""
        self._unsaved: list[TrainingState] = []
        """In the order of submission."""
        self._writing: TrainingState | None = None
        self._best: BestCheckpoint | None = None
        """The best checkpoint, until best.json names it or a better one."""
        self._best_due = False
        """Whether the thread must look if `_best` is complete."""
        self._saved: int | None = None
        self._began: float | None = None
        """Since when the thread has been busy with one state."""
        self._failing: tuple[float, Exception] | None = None
        """Since when nothing could be saved, and why."""
        self._bug: BaseException | None = None

    @property
    def saved(self) -> int | None:
        """Step of the newest checkpoint that this process has completely written."""
        return self._saved

    def save(self, state: TrainingState) -> None:
        """Copy the state and return; the copy is written in the background."""
        copied = replace(
            state,
            model=snapshot(state.model),
            optimizer=snapshot(state.optimizer),
            averaged=snapshot(state.averaged),
            progress=snapshot(state.progress),
        )
        with self._changed:
            self._unsaved.append(copied)
            self._drop_superseded()
            self._start()

    def mark_best(self, step: int, quality: float) -> None:
        """Keep the checkpoint after `step` as the best one, and name it in best.json once it is complete.

        The state may be submitted before or after this call. A run that resumes must repeat the call, since it may have
        been interrupted after the checkpoint and before best.json. A complete checkpoint of a better quality stays the
        best one: a run that resumed from an earlier step will reach it again.

        Args:
            quality: the quick PQ; a fraction.
        """
        if not self._config.checkpoint.keep_best:
            return
        with self._changed:
            self._best, self._best_due = BestCheckpoint(step, quality), True
            self._start()

    def check(self) -> None:
        """Raise if nothing could be saved for longer than scaling.storage_patience. Call it every step.

        Raises:
            UserError: the last error is one that the user can correct, such as a full disk (StorageRefusedError).
            StorageUnavailableError: the storage did not answer.
        """
        if self._bug is not None:
            raise RuntimeError("The thread that writes checkpoints failed.") from self._bug
        limit, now = self._config.scaling.storage_patience, time.monotonic()
        failing, began = self._failing, self._began
        if failing is not None and now - failing[0] > limit:
            error = failing[1]
            kind = type(error) if isinstance(error, UserError) else StorageUnavailableError
            raise kind(f"No checkpoint could be saved for {_duration(now - failing[0])}. {error}") from error
        if began is not None and now - began > max(limit, _LONGEST_WRITE):
            raise StorageUnavailableError(
                f"A checkpoint in {self._run} has been written for {_duration(now - began)} without an end. Check the "
                f"storage, and run the same command again to resume."
            )

    def finish(self) -> None:
        """Wait until everything submitted is written.

        Raises:
            UserError, StorageUnavailableError: as `check`.
        """
        with self._changed:
            while not self._changed.wait_for(lambda: self._thread is None, timeout=1.0):
                self.check()
        self.check()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self._thread.start()

    def _drop_superseded(self) -> None:
        """Forget the states that a newer one has replaced, except the one being written and the best."""
        best = None if self._best is None else self._best.step
        newest = self._unsaved[-1]
        self._unsaved = [s for s in self._unsaved if s is newest or s is self._writing or s.step == best]

    def _work(self) -> None:
        wait = _FIRST_WAIT
        try:
            while self._take():
                try:
                    with patience(_PATIENCE if self._failing is None else 0):
                        self._write()
                except _STORAGE_ERRORS as error:
                    self._failed(error)
                    time.sleep(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
                else:
                    wait = _FIRST_WAIT
                    self._delete_old()
        except BaseException as error:  # a bug must end the training, not only this thread
            with self._changed:
                self._bug, self._thread = error, None
                self._changed.notify_all()

    def _take(self) -> bool:
        """Choose what to write next; with nothing to do, end the thread and return False."""
        with self._changed:
            self._writing = self._unsaved[-1] if self._unsaved else None
            if self._writing is None and not self._best_due:
                self._thread = self._began = None
                self._changed.notify_all()
                return False
            self._began = time.monotonic()
            return True

    def _write(self) -> None:
        state = self._writing
        if state is not None:
            save(step_folder(self._run, state.step), state, self._config, self._taxonomy)
            with self._changed:
                self._unsaved = [unsaved for unsaved in self._unsaved if unsaved is not state]
                self._saved = max(state.step, self._saved or 0)
                self._best_due = self._best is not None
            self._recovered()
        if self._best_due:
            self._write_best()

    def _write_best(self) -> None:
        """Name the marked checkpoint in best.json, if it is complete and the named one is not better."""
        with self._changed:
            best, self._best_due = self._best, False
        if best is None:
            return
        try:
            try:
                named = read_best(self._run)
            except DamagedCheckpointError:
                named = None  # it is replaced
            better = named is not None and named.quick_pq > best.quick_pq and self._is_complete(named.step)
            if not better:
                if not self._is_complete(best.step):
                    return  # its state waits, or is about to be submitted
                write_best(self._run, best)
        except _STORAGE_ERRORS:
            self._best_due = True
            raise
        self._recovered()
        with self._changed:
            if self._best is best:
                self._best = None

    def _is_complete(self, step: int) -> bool:
        try:
            check_files(step_folder(self._run, step))
        except DamagedCheckpointError:
            return False
        return True

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._writing = None
            if self._unsaved:
                self._drop_superseded()
            since = time.monotonic() if self._failing is None else self._failing[0]
            first, self._failing, self._began = self._failing is None, (since, error), None
        if first:
            logger.warning(
                "A checkpoint could not be saved. The training continues, and saving is tried again for %s. %s",
                _duration(self._config.scaling.storage_patience),
                error,
            )

    def _recovered(self) -> None:
        failing, self._failing = self._failing, None
        if failing is not None:
            logger.warning(
                "Checkpoints are saved again, after %s; the newest is of step %s.",
                _duration(time.monotonic() - failing[0]),
                self._saved,
            )

    def _delete_old(self) -> None:
        """Delete all but the newest checkpoints and the best. A failure is logged; the next save deletes them."""
        if self._saved is None:
            return
        try:
            with patience(_PATIENCE):
                # Later ones are damaged ones of before the run was resumed; they must not replace the new ones.
                steps = [step for step in steps_saved(self._run) if step <= self._saved]
                complete = [step for step in steps if (step_folder(self._run, step) / "manifest.json").exists()]
                best = (read_best(self._run), self._best)
                kept = {*complete[-self._config.checkpoint.keep :], *(one.step for one in best if one is not None)}
                for step in steps:
                    if step not in kept:
                        # The manifest goes first: what a kill leaves of the folder is then no checkpoint.
                        (step_folder(self._run, step) / "manifest.json").delete()
                        step_folder(self._run, step).delete()
        except (*_STORAGE_ERRORS, DamagedCheckpointError) as error:
            logger.warning("Old checkpoints could not be deleted; this is tried again at the next save. %s", error)


def snapshot(value: Any) -> Any:
    """Copy nested tensors to the CPU, so that training can continue while they are written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
