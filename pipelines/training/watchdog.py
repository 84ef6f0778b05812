"""Hangs: which group of workers makes no progress, where each worker is, and which one the others wait for.

Every worker sends a beat once a second: a dictionary of plain values from `Activity.beat`. The driver gives all of
them to `Watchdog.observe`. After a hang it calls `collect`, `describe_hang` and `kill`, so that Ray notices the loss of
the workers and starts the next attempt.
"""

import faulthandler
import json
import logging
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil
import ray
from ray._private import state  # the table of actors; Ray's public one needs the dashboard
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maskformer.untrusted import escaped
from pipelines.credentials import redacted
from pipelines.errors import StorageUnavailableError, UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)

Phase = Literal["start", "quick PQ", "saving", "data", "step", "end"]
Beats = Mapping[int, tuple[Mapping[str, Any], float]]
"""By rank: the latest beat, and the seconds since it arrived."""

_PHASES = {
    "start": "starting",
    "quick PQ": "computing the quick PQ",
    "saving": "waiting for a checkpoint to be written",
    "data": "waiting for data",
    "step": "computing",
    "end": "ending",
}
"""In the order in which a worker goes through them while the number of steps done stays the same."""

_STEPS = 50
"""The usual step is the median of this many."""

_USUAL = 20
"""The limit of a step, or of a quick PQ, in usual ones."""

_FIRST = 3
"""Factor on the limit of the first step of a process, or of the first quick PQ of the driver."""

_ASLEEP_SECONDS = 10.0
"""After a longer pause between two observations the driver may have been suspended, and has old beats."""

_SILENT_SECONDS = 5.0
"""A worker whose last beat is older does not answer."""

_ANSWER_SECONDS = 60.0
"""Timeout of a node's answer. The node may have to start a process first."""

_STACK_SECONDS = 10.0
_WRITE_SECONDS = 20.0

_ROOT = f"{Path(__file__).parents[2]}/"
_FAULTHANDLER_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+) \(most recent call first\):\n")
_FAULTHANDLER_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)')

_stack_file: IO[bytes] | None = None


def register_stack_dump() -> None:
    """Let SIGUSR2 write the stacks of all threads of this process into an unnamed temporary file.

    For nodes where py-spy may not read other processes. May be called in any thread. The signal is handled in C, so it
    also works while a C function runs or another thread holds the GIL. Neither Ray nor PyTorch uses SIGUSR2 in workers.
    """
    global _stack_file
    if _stack_file is None:
        _stack_file = tempfile.TemporaryFile(prefix="maskformer-ray-stacks-")  # noqa: SIM115 - open until the end
        faulthandler.register(signal.SIGUSR2, file=_stack_file, all_threads=True)


