"""One trial of a sweep as a Ray Tune trainable: a complete training run.

Tune never stops a trial itself. It would consider the trial ended at once and start the next one before the workers
are free, and at the end of a sweep it kills within seconds, while saving may take minutes. Instead a stop is requested;
the trial saves, releases its workers, and reports that it has ended.
"""

import queue
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune

from pipelines.errors import RunFailedError, StorageUnavailableError, UserError
from pipelines.storage import set_patience
from pipelines.training import PreparedRun, TrainCallbacks, fit

_POLL_SECONDS = 1.0


class StopRequests:
    """The trials that were asked to stop, stored as files in a folder that the driver and its trials share."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def add(self, name: str) -> None:
        """Ask one trial to stop."""
        (self._folder / name).touch()

    def add_all(self) -> None:
        """Ask all trials to stop, including those that have not started."""
        self.add("all")

    @property
    def all(self) -> bool:
        """Whether all trials were asked to stop."""
        return (self._folder / "all").exists()

    def __contains__(self, name: str) -> bool:
        """Return whether this trial itself was asked to stop."""
        return (self._folder / name).exists()


class TrainingTrial(tune.Trainable):
    """Trains in a thread. Reports `step` and `pq` for each quick PQ, and finally `status` and `cause`."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride] -- tune.with_parameters adds `runs`
        self, config: dict[str, Any], runs: Mapping[str, PreparedRun]
    ) -> None:
        """Start the training.

        Args:
            config: `name` of the trial, and `stop_requests`, the folder of the StopRequests.
            runs: the runs of all trials by name.
        """
        self._name, self._stop_requests = config["name"], StopRequests(config["stop_requests"])
        self._reports: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._callbacks = TrainCallbacks(on_quick_pq=lambda step, pq: self._reports.put({"step": step, "pq": pq}))
        threading.Thread(target=self._train, args=(runs[self._name],), name="training", daemon=True).start()

    def step(self) -> dict[str, Any]:
        """Wait for the next report and return it."""
        while True:
            if self._stop_requests.all or self._name in self._stop_requests:
                self._callbacks.stop_requested.set()
            try:
                return self._reports.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue

    def _train(self, run: PreparedRun) -> None:
        set_patience(run.config.scaling.storage_patience)  # a trial starts also while the storage is away
        try:
            status = "stopped" if self._stop_requests.all else fit(run, self._callbacks).status
            end = {"status": status, "cause": ""}
        except KeyboardInterrupt:  # stopped before there was anything to save
            end = {"status": "stopped", "cause": ""}
        except (UserError, RunFailedError, StorageUnavailableError) as error:
            end = {"status": "failed", "cause": str(error)}
        except BaseException as error:  # no other thread would see it
            end = {"status": "failed", "cause": f"{type(error).__name__}: {error}"}
        self._reports.put({**end, "done": True})
