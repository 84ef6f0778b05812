"""The registry gate at the command line: exit statuses, numbers, and refusals that change nothing."""

import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs import promote
from jobs.shared.cli import run
from tests.pipelines.tracking.versions import evaluated_version, pq

Job = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture(scope="module")
def name(uri: str) -> str:
    """Return a registered model with versions of PQ that is low, high, and low again."""
    name = f"model-{uuid.uuid4().hex[:8]}"
    for good in (10, 40, 9):
        evaluated_version(uri, name, good)
    return name


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], uri: str, name: str) -> Job:
    for variable in ("MLFLOW_TRACKING_URI", "MASKFORMER_STORAGE"):
        monkeypatch.delenv(variable, raising=False)

    def ask(*arguments: str, where: tuple[str, ...] = ("--tracking.uri", uri)) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["promote.py", "--model", name, *where, *arguments])
        with pytest.raises(SystemExit) as end:
            run(promote.main)
        streams = capsys.readouterr()
        return int(end.value.code or 0), streams.out, streams.err

    return ask


def champion(uri: str, name: str) -> str:
    return str(MlflowClient(uri).get_registered_model(name).aliases.get("champion", ""))


def test_promotion_refusal_and_rollback(job: Job, uri: str, name: str) -> None:
    status, out, _ = job("--version", "1", "--dry-run")
    assert (status, champion(uri, name)) == (0, "")
    assert "would become version 1: the first one, compared with nothing." in out
    assert job("--version", "1")[0] == 0
    status, out, _ = job("--version", "3")
    assert (status, champion(uri, name)) == (1, "1")
    assert f"version 3          PQ  {100 * pq(9):.2f}" in out
    assert "stays at version 1: version 3 is not better" in out
    status, out, _ = job("--version", "2")
    assert (status, champion(uri, name)) == (0, "2")
    assert f"{100 * (pq(40) - pq(10)):+.2f}, 95 % interval" in out
    assert "is now version 2: better than version 1." in out
    assert "is version 2 already" in job("--version", "2")[1]
    status, out, _ = job("--rollback")
    assert (status, champion(uri, name)) == (0, "1")
    assert "is now version 1: back from version 2." in out
    status, out, _ = job("--version", "3", "--force", "--reason", "a smaller model")
    assert (status, champion(uri, name)) == (0, "3")
    assert "forced, was version 1" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "--version"),
        (("--version", "1", "--rollback"), "--version"),
        (("--version", "0"), "version must be at least 1"),
        (("--version", "1", "--confidence", "95"), "confidence must lie between 0 and 1"),
        (("--version", "1", "--force"), "--force needs a --reason"),
        (("--version", "1", "--force", "--reason", "a\x1b[2Jb"), "reason must be"),
        (("--version", "9"), "has no version 9"),
        (("--version", "1", "--alias", "latest"), "does not allow the alias"),
    ],
)
def test_what_cannot_be_is_refused(job: Job, uri: str, name: str, arguments: tuple[str, ...], complaint: str) -> None:
    before = champion(uri, name)
    status, out, err = job(*arguments)
    assert (status, out) == (2, "")
    assert complaint in " ".join(err.split())
    assert "Traceback" not in err
    assert champion(uri, name) == before


def test_a_registry_must_be_named(job: Job, tmp_path: Path) -> None:
    status, _, err = job("--version", "1", where=())
    assert status == 2
    assert "--tracking.uri" in err
    assert "$MLFLOW_TRACKING_URI" in err
    status, _, err = job("--version", "1", where=("--tracking.uri", "http://me:secret@127.0.0.1:9"))
    assert status == 2
    assert "$MLFLOW_TRACKING_PASSWORD" in err
    assert "secret" not in err
