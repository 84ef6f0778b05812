"""The processes in which attacks run: each way to end is told apart."""

import ctypes
import time

import numpy as np
import pytest

from tests.security.isolated import MEMORY, SECONDS, run


def answer() -> int:
    return 42


def refuse(text: str) -> None:
    raise ValueError(text)


def fail() -> None:
    raise MemoryError


def wait() -> None:
    time.sleep(SECONDS + 60)


def crash() -> None:
    ctypes.string_at(0)


def use_memory() -> int:
    return int(np.ones(MEMORY + 2**20, np.uint8)[-1])


def test_a_result_and_a_refusal_are_clean() -> None:
    assert run(answer).text == "42"
    run(answer).require_clean()
    refused = run(refuse, "model.pth is a folder. Give the path of a file.")
    assert refused.kind == "refused"
    refused.require_clean("model.pth")


@pytest.mark.parametrize("text", ["no", "two\nlines of a message", "an escape \x1b[31m sequence in a message"])
def test_an_unclear_refusal_is_not_clean(text: str) -> None:
    with pytest.raises(AssertionError):
        run(refuse, text).require_clean()


@pytest.mark.parametrize(("function", "kind"), [(fail, "error"), (crash, "died"), (wait, "timeout")])
def test_other_ends_are_not_clean(function, kind: str) -> None:
    outcome = run(function, seconds=2)
    assert outcome.kind == kind
    with pytest.raises(AssertionError):
        outcome.require_clean()


def test_memory_beyond_the_limit_is_not_clean() -> None:
    outcome = run(use_memory)
    assert outcome.kind == "result"
    assert outcome.memory > MEMORY
    with pytest.raises(AssertionError):
        outcome.require_clean()
