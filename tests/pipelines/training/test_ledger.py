"""The ledger outlives its driver, and names the failure that came first, not its echoes."""

import threading
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayTaskError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.storage import Location, locate
from pipelines.training import ledger
from pipelines.training.ledger import Ledger, cause

ECHO = RuntimeError(
    "[enforce fail at transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:46021. "
    "This may indicate that a remote rank has failed."
)
ECHOES = [
    ECHO,
    ConnectionResetError("Connection reset by peer"),
    RuntimeError("Timed out waiting 300000ms for recv operation to complete"),
    RuntimeError("NCCL error: remote process exited or there was a network error"),
    BrokenPipeError(32, "Broken pipe"),
    ValueError("Default process group has not been initialized, please make sure to call init_process_group."),
]


def remote(error: Exception) -> RayTaskError:
    """Wrap an error as Ray does when it comes from a worker: the message is a traceback."""
    trace = (
        "ray::RayTrainWorker.execute() (pid=7)\n"
        '  File "worker.py", line 80, in train_loop\n'
        "    losses = train_step()\n"
        f"{type(error).__name__}: {error}"
    )
    return RayTaskError("execute", trace, error)


def test_a_driver_that_has_lost_its_run_writes_nothing(tmp_path: Path) -> None:
    lost = threading.Event()
    ours = Ledger(locate(tmp_path), lost)
    ours.add("start", step=0)
    lost.set()
    Ledger(locate(tmp_path)).add("failure", cause="the driver was lost")
    ours.add("end", status="stopped")
    assert [event["event"] for event in ledger.read(locate(tmp_path))] == ["start", "failure"]


@pytest.mark.parametrize("echo", ECHOES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("culprit", [0, 2])
def test_the_cause_is_not_an_echo(echo: Exception, culprit: int) -> None:
    failures: dict[int, BaseException] = {rank: remote(echo) for rank in (0, 1, 2)}
    failures[culprit] = remote(ArithmeticError("step 7: the loss is nan"))
    assert cause(failures) == f"worker {culprit}: ArithmeticError: step 7: the loss is nan"


def test_a_worker_that_died_is_the_cause() -> None:
    lost = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=ActorDiedError())
    assert cause({0: remote(ECHO), 1: lost}).startswith("worker 1: ActorDiedError: The actor died")
    assert cause({0: remote(ECHO), 1: ActorDiedError()}).startswith("worker 1: ActorDiedError: The actor died")


def test_a_node_that_was_lost_is_the_cause() -> None:
    death = RayActorError(
        error_msg="The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n"
        "The actor died because its node has died. Node Id: 5e\n\tthe actor's node was terminated unexpectedly"
    )
    lost = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=death)
    expected = "worker 1: its node was lost. The actor died because its node has died. Node Id: 5e"
    assert cause({0: remote(ECHO), 1: lost}) == expected


def test_a_worker_out_of_reach_is_the_cause() -> None:
    """Its death has not come to Ray's ears yet, and what is known sounds like an echo."""
    silence = ActorUnavailableError("RpcError: RPC error: recvmsg:Connection reset by peer rpc_code: 14", None)
    lost = WorkerHealthCheckFailedError("A worker health check failed.\nWorker info: ...", failure=silence)
    assert cause({0: remote(ECHO), 1: lost}) == "worker 1: its process or its node was lost; Ray cannot reach it."


def test_an_echo_is_better_than_nothing() -> None:
    assert cause({1: remote(ECHO), 3: remote(ECHO)}).startswith("worker 1: RuntimeError: [enforce fail")


def test_a_message_is_one_short_line() -> None:
    found = cause({0: remote(ValueError("first\nsecond " + 5000 * "x"))})
    assert "\n" not in found
    assert len(found) < 600


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


def test_a_ledger_continues_where_it_was(run: Location) -> None:
    assert ledger.read(run) == []
    book = Ledger(run)
    assert (book.attempts, book.open) == (0, False)
    book.add("start", step=0, pids=[1, 2])
    assert (book.attempts, book.open) == (1, True)

    book = Ledger(run)  # the driver was lost, and another one came
    assert (book.attempts, book.open) == (1, True)
    book.add("failure", cause="the driver was lost", step=None)
    assert not book.open
    book.add("start", step=5)
    book.add("end", status="finished", step=25)
    assert (book.attempts, book.open) == (2, False)

    events = ledger.read(run)
    assert [event["event"] for event in events] == ["start", "failure", "start", "end"]
    assert events == book.events
    assert events[0]["pids"] == [1, 2]
    assert [event["time"] for event in events] == sorted(event["time"] for event in events)
