"""The watchdog's rules by made-up times; stacks, naming and killing by real processes."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError

from pipelines.storage import Location, locate
from pipelines.training import watchdog
from pipelines.training.watchdog import (
    Activity,
    Frame,
    Inspection,
    Watchdog,
    WorkerReport,
    collect,
    culprits,
    describe_hang,
    inspect_process,
    kill,
    kill_all,
)
from tests.waiting import wait_for

HANG, PATIENCE = 30.0, 900.0


def beat(phase: str, step: int = 7, seconds: float = 0.0, **facts: Any) -> dict[str, Any]:
    usual = {"usual_step": 1.0, "longest_quick_pq": None, "image_ids": [], "host": "host", "node_id": "node", "pid": 1}
    return {"phase": phase, "step": step, "seconds": seconds, **usual, **facts}


def hangs(*beats: dict[str, Any], age: float = 0.5) -> str | None:
    return Watchdog(HANG, PATIENCE).observe({rank: (beat, age) for rank, beat in enumerate(beats)}, now=0.0)


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (beat("step"), 30.0),
        (beat("step", usual_step=4.0), 80.0),  # 20 usual steps are longer
        (beat("step", usual_step=None), 90.0),  # the first of the process
        (beat("start", usual_step=None), 930.0),
        (beat("data"), 930.0),
        (beat("saving"), 930.0),
        (beat("end"), 930.0),
        (beat("quick PQ"), 990.0),
        (beat("quick PQ", usual_step=4.0), 1140.0),
        (beat("quick PQ", longest_quick_pq=1.0), 930.0),
        (beat("quick PQ", longest_quick_pq=3.0), 960.0),
    ],
)
def test_limit_of_every_phase(one: dict[str, Any], limit: float) -> None:
    for others in ([], [beat("end", step=99, seconds=10**6)]):
        assert hangs({**one, "seconds": limit - 1}, *others) is None
        found = hangs({**one, "seconds": limit + 1}, *others)
        assert found is not None
        assert found.startswith(f"Worker 0 has spent {limit + 1.5:.0f} s ")
        assert f"at step {one['step']} (limit {limit:.0f} s" in found


@pytest.mark.parametrize(
    ("waiting", "behind"),
    [
        (beat("step", 7, 800), beat("data", 7, 801)),
        (beat("step", 7, 800), beat("saving", 7, 801)),
        (beat("data", 7, 800), beat("quick PQ", 7, 801)),
        (beat("end", 9, 2000), beat("data", 8, 801)),
        (beat("step", 7, 2000), beat("start", 0, 801)),
        (beat("step", 7, 2000), beat("step", 7, 1)),  # the other one has only just arrived
    ],
)
def test_who_waits_for_another_worker_does_not_hang(waiting: dict[str, Any], behind: dict[str, Any]) -> None:
    assert hangs(waiting, behind) is None
    found = hangs(waiting, {**behind, "seconds": 1000})
    assert found is not None
    who = "Workers 0, 1 have" if waiting["phase"] == behind["phase"] else "Worker 1 has"
    assert found.startswith(f"{who} spent 1000 s ")


def test_the_one_in_a_step_is_behind_the_one_that_waits_for_the_next_data() -> None:
    found = hangs(beat("data", 8, 31), beat("step", 7, 32))
    assert found is not None
    assert found.startswith("Worker 1 has spent 32 s computing at step 7 (limit 30 s, a usual step 1 s)")


def test_age_of_the_beat_counts() -> None:
    assert hangs(beat("step", seconds=20), age=9) is None
    assert hangs(beat("step", seconds=20), age=11) is not None


def test_beats_that_no_longer_arrive() -> None:
    dog = Watchdog(HANG, PATIENCE)
    assert dog.observe({0: (beat("step"), 1), 1: (beat("data"), 29)}, 0.0) is None
    found = dog.observe({0: (beat("step"), 1), 1: (beat("data"), 31)}, 1.0)
    assert found == "Worker 1 gave no sign of life for 31 s (limit 30 s)."
    assert Watchdog(HANG, PATIENCE).observe({0: (beat("end"), 31)}, 0.0) is None  # may have ended


def test_usual_times_are_kept_for_the_next_attempt() -> None:
    dog = Watchdog(HANG, PATIENCE)
    dog.observe({0: (beat("data", usual_step=4.0, longest_quick_pq=5.0), 0)}, 0.0)
    fresh = beat("step", usual_step=None)
    assert dog.observe({}, 1.0) is None
    assert dog.observe({0: ({**fresh, "seconds": 239}, 0)}, 2.0) is None
    assert dog.observe({0: ({**fresh, "seconds": 241}, 0)}, 3.0) is not None
    pq = beat("quick PQ", usual_step=None)
    assert dog.observe({0: ({**pq, "seconds": 999}, 0)}, 40.0) is None
    assert dog.observe({0: ({**pq, "seconds": 1001}, 0)}, 41.0) is not None


def test_a_hang_is_declared_again_only_after_a_while() -> None:
    dog = Watchdog(HANG, PATIENCE)
    hung = {0: (beat("step", seconds=100), 0.0)}
    declared = [now for now in range(100) if dog.observe(hung, float(now))]
    assert declared == [0, 30, 60, 90]


def test_a_driver_that_was_suspended_waits_for_new_beats() -> None:
    dog = Watchdog(HANG, PATIENCE)
    old, new = {0: (beat("step"), 100.0)}, {0: (beat("step"), 0.5)}
    dog.observe(new, 0.0)
    assert dog.observe(old, 100.0) is None
    assert dog.observe(new, 101.0) is None
    assert dog.observe(old, 102.0) is not None
    assert [bool(dog.observe(old, 1000.0 + 60 * i)) for i in range(4)] == [False, True, False, True]  # always slow


def test_activity_measures_its_phases() -> None:
    now = 0.0
    activity = Activity(lambda: now)

    def spend(phase: Any, seconds: float, step: int = 0) -> None:
        nonlocal now
        activity.enter(phase, step, (5, 6))
        now += seconds

    first = activity.beat()
    assert (first["phase"], first["step"], first["usual_step"], first["longest_quick_pq"]) == ("start", 0, None, None)
    for step in range(110):
        spend("data", 100.0, step)
        spend("step", 50.0 if step < 60 else 1.0 + step % 3, step)
    spend("quick PQ", 9.0)
    spend("quick PQ", 4.0)
    spend("saving", 3.0, 60)
    found = activity.beat()
    assert found["usual_step"] == 2.0  # the slow ones are more than 50 steps old
    assert found["longest_quick_pq"] == 9.0
    assert (found["phase"], found["step"], found["image_ids"], found["seconds"]) == ("saving", 60, [5, 6], 3.0)
    assert found["pid"] == psutil.Process().pid
    json.dumps(found)  # plain values


ALL_REDUCE = Frame("all_reduce", "torch/distributed/distributed_c10d.py", 2800)
AGREE = Frame("_agree", "pipelines/training/worker.py", 200)
BACKWARD = Frame("_engine_run_backward", "torch/autograd/graph.py", 800)
TRAIN_STEP = Frame("train_step", "pipelines/training/worker.py", 150)
SLEEP = Frame("forward", "torch/nn/modules/conv.py", 500)
RUN = Frame("run", "ray/train/v2/thread_runner.py", 50)

WAITING = [ALL_REDUCE, AGREE, RUN]
IN_BACKWARD = [BACKWARD, TRAIN_STEP, RUN]
IN_FORWARD = [SLEEP, TRAIN_STEP, RUN]
ON_GPU = [AGREE, RUN]


def report(rank: int, stack: list[Frame], step: int = 7, age: float = 0.5, state: str = "sleeping") -> WorkerReport:
    inspection = Inspection(state, {"0x1": stack}, stack, "" if stack else "its node did not answer")
    return WorkerReport(rank, beat("step", step, 99, image_ids=[70 + rank]), age, inspection)


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(0, WAITING), report(1, IN_FORWARD)], [1]),
        ([report(0, IN_FORWARD), report(1, IN_BACKWARD)], [0]),
        ([report(0, WAITING), report(1, IN_BACKWARD), report(2, WAITING)], [1]),
        ([report(0, WAITING), report(1, WAITING)], []),
        ([report(0, WAITING)], [0]),
        ([report(0, WAITING, step=8), report(1, WAITING, step=7)], [1]),
        ([report(0, IN_FORWARD, step=8), report(1, WAITING, step=7)], [1]),
        ([report(0, IN_FORWARD), report(1, WAITING, state="stopped")], [1]),
        ([report(0, IN_FORWARD), report(1, WAITING, age=20)], [1]),
        ([report(0, IN_FORWARD), report(1, [], state="unknown"), report(2, WAITING)], [1]),
        ([report(0, ON_GPU), report(1, ON_GPU), report(2, IN_FORWARD)], [2]),
        ([report(0, ON_GPU), report(1, ON_GPU)], []),
        ([report(0, IN_FORWARD), report(1, ON_GPU)], []),
    ],
)
def test_culprits(reports: list[WorkerReport], expected: list[int]) -> None:
    assert [found.rank for found in culprits(reports)] == expected


def test_description_names_the_culprit_and_stores_all_stacks(tmp_path: Path) -> None:
    evil = Frame("x\x1b[2J", "pipelines/data/\nx.py", 3)
    text = describe_hang(
        "reason.", [report(0, WAITING), report(1, [SLEEP, evil, RUN])], locate(tmp_path) / "hang_4.txt"
    )
    assert text == (
        r"reason. Worker 1 (host, node node, pid 1) has spent 100 s computing at step 7 with the images 71; its "
        r"process is sleeping. It is in forward (torch/nn/modules/conv.py:500), called by x\x1b[2J (pipelines/data/"
        rf"\nx.py:3). The stacks of all workers are in {tmp_path}/hang_4.txt."
    )
    stored = (tmp_path / "hang_4.txt").read_text()
    assert all(line.isprintable() for line in stored.splitlines())
    assert f"    {ALL_REDUCE}\n    {AGREE}\n    {RUN}\n" in stored
    assert f"    {SLEEP}\n" in stored


def test_description_without_a_culprit_a_stack_or_a_storage(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "No worker stands out. Worker 0" in describe_hang("r.", [report(0, WAITING)] * 2, locate(tmp_path) / "h.txt")
    (tmp_path / "file").write_text("")
    lost = [report(0, WAITING), report(1, [], state="unknown")]
    text = describe_hang("r.", lost, locate(tmp_path / "file" / "h.txt"))
    assert text.endswith("its process is unknown; there is no stack: its node did not answer.")
    assert "were not written" in caplog.text
    monkeypatch.setattr(watchdog, "_WRITE_SECONDS", 0.1)
    monkeypatch.setattr(Location, "write_text", lambda *_: signal.pause())
    describe_hang("r.", lost, locate(tmp_path) / "h.txt")
    assert "longer than" in caplog.text


CHILD = """
import json, threading, time
from pipelines.training.watchdog import Activity, register_stack_dump

