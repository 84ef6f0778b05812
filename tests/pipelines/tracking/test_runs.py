"""MLflow runs in a SQLite file and on a real server: found again by folder, unreachable ones refused."""

import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.artifacts import load_text
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import require_reachable
from pipelines.tracking.unsent import RunStatus, Unsent
from tests.pipelines.tracking.mlflow_server import UNUSED

CONFIG = {"recipe": "demo", "run": {"name": "run", "steps": None}, "model": {"pixel_mean": [1.0, 2.0, 3.0]}}


def test_servers_and_databases_are_reachable(uri: str) -> None:
    require_reachable(uri)


def test_an_absent_server_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(UserError, match=rf"{UNUSED} does not answer: .*refused.*--tracking\.uri"):
        require_reachable(UNUSED)
    assert time.monotonic() - start < 5


def test_a_server_that_accepts_connections_but_never_answers_is_refused_within_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        start = time.monotonic()
        with pytest.raises(UserError, match=r"does not answer: .*timed out"):
            require_reachable(f"http://127.0.0.1:{listener.getsockname()[1]}")
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
        require_reachable(f"sqlite:///{path}", create=True)


@pytest.mark.parametrize("uri", ["mlruns", "/srv/mlruns", "file:///srv/mlruns"])
def test_a_plain_folder_is_refused(uri: str) -> None:
    with pytest.raises(UserError, match=rf"no longer keeps runs in a plain folder, got {uri}.*sqlite:////"):
        require_reachable(uri)


def test_a_folder_has_one_run(uri: str) -> None:
    first = TrackedRun.open(uri, "trials", "run", "/runs/a", CONFIG)
    assert TrackedRun.open(uri, "trials", "run", "/runs/a", CONFIG) == first
    assert TrackedRun.open(uri, "trials", "run", "/runs/b", CONFIG) != first
    quoted = TrackedRun.open(uri, "trials", "run", "/runs/it's", CONFIG)
    assert TrackedRun.open(uri, "trials", "run", "/runs/it's", CONFIG) == quoted

    client = MlflowClient(uri)
    run = client.get_run(first.run_id)
    assert run.data.params == {
        "recipe": "demo",
        "run.name": "run",
        "run.steps": "None",
        "model.pixel_mean": "[1.0, 2.0, 3.0]",
    }
    assert [file.path for file in client.list_artifacts(first.run_id)] == ["config.json"]
    assert MLFLOW_PARENT_RUN_ID not in run.data.tags
    assert str(first) == f"MLflow run {first.run_id} at {uri}"


def test_a_run_may_have_a_parent(uri: str) -> None:
    parent = TrackedRun.open(uri, "trials", "sweep", "/runs/sweep", CONFIG)
    child = TrackedRun.open(uri, "trials", "trial", "/runs/sweep/trial", CONFIG, parent.run_id)
    tags = MlflowClient(uri).get_run(child.run_id).data.tags
    assert tags[MLFLOW_PARENT_RUN_ID] == parent.run_id


def test_a_closed_run_is_found_and_reopened(uri: str) -> None:
    run = TrackedRun.open(uri, "trials", "run", "/runs/closed", CONFIG)
    assert run.status == "RUNNING"
    run.close("KILLED", {"status": "stopped"})
    found = MlflowClient(uri).get_run(run.run_id)
    assert (found.info.status, found.data.tags["status"]) == ("KILLED", "stopped")
    assert TrackedRun.open(uri, "trials", "run", "/runs/closed", CONFIG) == run
    assert run.status == "KILLED"
    run.set_status("RUNNING")
    assert MlflowClient(uri).get_run(run.run_id).info.status == "RUNNING"


def test_logged_metrics_and_files_are_read_back(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrackedRun.open(uri, "trials", "run", "/runs/logged", CONFIG)
    run.log_metrics(10, {"pq": 0.25, "other": 1.0})
    run.log_metrics(20, {"pq": 0.5})
    assert run.history("pq") == [(10, 0.25), (20, 0.5)]
    assert run.history("other") == [(10, 1.0)]
    assert run.history("absent") == []
    run.log_files({"metrics.json": b"{}", "notes.txt": b"text"}, "evaluation")
    client = MlflowClient(uri)
    found = {file.path for file in client.list_artifacts(run.run_id, "evaluation")}
    assert found == {"evaluation/metrics.json", "evaluation/notes.txt"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    artifact_uri = client.get_run(run.run_id).info.artifact_uri
    assert load_text(f"{artifact_uri}/evaluation/notes.txt") == "text"


def test_the_history_of_an_absent_server_is_a_user_error() -> None:
    with pytest.raises(UserError, match=f"{UNUSED} does not answer"):
        TrackedRun(UNUSED, "0" * 32).history("loss")


def test_a_rejected_run_is_a_user_error(database: Path) -> None:
    client = MlflowClient(f"sqlite:///{database}")
    client.delete_experiment(client.create_experiment("deleted"))
    with pytest.raises(UserError, match=r"rejected the run: .*deleted.*--tracking\.experiment"):
        TrackedRun.open(f"sqlite:///{database}", "deleted", "run", "/runs/a", CONFIG)


def test_artifacts_are_beside_the_database_not_in_the_working_directory(database: Path) -> None:
    run = TrackedRun.open(f"sqlite:///{database}", "beside", "run", "/runs/a", CONFIG)
    assert len(list((database.parent / "mlartifacts").glob(f"{run.run_id}/**/config.json"))) == 1


def test_an_absent_server_costs_seconds_and_warnings(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    run = TrackedRun(UNUSED, "0" * 32)
    start = time.monotonic()
    run.set_status("RUNNING")
    run.log_metrics(1, {"pq": 0.5})
    run.log_files({"report.md": b""})
    run.close("FINISHED", {})
    assert time.monotonic() - start < 10
    found = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    for message, part in zip(found, ["to RUNNING", "metrics of run", "report.md", "ended as FINISHED"], strict=True):
        assert part in message

    caplog.clear()
    run.settle(locate(tmp_path))  # nothing to do
    assert not caplog.records
    (tmp_path / "file").touch()
    run.close("FINISHED", {}, locate(tmp_path / "file" / "run"))  # nowhere to keep it
    assert "Lost, since it cannot be kept either: Cannot write" in caplog.messages[-1]


def test_a_damaged_file_of_unsent_metrics_is_named(
    database: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = TrackedRun.open(f"sqlite:///{database}", "trials", "run", "/runs/damaged", CONFIG)
    damaged = tmp_path / "unsent" / "metrics_000001.jsonl"
    damaged.parent.mkdir()
    damaged.write_text("{")
    run.settle(locate(tmp_path))
    assert f"{damaged} does not hold metrics" in caplog.messages[-1]
    assert damaged.exists()
    run.close("FINISHED", {}, locate(tmp_path))
    assert f"{damaged} does not hold metrics" in caplog.messages[-1]
    assert run.status == "FINISHED"


def test_a_run_that_is_gone_is_settled_with_a_warning(
    uri: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unsent = Unsent(locate(tmp_path))
    unsent.add([Metric("loss", 0.5, 1, 1)])
    unsent.write_status(RunStatus("FINISHED"))
    TrackedRun(uri, "0" * 32).settle(locate(tmp_path))
    metrics, status = (record.message for record in caplog.records if record.name.startswith("pipelines"))
    assert "rejects metrics" in metrics
    assert "rejects the status FINISHED" in status
    assert list(tmp_path.iterdir()) == []
