"""`maskformer-ray JOB ...` is the job of that name."""

import sys

import pytest

from jobs.shared.main import main
from tests.jobs.shared.test_help import JOBS


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["maskformer-ray", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("name", ["train_r50", "train-r50"])
def test_the_job_answers_under_its_own_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, name, "--help") == 0
    answer = capsys.readouterr().out
    assert answer.startswith("usage: maskformer-ray train_r50 [--recipe NAME]")
    assert "--run.name" in answer


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_all_jobs_are_listed(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, *arguments) == 0
    answer = capsys.readouterr().out
    for job in JOBS:
        name = job.removeprefix("jobs/").removesuffix(".py")
        (line,) = [line for line in answer.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 4  # what it is for


def test_an_unknown_job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "shared") == 2
    assert "error: There is no job 'shared'. Use one of: convert_weights, evaluate" in capsys.readouterr().err


def test_a_user_error_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(monkeypatch, "train_r50", "--recipe", "demo") == 2
    assert capsys.readouterr().err.startswith("error: There is no recipe 'demo' for this job")