def stuck():
    time.sleep(10**6)

def train():
    register_stack_dump()
    print(json.dumps(Activity().beat()), flush=True)
    stuck()

threading.Thread(target=train, name="training").start()
threading.Event().wait()
"""


@contextmanager
def new_child() -> Iterator[dict[str, Any]]:
    """Start a process whose training thread, not its main thread, sleeps in a C call; return its beat."""
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = json.loads(process.stdout.readline())
    wait_for(lambda: "stuck" in str(inspect_process(found).training), "sleep", process)
    yield found
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def child() -> Iterator[dict[str, Any]]:
    with new_child() as found:
        yield found


@pytest.fixture
def stopped(child: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Return the beat of the child while it is stopped."""
    process = psutil.Process(child["pid"])
    process.suspend()
    wait_for(lambda: process.status() == "stopped", "stop")
    yield child
    process.resume()
    wait_for(lambda: process.status() != "stopped", "continuation")


@pytest.fixture
def without_py_spy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog.shutil, "which", lambda *args, **kwargs: None)


def is_stuck(inspection: Inspection) -> bool:
    return [frame.function for frame in inspection.training][:2] == ["stuck", "train"]


def test_stack_by_py_spy(child: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_by_faulthandler", None)
    found = inspect_process(child)
    assert is_stuck(found)
    assert found.state == "sleeping"
    assert len(found.threads) == 2
    assert any(thread.endswith("training") for thread in found.threads)


def test_stack_by_faulthandler(child: dict[str, Any], without_py_spy: None) -> None:
    for _ in range(2):  # the second dump follows the first one in the file
        found = inspect_process(child)
        assert is_stuck(found)
        assert len(found.threads) == 2
        threads = watchdog._by_faulthandler(child)
        assert threads is not None
        assert len(threads) == 2


def test_py_spy_that_fails_is_replaced(child: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "py-spy"
    program.write_text("#!/bin/sh\necho 'Error: Permission denied' >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert is_stuck(inspect_process(child))
    found = inspect_process({**child, "stack_file": None})  # SIGUSR2 would end it
    assert (found.training, found.problem) == ([], "py-spy failed (Error: Permission denied)")


def test_a_stopped_process_does_not_answer(stopped: dict[str, Any]) -> None:
    found = inspect_process(stopped)
    assert found.state == "stopped"
    assert is_stuck(found)  # py-spy reads its memory
    assert not WorkerReport(0, stopped, 0.0, found).answers


def test_a_stopped_process_without_py_spy(stopped: dict[str, Any], without_py_spy: None) -> None:
    found = inspect_process(stopped)
    assert (found.state, found.training) == ("stopped", [])
    assert found.problem == "py-spy is not installed on its node; a stopped process does not answer"


def test_only_the_same_process_is_inspected_and_killed() -> None:
    with new_child() as mine:
        other = {**mine, "created": mine["created"] - 100}
        assert inspect_process(other).state == "gone"
        assert kill_all({3: other}) == {3: ""}
        assert is_stuck(inspect_process(mine))
        psutil.Process(mine["pid"]).suspend()
        assert kill_all({3: mine}) == {3: ""}
        wait_for(lambda: inspect_process(mine).state in ("zombie", "gone"), "end")
        assert not WorkerReport(0, mine, 0.0, inspect_process(mine)).answers


class Worker:
    """Has a beat like a worker's, and can be stuck."""

    def beat(self) -> dict[str, Any]:
        watchdog.register_stack_dump()
        return Activity().beat()

    def stuck(self) -> None:
        signal.pause()


@pytest.mark.ray
def test_workers_are_inspected_and_killed_through_ray(ray_session: str) -> None:
    actor: Any = ray.remote(num_cpus=0)(Worker)
    workers = [actor.remote() for _ in range(2)]
    beats: dict[int, Any] = {rank: (ray.get(worker.beat.remote()), 0.0) for rank, worker in enumerate(workers)}
    call = workers[1].stuck.remote()
    lost = {**beats[0][0], "node_id": "0" * 56}
    wait_for(lambda: "stuck" in str(inspect_process(beats[1][0]).training), "call")
    reports = collect({**beats, 2: (lost, 0.0)})
    assert [found.inspection.state for found in reports] == ["sleeping", "sleeping", "unknown"]
    assert reports[1].inspection.training[0].function == "Worker.stuck"
    assert "its node did not answer" in reports[2].inspection.problem
    assert kill(reports[1:]) == [2]
    with pytest.raises(RayActorError):
        ray.get(call)
    ray.get(workers[0].beat.remote())
