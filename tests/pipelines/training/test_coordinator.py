"""The heartbeat of a worker."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.training import coordinator
from pipelines.training.coordinator import Heartbeat
from tests.waiting import wait_for


def test_the_last_beat_tells_how_a_worker_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker may end within a second of its last beat, and then others may go on for minutes."""
    monkeypatch.setattr(coordinator, "_BEAT_SECONDS", 3600)
    monkeypatch.setattr(coordinator.ray, "get", lambda answer, timeout: answer)
    received: list[tuple[int, int, str]] = []
    phase = "step"

    def beat(attempt: int, rank: int, what: dict[str, Any]) -> int:
        received.append((attempt, rank, what["phase"]))
        return 2

    heartbeat = Heartbeat(SimpleNamespace(beat=SimpleNamespace(remote=beat)), 3, 1, lambda: {"phase": phase})
    wait_for(lambda: heartbeat.request == 2, "the first beat")
    phase = "end"
    heartbeat.close()
    assert received == [(3, 1, "step"), (3, 1, "end")]
