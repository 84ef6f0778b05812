"""Progress is a bar on a terminal and log lines elsewhere, never both."""

import io
import logging

import pytest

from pipelines import progress as module
from pipelines.progress import StepProgress, progress


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Draw bars on the returned stream."""
    stream = io.StringIO()
    monkeypatch.setattr(module, "terminal", stream)
    return stream


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


def figures(step: int, **changes: float) -> dict[str, float]:
    values = {"total": 40, "loss": 2.34567, "images_per_second": 12.345, "data_wait_share": 0.256, "eta_seconds": 3725}
    return {"step": step, **values, **changes}


def test_items_pass_and_the_log_counts_them(log: pytest.LogCaptureFixture) -> None:
    assert list(progress(iter("abc"), 3, "letters read", seconds=0.0)) == ["a", "b", "c"]
    assert [message.partition(",")[0] for message in log.messages] == [f"{n} of 3 letters read" for n in (1, 2, 3)]
    assert log.messages[-1].endswith("about 0 s left")


def test_a_short_loop_logs_nothing(log: pytest.LogCaptureFixture) -> None:
    list(progress(range(100), 100, "numbers read"))
    assert not log.messages


def test_on_a_terminal_there_is_a_bar_and_no_log_line(terminal: io.StringIO, log: pytest.LogCaptureFixture) -> None:
    assert list(progress(iter("abc"), 3, "letters read", seconds=0.0)) == ["a", "b", "c"]
    assert "letters read" in terminal.getvalue()
    assert "/3" in terminal.getvalue()
    assert log.messages == []


def test_steps_are_logged_once_each_without_a_terminal(log: pytest.LogCaptureFixture) -> None:
    steps = StepProgress()
    for step in (10, 10, 20):
        steps.show(figures(step))
    steps.show(figures(30, eta_seconds=3.5 * 86400))
    steps.close()
    rest = "  loss 2.3457  12.3 images/s  waiting for data 26 %"
    assert log.messages == [
        f"step 10/40{rest}  01:02:05 left",
        f"step 20/40{rest}  01:02:05 left",
        f"step 30/40{rest}  3.5 days left",
    ]


def test_steps_on_a_terminal_are_a_bar_and_a_line_for_the_log_file(
    terminal: io.StringIO, log: pytest.LogCaptureFixture
) -> None:
    steps = StepProgress()
    steps.show(figures(10))
    assert "10/40" in terminal.getvalue()  # a resumed run does not start at zero
    assert "loss 2.3457" in terminal.getvalue()
    steps.show(figures(20, loss=1.5))
    assert "20/40" in terminal.getvalue()
    assert "loss 1.5000" in terminal.getvalue()
    steps.close()
    # Jobs show the lines of `pipelines` on the console; these are not among them.
    assert [(record.name, record.message[:10]) for record in log.records] == [
        ("progress", "step 10/40"),
        ("progress", "step 20/40"),
    ]


def test_a_terminal_that_is_gone_does_not_end_the_training(terminal: io.StringIO) -> None:
    steps = StepProgress()
    steps.show(figures(10))
    terminal.close()
    steps.show(figures(20))
    steps.close()


def test_closing_before_the_first_step_is_fine(terminal: io.StringIO) -> None:
    StepProgress().close()
    assert terminal.getvalue() == ""
