"""Show how far a training run is, whether it is alive, what its attempts cost and where its time went.

python jobs/status.py --run runs/demo
"""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from jobs.shared.cli import parse, run
from pipelines import columns
from pipelines.credentials import redacted
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.storage import Location
    from pipelines.training.goodput import Goodput, History

_ALIVE_SECONDS = 60.0
"""The driver writes status.json every 10 seconds."""


@dataclass(frozen=True, kw_only=True)
class _Flags:
    run: str
    """Folder of a run, a path or s3:// URI. For a folder of several runs: a line for each."""
    attempts: int = 10
    """Attempts to list, the last ones."""
    json: bool = False
    """Print JSON, for programs."""


@dataclass(kw_only=True)
class _Report:
    """What is known of a run. All texts are printable."""

    run: str
    state: str
    """`running`, `finished`, `stopped`, `failed`, `interrupted`, `dead` or `not started`."""
    phase: str = ""
    """What a running run does: `waiting for resources`, `starting` or `training`."""
    step: int | None = None
    total: int | None = None
    loss: float | None = None
    images_per_second: float | None = None
    eta_seconds: float | None = None
    seconds_silent: float | None = None
    """Since the last sign of life of the driver; None after the end."""
    newest_checkpoint: int | None = None
    best_checkpoint: int | None = None
    best_quick_pq: float | None = None
    """A fraction."""
    cause: str = ""
    """Why the run failed."""
    mlflow_run: str = ""
    goodput: "Goodput"
    notes: list[str] = field(default_factory=list)
    """What could not be read."""


def main() -> None:
    flags = parse(_Flags, description=__doc__)
    if flags.attempts < 0:
        raise UserError(f"--attempts is {flags.attempts}. Give the number of attempts to list, 0 for none.")
    from pipelines.storage import locate  # imports pyarrow, which --help should not

    folder, now = locate(flags.run), time.time()
    if (report := _look(folder, now)) is not None:
        print(_json(report) if flags.json else _page(report, flags.attempts))
        return
    names = folder.names()
    with ThreadPoolExecutor(8) as pool:  # an object store answers slowly, but many at once
        reports = list(filter(None, pool.map(lambda name: _look(folder / name, now), names)))
    if not reports:
        found = f"holds {', '.join(map(ascii, names[:5]))}" if names else "is empty or does not exist"
        raise UserError(
            f"{folder} is not the folder of a run or of several runs: it {found}. Give --run <storage>/<run name>, or "
            f"the storage."
        )
    print(_json(reports) if flags.json else _table(reports))


def _look(folder: "Location", now: float) -> _Report | None:
    """Read what is known of a run; None if the folder is not that of a run.

    Args:
        now: seconds since 1970.
    """
    from pipelines.training import goodput
    from pipelines.training.goodput import count, number, printable

    names = folder.names() if folder.is_dir() else []
    if not {"config.json", "ledger.jsonl", "status.json"}.intersection(names):
        return None
    history = goodput.read(folder)
    events, status, notes = history.events, history.status, history.notes
    record = goodput.read_object(folder / "config.json", notes)
    if not events and not status and "total_steps" not in record:  # the config.json of something else
        return None
    state = _state(history, now)
    last = {} if state == "running" or not events else events[-1]
    accounts = goodput.account(events, status)
    reached = [count(status.get("step")), *(attempt.reached for attempt in accounts.attempts[-1:])]
    reached += [attempt.started for attempt in accounts.attempts[-1:]]
    report = _Report(
        run=printable(folder.uri),
        state=state,
        step=next((step for step in reached if step is not None), None),
        total=count(record.get("total_steps")) or count(status.get("total")),
        loss=number(status.get("loss")),
        newest_checkpoint=_newest_checkpoint(folder),
        mlflow_run=_mlflow_run(record),
        goodput=accounts,
        notes=notes,
    )
    if state == "running":
        report.phase = printable(status.get("phase"))
        report.images_per_second = number(status.get("images_per_second"))
        report.eta_seconds = number(status.get("eta_seconds"))
    if state in ("running", "dead"):
        signs = (number(sign.get("time")) for sign in (status, *events[-1:]))
        report.seconds_silent = max(0.0, now - max(filter(None, signs), default=now))
    elif state != "finished":
        report.cause = printable(last.get("cause"))
    if "best.json" in names:
        best = goodput.read_object(folder / "best.json", notes)
        report.best_checkpoint, report.best_quick_pq = count(best.get("step")), number(best.get("quick_pq"))
    return report


