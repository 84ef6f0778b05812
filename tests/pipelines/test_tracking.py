"""MLflow as a SQLite file and as a real server on loopback: found again, never in the way."""

import logging
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow.tracking import MlflowClient

from pipelines import tracking
from pipelines.errors import UserError
from pipelines.tracking import MetricLog

CONFIG = {"recipe": "demo", "run": {"name": "run", "steps": None}, "model": {"pixel_mean": [1.0, 2.0, 3.0]}}
NOBODY = "http://127.0.0.1:9"  # the discard port


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Run an MLflow server; return its URI and process."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    deadline = time.monotonic() + 120
    while not answers(uri):
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)
    yield uri, process
    family = [*process.children(recursive=True), process]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one database for all tests: MLflow takes seconds to make its tables."""
    return tmp_path_factory.mktemp("sqlite") / "mlflow.db"


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, database: Path) -> str:
    return f"sqlite:///{database}" if request.param == "sqlite" else request.getfixturevalue("server")[0]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make MLflow's client give up at the first failure instead of after minutes."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, key)]


def test_what_can_be_used_passes(uri: str) -> None:
    tracking.check(uri)


def test_an_unreachable_server_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{NOBODY} does not answer: .*refused.*--tracking\.uri"):
        tracking.check(NOBODY)
    assert time.monotonic() - start < 5


def test_a_server_that_takes_calls_and_says_nothing_is_refused_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer: .*timed out"):
            tracking.check(f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert time.monotonic() - start < 10


def a_folder(path: Path) -> None:
    path.mkdir()


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


def no_database(path: Path) -> None:
    path.write_bytes(b"something else " * 100)


def read_only(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path.touch(0o400)


@pytest.mark.parametrize("spoil", [a_folder, below_a_file, no_database, read_only])
def test_a_database_that_cannot_be_written_is_refused(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    path = tmp_path / "folder" / "mlflow.db"
    path.parent.mkdir()
    spoil(path)
    with pytest.raises(UserError, match=rf"{path} cannot be written: .*--tracking\.uri"):
        tracking.check(f"sqlite:///{path}")


@pytest.mark.parametrize("uri", ["mlruns", "/srv/mlruns", "file:///srv/mlruns"])
def test_a_plain_folder_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=rf"plain folder any more, got {uri}.*sqlite:////"):
        tracking.check(uri)


def test_a_folder_has_one_run(uri: str) -> None:
    first = tracking.open_run(uri, "trials", "run", "/runs/a", CONFIG)
    assert tracking.open_run(uri, "trials", "run", "/runs/a", CONFIG) == first
    assert tracking.open_run(uri, "trials", "run", "/runs/b", CONFIG) != first
    quoted = tracking.open_run(uri, "trials", "run", "/runs/it's", CONFIG)
    assert tracking.open_run(uri, "trials", "run", "/runs/it's", CONFIG) == quoted

    client = MlflowClient(uri)
    run = client.get_run(first)
    assert run.data.params == {
        "recipe": "demo",
        "run.name": "run",
        "run.steps": "None",
        "model.pixel_mean": "[1.0, 2.0, 3.0]",
    }
    assert [file.path for file in client.list_artifacts(first)] == ["config.json"]

    tracking.close_run(uri, first, "KILLED", {"status": "stopped"})
    run = client.get_run(first)
    assert (run.info.status, run.data.tags["status"]) == ("KILLED", "stopped")
    assert tracking.open_run(uri, "trials", "run", "/runs/a", CONFIG) == first
    assert tracking.status(uri, first) == "KILLED"
    tracking.set_status(uri, first, "RUNNING")
    assert client.get_run(first).info.status == "RUNNING"


def test_what_mlflow_refuses_is_a_user_error(database: Path) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(UserError, match=r"refuses the run: .*deleted.*--tracking\.experiment"):
        tracking.open_run(f"sqlite:///{database}", "deleted", "run", "/runs/a", CONFIG)


def test_artifacts_lie_beside_the_database_not_in_the_working_directory(database: Path) -> None:
    run_id = tracking.open_run(f"sqlite:///{database}", "beside", "run", "/runs/a", CONFIG)
    assert len(list((database.parent / "mlartifacts").glob(f"{run_id}/**/config.json"))) == 1


def test_steps_done_again_are_logged_once(uri: str) -> None:
    run_id = tracking.open_run(uri, "restarts", "run", "/runs/restarted", CONFIG)
    for first, last in ((0, 7), (5, 10), (5, 12)):
        log = MetricLog(uri, run_id)
        for step in range(first, last):
            log.log(step, {"loss": step / 2, "rate": float(step)})
        log.close()
    assert history(uri, run_id, "loss") == [(step, step / 2) for step in range(12)]
    assert history(uri, run_id, "rate") == [(step, float(step)) for step in range(12)]


def test_a_metric_that_begins_later_is_not_taken_for_logged(uri: str) -> None:
    run_id = tracking.open_run(uri, "restarts", "run", "/runs/later", CONFIG)
    log = MetricLog(uri, run_id)
    log.log(10, {"loss": 1.0})
    log.log(10, {"pq": 0.5})
    log.log(5, {"other": 0.5})
    log.close()
    assert [history(uri, run_id, key) for key in ("loss", "pq", "other")] == [[(10, 1.0)], [(10, 0.5)], [(5, 0.5)]]


@pytest.mark.usefixtures("impatient")
def test_an_absent_server_costs_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    log = MetricLog(NOBODY, "0" * 32)
    log.log(3, {"loss": 1.0})
    log.close()
    tracking.close_run(NOBODY, "0" * 32, "FINISHED", {})
    first, second = (record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert first.startswith("MLflow did not take the metrics of step 3")
    assert "ended as FINISHED" in second


def test_a_hanging_server_never_blocks(server: tuple[str, psutil.Process], caplog: pytest.LogCaptureFixture) -> None:
    uri, process = server
    run_id = tracking.open_run(uri, "hanging", "run", "/runs/hanging", CONFIG)
    log = MetricLog(uri, run_id, capacity=10)
    family = [process, *process.children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        for step in range(20):
            log.log(step, {"loss": 1.0})
        log.close(seconds=1)
        assert time.monotonic() - start < 10
    finally:
        for member in reversed(family):
            member.send_signal(signal.SIGCONT)
    assert "are lost" in caplog.messages[0]
    assert "may be lost" in caplog.messages[-1]
    log.close()
    assert history(uri, run_id, "loss")[:10] == [(step, 1.0) for step in range(10)]
