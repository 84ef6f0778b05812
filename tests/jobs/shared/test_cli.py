import sys
from dataclasses import dataclass

import pytest

from jobs.shared.cli import parse, run
from pipelines.errors import RunFailedError, StorageUnavailableError, UserError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    steps: int = 10

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate must not be negative.")


@dataclass(frozen=True, kw_only=True)
class Flags:
    name: str
    inner: Inner = Inner()


def parsed(monkeypatch, *arguments, default=None):
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    return parse(Flags, default)


def test_a_recipe_keeps_what_is_not_overridden(monkeypatch):
    recipe = Flags(name="recipe", inner=Inner(rate=0.1, steps=7))
    assert parsed(monkeypatch, default=recipe) == recipe
    assert parsed(monkeypatch, "--inner.steps", "9", default=recipe) == Flags(
        name="recipe", inner=Inner(rate=0.1, steps=9)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--name", "x", "--unknown"),
        ("--name", "x", "--inner.steps", "many"),
        ("--name", "x", "--inner.rate", "-1"),
    ],
)
def test_a_wrong_command_line_exits_2(monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit) as end:
        parsed(monkeypatch, *arguments)
    assert end.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status"),
    [(lambda: None, None), (lambda: 1, 1), (raising(UserError("What. Do.")), 2), (raising(KeyboardInterrupt()), 130)],
)
def test_exit_statuses(main, status, capsys):
    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if status == 2:
        assert error == "error: What. Do.\n"


@pytest.mark.parametrize("kind", [UserError, RunFailedError, StorageUnavailableError, ZeroDivisionError])
def test_errors_and_tracebacks_have_no_secrets(kind, capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key-1234")
    with pytest.raises((SystemExit, ZeroDivisionError)) as end:
        run(raising(kind("No answer from http://me:pass@host with a-secret-key-1234.")))
    if kind is ZeroDivisionError:
        sys.excepthook(end.type, end.value, end.tb)  # as the interpreter does
    error = capsys.readouterr().err
    assert "http://host" in error
    assert "[$AWS_SECRET_ACCESS_KEY]" in error
    assert not [secret for secret in ("pass@", "a-secret-key-1234") if secret in error]
    assert ("Traceback" in error) == (kind is ZeroDivisionError)


def test_an_argument_with_a_password_is_refused_whatever_it_is_for(monkeypatch):
    for arguments in (("--name", "http://me:pass@host"), ("--unknown=s3://key:pass@bucket", "--name", "x")):
        with pytest.raises(UserError, match="has a user name, password, key or token in it") as refusal:
            parsed(monkeypatch, *arguments)
        assert "pass@" not in str(refusal.value)


def test_a_bug_is_not_dressed_up():
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))