def _state(history: "History", now: float) -> str:
    from pipelines.training.goodput import number, printable

    events, status = history.events, history.status
    if not events and not status:
        return "not started"
    ended = events[-1] if events and events[-1]["event"] == "end" else None
    # A status from after the end is of another driver that resumed the run.
    if ended and (number(status.get("began")) or 0.0) <= ended["time"]:
        return printable(ended.get("status")) or "ended"
    written = number(status.get("time"))
    # Clocks differ a little, in either direction.
    alive = written is not None and abs(now - written) < _ALIVE_SECONDS and status.get("phase") != "ended"
    return "running" if alive else "dead"


def _newest_checkpoint(run: "Location") -> int | None:
    """Return the step of the newest checkpoint that is complete, as far as its manifest tells."""
    folder = run / "checkpoints"
    steps = {int(match[1]): name for name in folder.names() if (match := re.fullmatch(r"step_(\d{8,18})", name))}
    complete = (step for step in sorted(steps, reverse=True) if (folder / steps[step] / "manifest.json").exists())
    return next(complete, None)


def _mlflow_run(record: dict[str, Any]) -> str:
    from pipelines.training.goodput import printable

    config = record.get("config")
    tracking = config.get("tracking") if isinstance(config, dict) else None
    uri = printable(tracking.get("uri")) if isinstance(tracking, dict) else ""
    name = printable(record.get("mlflow_run_id"))
    return name and f"{name} at {redacted(uri) or 'an unknown address'}"


def _json(reports: "_Report | list[_Report]") -> str:
    def values(report: _Report) -> dict[str, Any]:
        from pipelines.training.goodput import metrics

        return {**asdict(report), "goodput": {**asdict(report.goodput), "metrics": metrics(report.goodput)}}

    return json.dumps(values(reports) if isinstance(reports, _Report) else list(map(values, reports)), indent=1)


def _page(report: _Report, attempts: int) -> str:
    from pipelines.training.goodput import duration, summary

    state = report.state if not report.phase else f"{report.state}, {report.phase}"
    silent = report.seconds_silent
    if report.state == "dead" and silent is not None:
        state += f": no sign of its driver for {duration(silent)}; the command that started it resumes it"
    elif report.cause:
        state += f": {report.cause[:500]}"
    lines = [f"{report.run}: {state}", f"  {_progress(report)}"]
    checkpoints = []
    if report.newest_checkpoint is not None:
        checkpoints.append(f"newest step {report.newest_checkpoint}")
    if report.best_checkpoint is not None:
        quality = "" if report.best_quick_pq is None else f", quick PQ {100 * report.best_quick_pq:.1f}"
        checkpoints.append(f"best step {report.best_checkpoint}{quality}")
    lines.append(f"  checkpoints: {'; '.join(checkpoints) or 'none'}")
    if report.mlflow_run:
        lines.append(f"  MLflow run {report.mlflow_run}")
    if report.goodput.attempts:
        lines.append(summary(report.goodput, attempts))
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _progress(report: _Report) -> str:
    from pipelines.training.goodput import duration

    facts = [f"step {_steps(report)}"]
    if report.loss is not None:
        facts.append(f"loss {report.loss:.4f}")
    if report.images_per_second is not None:
        facts.append(f"{report.images_per_second:.3g} images/s")
    if report.eta_seconds is not None:
        facts.append(f"{duration(report.eta_seconds)} left")
    return ", ".join(facts)


def _steps(report: _Report) -> str:
    step = "?" if report.step is None else f"{report.step}"
    if not report.total:
        return step
    percent = "" if report.step is None else f" ({100 * report.step / report.total:.1f} %)"
    return f"{step} of {report.total}{percent}"


def _table(reports: list[_Report]) -> str:
    from pipelines.training.goodput import duration

    rows = [("run", "state", "step", "checkpoint", "left", "goodput", "failures")]
    for report in reports:
        left = "" if report.eta_seconds is None else duration(report.eta_seconds)
        checkpoint = "" if report.newest_checkpoint is None else str(report.newest_checkpoint)
        accounts = report.goodput
        share = f"{100 * accounts.useful_share:.1f} %" if accounts.wall else ""
        name = report.run.rpartition("/")[2]
        rows.append((name, report.state, _steps(report), checkpoint, left, share, str(accounts.failures)))
    widths = [max(map(columns.width, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(columns.left, row, widths)).rstrip() for row in rows)
    notes = (f"note: {report.run}: {note}" for report in reports for note in report.notes)
    return "\n".join([*lines, *notes])


if __name__ == "__main__":
    run(main)