class Activity:
    """What a worker is doing. To be created in the thread that trains; `beat` may be called in any other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._phase, self._step, self._image_ids = "start", 0, ()
        self._since = clock()
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._quick_pqs: list[float] = []
        self._process = {
            "pid": os.getpid(),
            "created": psutil.Process().create_time(),
            "thread": threading.get_ident(),
            "host": socket.gethostname(),
            "node_id": ray.get_runtime_context().get_node_id() if ray.is_initialized() else "",
        }

    def enter(self, phase: Phase, step: int, image_ids: tuple[int, ...] = ()) -> None:
        """Begin a phase. The one before has ended.

        Args:
            phase: `start` (restoring), `data` (waiting for micro-batches), `step`, `quick PQ`, `saving` (waiting for a
                write) or `end`.
            step: steps done.
            image_ids: images of the step.
        """
        with self._lock:
            now = self._clock()
            durations = {"step": self._steps, "quick PQ": self._quick_pqs}.get(self._phase)
            if durations is not None:
                durations.append(now - self._since)
            self._phase, self._step, self._image_ids, self._since = phase, step, image_ids, now

    def beat(self) -> dict[str, Any]:
        """Return plain values.

        They are `phase`, `step` (steps done), `image_ids`, `seconds` (in this phase), `usual_step` and
        `longest_quick_pq` (seconds, None before the first has ended), and what identifies the process: `pid`,
        `created`, `thread`, `host`, `node_id` and `stack_file` (None without `register_stack_dump`).
        """
        with self._lock:
            return {
                "phase": self._phase,
                "step": self._step,
                "image_ids": list(self._image_ids),
                "seconds": self._clock() - self._since,
                "usual_step": statistics.median(self._steps) if self._steps else None,
                "longest_quick_pq": max(self._quick_pqs, default=None),
                "stack_file": _stack_file.fileno() if _stack_file else None,
                **self._process,
            }


class Watchdog:
    """Decides whether a group of workers hangs.

    The workers compute in step, so all of them wait for those that are furthest behind: by the number of steps done,
    then by the phase in the order start, quick PQ, saving, data, step, end. The group hangs when the last of these to
    enter the phase has been in it for longer than the phase's limit. A worker that waits in a collective operation
    for one that waits for data is thus within its limits as long as that one is. The limits, in seconds:

        step                     hang_timeout, or 20 usual steps if that is longer; 3 times that for a process's first
        quick PQ                 patience + hang_timeout or 20 times the longest quick PQ; the first: patience + 3 times
                                 the limit of a step
        start, saving, data, end patience + hang_timeout: the storage may be away

    A worker whose beats have not arrived for hang_timeout hangs also: its process is frozen, or C code holds the GIL.
    Only in the last phase may beats end, since the process may have ended.

    After a hang was declared, the group has hang_timeout to end. The beats of an attempt that has ended must not be
    passed on.
    """

    def __init__(self, hang_timeout: float, patience: float) -> None:
        """Set the limits.

        Args:
            hang_timeout: seconds without a step before the workers hang.
            patience: seconds that the storage may be away.
        """
        self._hang_timeout, self._patience = hang_timeout, patience
        self._usual_step = self._longest_quick_pq = 0.0
        self._observed, self._skipped = float("inf"), False
        self._quiet_until = float("-inf")

    def observe(self, beats: Beats, now: float) -> str | None:
        """Return a sentence about the hang if the workers hang, else None.

        Args:
            beats: of the attempt under way; empty if there is none.
            now: time in seconds of a clock that does not go back. To be called about once a second.
        """
        asleep, self._observed = now - self._observed > _ASLEEP_SECONDS, now
        for key in ("usual_step", "longest_quick_pq"):
            if measured := [beat[key] for beat, _ in beats.values() if beat[key] is not None]:
                setattr(self, f"_{key}", max(measured))
        if asleep and not self._skipped:
            self._skipped = True
            return None
        self._skipped = False
        hang = self._hang(beats) if now >= self._quiet_until else None
        if hang is not None:
            self._quiet_until = now + self._hang_timeout
        return hang

    def _hang(self, beats: Beats) -> str | None:
        silent = {
            rank: age for rank, (beat, age) in beats.items() if age > self._hang_timeout and beat["phase"] != "end"
        }
        if silent:
            return (
                f"{_workers(silent)} gave no sign of life for {max(silent.values()):.0f} s "
                f"(limit {self._hang_timeout:g} s)."
            )
        if not beats:
            return None
        behind = furthest_behind(beats)
        # The group cannot continue before the last of them has come this far.
        last = min(behind, key=lambda rank: beats[rank][0]["seconds"] + beats[rank][1])
        beat, age = beats[last]
        seconds, limit = beat["seconds"] + age, self._limit(beat)
        if seconds <= limit:
            return None
        usual = f", a usual step {self._usual_step:.3g} s" if self._usual_step else ""
        who = f"{_workers(behind)} {'has' if len(behind) == 1 else 'have'}"
        return (
            f"{who} spent {seconds:.0f} s {_PHASES[beat['phase']]} at step {beat['step']} (limit {limit:.0f} s{usual})."
        )

    def _limit(self, beat: Mapping[str, Any]) -> float:
        step = max(self._hang_timeout, _USUAL * self._usual_step)
        if beat["phase"] == "step":
            return step if beat["usual_step"] is not None else _FIRST * step
        if beat["phase"] != "quick PQ":
            return self._patience + self._hang_timeout
        if not self._longest_quick_pq:
            return self._patience + _FIRST * step
        return self._patience + max(self._hang_timeout, _USUAL * self._longest_quick_pq)


def furthest_behind(beats: Beats) -> list[int]:
    """Return the ranks of the workers that have done the least: steps, then phases of the same step."""
    order = list(_PHASES)
    done = {rank: (beat["step"], order.index(beat["phase"])) for rank, (beat, _) in beats.items()}
    return sorted(rank for rank in done if done[rank] == min(done.values()))


@dataclass(frozen=True)
class Frame:
    """A line of a stack."""

    function: str
    file: str
    """Path below site-packages or the root of this project, such as `pipelines/training/worker.py`; or absolute."""
    line: int

    def __str__(self) -> str:
        return f"{escaped(self.function)} ({escaped(self.file)}:{self.line})"

    @property
    def is_ours(self) -> bool:
        return self.file.startswith(("pipelines/", "maskformer/", "jobs/"))


@dataclass(frozen=True)
class Inspection:
    """What was found out about a process on its node."""

    state: str
    """As psutil names it, such as `running`, `sleeping`, `stopped`, `zombie` or `gone`; `unknown` without an answer."""
    threads: dict[str, list[Frame]]
    """Frames of every thread, innermost first."""
    training: list[Frame]
    """Frames of the thread that trains, innermost first; empty if there is no stack."""
    problem: str = ""
    """Why there is no stack."""


@dataclass(frozen=True)
class WorkerReport:
    """Where a worker is."""

    rank: int
    beat: Mapping[str, Any]
    age: float
    """Seconds since the beat arrived."""
    inspection: Inspection

    @property
    def answers(self) -> bool:
        """Whether the process runs Python code."""
        return self.age <= _SILENT_SECONDS and self.inspection.state not in ("stopped", "zombie", "gone", "unknown")

    @property
    def waits(self) -> int:
        """How likely the worker waits for others: 0 it does not, 1 it may (in a backward pass), 2 it does.

        With gloo, DDP's all-reduce is within the backward pass. With NCCL, a wait for others looks like any other wait
        for the GPU, and is 0.
        """
        inner: list[Frame] = []
        for frame in self.inspection.training:
            if frame.is_ours:
                break
            inner.append(frame)
        if any(frame.file.startswith(("torch/distributed/", "ray/train/")) for frame in inner):
            return 2
        return int(any(frame.file.startswith("torch/autograd/") for frame in inner))

    def __str__(self) -> str:
        beat, found = self.beat, self.inspection
        images = ", ".join(map(str, beat["image_ids"][:8])) + (", ..." if len(beat["image_ids"]) > 8 else "")
        where = [frame for frame in found.training if frame.is_ours][:3]
        if found.training and found.training[0] not in where:
            where.insert(0, found.training[0])
        return (
            f"Worker {self.rank} ({escaped(str(beat['host']))}, node {escaped(str(beat['node_id'])[:12])}, pid "
            f"{beat['pid']}) has spent {beat['seconds'] + self.age:.0f} s {_PHASES[beat['phase']]} at step "
            f"{beat['step']}"
            + (f" with the images {images}" if images else "")
            + (f"; its last sign of life is {self.age:.0f} s old" if self.age > _SILENT_SECONDS else "")
            + f"; its process is {found.state}"
            + (
                f". It is in {', called by '.join(map(str, where))}."
                if where
                else f"; there is no stack: {found.problem}."
            )
        )


def collect(beats: Beats) -> list[WorkerReport]:
    """Ask the node of every worker for the state and the stack of its process; return a report for each.

    Takes a minute at most. A node that does not answer is reported as that.
    """
    processes = {rank: dict(beat) for rank, (beat, _) in beats.items()}
    found, problems = _on_nodes(inspect_all, processes)
    return [
        WorkerReport(rank, *beats[rank], found.get(rank) or Inspection("unknown", {}, [], problems.get(rank, "")))
        for rank in sorted(beats)
    ]


def kill(reports: Iterable[WorkerReport]) -> list[int]:
    """Send SIGKILL to the processes of workers, on their nodes; return the ranks for which that failed."""
    processes = {report.rank: dict(report.beat) for report in reports}
    found, problems = _on_nodes(kill_all, processes)
    for rank in problems.keys() | {rank for rank, problem in found.items() if problem}:
        logger.warning("Worker %d could not be killed: %s.", rank, problems.get(rank) or found[rank])
    return sorted(rank for rank in processes if found.get(rank) != "")


def kill_starting(coordinator: Any) -> None:
    """Send SIGKILL to the workers of this process's Ray Train run, which need not have sent a beat.

    Args:
        coordinator: an actor that this process has started, by which Ray's table tells this process from others.
    """
    table = state.actors()
    here = table[coordinator._actor_id.hex()]["OwnerAddress"]  # also while Ray restarts the coordinator
    actors = [actor for actor in table.values() if actor["State"] == "ALIVE"]
    controllers = [
        actor["Address"]
        for actor in actors
        if actor["OwnerAddress"] == here and actor["ActorClassName"] == "TrainController"
    ]
    workers = [
        {"pid": actor["Pid"], "node_id": actor["Address"]["NodeID"]}
        for actor in actors
        if actor["OwnerAddress"] in controllers and actor["ActorClassName"] == "RayTrainWorker"
    ]
    _on_nodes(kill_all, dict(enumerate(workers)))


def culprits(reports: Sequence[WorkerReport]) -> list[WorkerReport]:
    """Return the workers that the others wait for; empty if none stands out.

    They are those that do not answer; else, of those furthest behind, the ones that are not in a collective operation;
    and if that holds for all alike, as with GPUs, those whose stack differs from that of the majority.
    """
    if silent := [report for report in reports if not report.answers]:
        return silent
    behind = furthest_behind({report.rank: (report.beat, report.age) for report in reports})
    left = [report for report in reports if report.rank in behind]
    left = [report for report in left if report.waits == min(other.waits for other in left)]
    if len(left) < len(reports) or len(left) == 1:
        return left
    place, count = Counter(tuple(report.inspection.training) for report in left).most_common(1)[0]
    return [report for report in left if tuple(report.inspection.training) != place] if 2 * count > len(left) else []


def describe_hang(reason: str, reports: Sequence[WorkerReport], file: Location) -> str:
    """Return a paragraph about a hang and the worker that causes it.

    Args:
        reason: what `Watchdog.observe` returned.
        file: text file for the stacks of all workers, such as <run>/hang_<attempt>.txt. If the storage does not take
            it within 20 seconds, that is logged, and nothing else happens.
    """
    named = culprits(reports)
    text = " ".join([reason, *([] if named else ["No worker stands out."]), *map(str, (named or reports)[:3])])
    if len(named) > 3:
        text += f" The same holds for: {_workers(report.rank for report in named[3:]).lower()}."
    if _write(file, "\n\n".join([text, *map(_stacks, reports)]) + "\n"):
        text += f" The stacks of all workers are in {file}."
    return text


def _stacks(report: WorkerReport) -> str:
    lines = [str(report)]
    for thread, frames in report.inspection.threads.items():
        lines += [f"  thread {escaped(thread)}", *(f"    {frame}" for frame in frames)]
    return "\n".join(lines)


def _write(file: Location, text: str) -> bool:
    """Write in a thread: the storage may be what hangs."""
    problem = [f"it took longer than {_WRITE_SECONDS:.0f} s"]

    def work() -> None:
        try:
            file.write_text(redacted(text))
            problem.clear()
        except (UserError, StorageUnavailableError, OSError) as error:
            problem[0] = str(error)

    thread = threading.Thread(target=work, name="hang report", daemon=True)
    thread.start()
    thread.join(_WRITE_SECONDS)
    if problem:
        logger.warning("The stacks of the workers were not written to %s: %s.", file, problem[0].rstrip("."))
    return not problem


def _on_nodes(
    function: Callable[[dict[int, dict[str, Any]]], dict[int, Any]], processes: dict[int, dict[str, Any]]
) -> tuple[dict[int, Any], dict[int, str]]:
    """Run `function` in a task on every node that has some of `processes`, with these.

    Returns:
        by rank, its results, and why there is none.
    """
    if not processes:
        return {}, {}
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    by_node: dict[str, dict[int, dict[str, Any]]] = {}
    for rank, process in processes.items():
        by_node.setdefault(process["node_id"], {})[rank] = process
    answers = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False), name=function.__name__
        ).remote(of_node): list(of_node)
        for node, of_node in by_node.items()
    }
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    results: dict[int, Any] = {}
    problems = {rank: f"its node did not answer in {_ANSWER_SECONDS:.0f} s" for task in late for rank in answers[task]}
    for answer in ready:
        try:
            results |= ray.get(answer)
        except RayError as error:
            text = escaped(str(error).strip().splitlines()[-1][:200] if str(error).strip() else repr(error))
            problems |= dict.fromkeys(answers[answer], f"its node did not answer ({text})")
    for answer in late:
        ray.cancel(answer, force=True)
    return results, problems


def inspect_all(processes: dict[int, dict[str, Any]]) -> dict[int, Inspection]:
    """Inspect processes of this node, given by their beats, all at the same time."""
    with ThreadPoolExecutor(len(processes)) as pool:
        return dict(zip(processes, pool.map(inspect_process, processes.values()), strict=True))


def inspect_process(beat: Mapping[str, Any]) -> Inspection:
    """Return the state and the stacks of a process of this node, by py-spy or else by faulthandler."""
    process = _process(beat)
    if process is None:
        return Inspection("gone", {}, [], "its process has ended")
    state = process.status()
    threads, problem = _by_py_spy(beat)
    if threads is None and beat["stack_file"] is not None:
        if state == "stopped":
            problem += "; a stopped process does not answer"
        else:
            threads, problem = _by_faulthandler(beat), f"{problem}; it did not answer SIGUSR2"
    if threads is None:
        return Inspection(state, {}, [], problem)
    training = next((frames for ident, _, frames in threads if ident == beat["thread"]), [])
    return Inspection(state, {f"{ident:#x} {name}".rstrip(): frames for ident, name, frames in threads}, training)


def kill_all(processes: dict[int, dict[str, Any]]) -> dict[int, str]:
    """Kill processes of this node, given by their beats; return for each why that failed, empty if it is gone."""
    problems: dict[int, str] = {}
    for rank, beat in processes.items():
        problems[rank] = ""
        try:
            if process := _process(beat):
                process.kill()
        except psutil.NoSuchProcess:
            pass
        except (psutil.Error, OSError) as error:
            problems[rank] = str(error)
    return problems


def _process(beat: Mapping[str, Any]) -> psutil.Process | None:
    """Return the process that sent a beat; None if it has ended, also if another one has its number now."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(beat["pid"])
        if "created" not in beat or abs(process.create_time() - beat["created"]) < 1:
            return process
    return None


