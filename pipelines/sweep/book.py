"""What has become of each trial of a sweep: `<sweep>/trials.json`, which the driver alone writes."""

import dataclasses
import json
import logging
from dataclasses import replace
from typing import Any

from ray import tune

from pipelines.errors import UserError
from pipelines.storage import Location
from pipelines.sweep import report
from pipelines.sweep.report import TrialRecord
from pipelines.training import ledger

logger = logging.getLogger(__name__)

_ENDED = {"finished", "stopped early", "failed"}


class Book:
    """The trials of a sweep by their names."""

    def __init__(self, folder: Location, values: list[dict[str, Any]]) -> None:
        """Open the book of the sweep in `folder`, or begin it with a trial for each of `values`.

        Trials that failed are opened again: what ended them may have been mended since.
        """
        self.folder = folder
        self._place = folder / "trials.json"
        fresh = [TrialRecord(f"trial-{number:03d}", each, "waiting", []) for number, each in enumerate(values)]
        self._trials = {trial.name: trial for trial in (self._read() if self._place.exists() else fresh)}
        for trial in self.records:
            if trial.status == "failed":
                self._trials[trial.name] = replace(trial, status="waiting", cause="")

    def _read(self) -> list[TrialRecord]:
        try:
            lines = json.loads(self._place.read_text())
            return [TrialRecord(**{**line, "results": [(s, pq) for s, pq in line["results"]]}) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._place} is not the trials.json of a sweep ({type(error).__name__}: {error}). Put the right one "
                f"back, or choose another --run.name."
            ) from error

    @property
    def records(self) -> list[TrialRecord]:
        return list(self._trials.values())

    @property
    def open(self) -> list[TrialRecord]:
        """Those that have not ended."""
        return [trial for trial in self.records if trial.status not in _ENDED]

    def add_result(self, name: str, step: int, pq: float) -> None:
        """Write down a quick PQ; one of the same step is the same result, computed again."""
        trial = self._trials[name]
        results = sorted({**dict(trial.results), step: pq}.items())
        self._trials[name] = replace(trial, status="running", results=results)
        self._write()

    def end(self, name: str, status: str, cause: str = "") -> None:
        """Write down how a trial ended."""
        self._trials[name] = replace(self._trials[name], status=status, cause=cause)
        self._write()

    def prune(self, gigabytes: float) -> None:
        """Delete checkpoints of ended trials until the rest takes at most `gigabytes`; the best trial's always stay."""
        ended = [trial for trial in report.ranking(self.records) if trial.status in _ENDED]
        kept = 0
        for place, trial in enumerate(ended):
            run = self.folder / trial.name
            checkpoints = run / "checkpoints"
            size = checkpoints.size()
            if place == 0 or kept + size <= gigabytes * 1e9:
                kept += size
            elif size and not ledger.Ledger(run).open:  # else it is still saving
                logger.info("Deleting the checkpoints of %s, %.2f GB.", trial.name, size / 1e9)
                checkpoints.delete()

    def recorder(self, gigabytes: float) -> "_Recorder":
        """Return what Tune is to call: it writes here, and prunes to `gigabytes`."""
        return _Recorder(self, gigabytes)

    def _write(self) -> None:
        self._place.write_text(json.dumps([dataclasses.asdict(trial) for trial in self.records], indent=1))


class _Recorder(tune.Callback):
    def __init__(self, book: Book, gigabytes: float) -> None:
        self._book, self._gigabytes = book, gigabytes

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        name = trial.config["trial"]["name"]
        if "pq" in result:
            logger.info("%s  step %d  quick PQ %.1f", name, result["step"], 100 * result["pq"])
            self._book.add_result(name, result["step"], result["pq"])
        if "status" in result:
            self._end(name, result["status"], result["cause"])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        name = trial.config["trial"]["name"]
        if name in {each.name for each in self._book.open}:
            self._end(name, "stopped early")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        self._end(trial.config["trial"]["name"], "failed", "its process died")

    def _end(self, name: str, status: str, cause: str = "") -> None:
        logger.info("%s  %s%s", name, status, f": {cause}" if cause else "")
        self._book.end(name, status, cause)
        self._book.prune(self._gigabytes)