_Threads = list[tuple[int, str, list[Frame]]]
"""Identity (`threading.get_ident`), name and frames, innermost first, of every thread."""


def _by_py_spy(beat: Mapping[str, Any]) -> tuple[_Threads | None, str]:
    """Return the stacks, or None and why there are none."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        return None, "py-spy is not installed on its node"
    # Pausing fails with a stopped process, and a process that hangs need not be paused.
    command = [program, "dump", "--nonblocking", "--json", "--pid", str(beat["pid"])]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_STACK_SECONDS)
        if result.returncode:
            lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
            return None, f"py-spy failed ({escaped(' '.join(lines[:4])[:200])})"
        return [
            (
                thread["thread_id"],
                thread["thread_name"] or "",
                [Frame(frame["name"], _short(frame["filename"]), frame["line"]) for frame in thread["frames"]],
            )
            for thread in json.loads(result.stdout)
        ], ""
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        return None, f"py-spy failed ({type(error).__name__})"


def _by_faulthandler(beat: Mapping[str, Any]) -> _Threads | None:
    """Send SIGUSR2 and read what the process writes into its file; None if it writes nothing."""
    file = f"/proc/{beat['pid']}/fd/{beat['stack_file']}"
    try:
        before = os.path.getsize(file)
        os.kill(beat["pid"], signal.SIGUSR2)
        deadline, size = time.monotonic() + _STACK_SECONDS, before
        while size == before or os.path.getsize(file) != size:  # until it stops growing
            if time.monotonic() > deadline:
                return None
            size = os.path.getsize(file)
            time.sleep(0.2)
        text = Path(file).read_bytes()[before:].decode(errors="replace")
    except OSError:
        return None
    parts = _FAULTHANDLER_THREAD.split(text)[1:]
    return [
        (
            int(ident, 16),
            "",
            [Frame(function, _short(path), int(line)) for path, line, function in _FAULTHANDLER_FRAME.findall(frames)],
        )
        for ident, frames in zip(parts[::2], parts[1::2], strict=True)
    ]


def _short(path: str) -> str:
    if "site-packages/" in path:
        return path.rpartition("site-packages/")[2]
    return path.removeprefix(_ROOT)


def _workers(ranks: Iterable[int]) -> str:
    ranks = sorted(ranks)
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"Worker{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:8]))}{more}"
