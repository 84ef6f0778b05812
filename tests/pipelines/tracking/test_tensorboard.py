"""TensorBoard's event files have what MLflow has, each step once. TensorBoard's own reader is the oracle."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from mlflow.entities import Metric

from pipelines.storage import locate
from pipelines.tracking import tensorboard
from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.tensorboard import EventFiles, complete
from tests.pipelines.tracking.curves import in_mlflow, in_tensorboard


@pytest.fixture
def run(database: Path, tmp_path: Path) -> TrackedRun:
    return TrackedRun.open(f"sqlite:///{database}", "tensorboard", "run", str(tmp_path), {})


def points(steps: Sequence[int]) -> list[Metric]:
    return [Metric("loss", step / 3, 1_700_000_000_000 + step, step) for step in steps]


def log_steps(run: TrackedRun, folder: Path, steps: range, factor: float = 1.0) -> None:
    log = MetricLog(run, locate(folder), event_files=EventFiles(locate(folder)))
    for step in steps:
        log.log(step, {"loss/total": factor / (step + 3), "images_per_second": factor * step})
    if steps.start:
        log.log(steps.stop, {"quick_pq/all": 0.1 * factor})
    log.close()


def test_restarts_leave_each_step_once_with_the_value_of_mlflow(run: TrackedRun, tmp_path: Path) -> None:
    """An attempt that repeats steps has other rates; MLflow keeps the first."""
    for attempt, steps in enumerate((range(7), range(5, 10), range(8, 12)), 1):
        log_steps(run, tmp_path, steps, attempt)
    shown = in_tensorboard(tmp_path)
    assert shown == in_mlflow(run)
    assert [step for step, _ in shown["images_per_second"]] == list(range(12))
    assert [step for step, _ in shown["quick_pq/all"]] == [10, 12]


def test_what_a_kill_took_is_added_by_the_next_attempt(run: TrackedRun, tmp_path: Path) -> None:
    """MLflow had accepted steps 4 to 6 when the process was killed; TensorBoard had not."""
    log_steps(run, tmp_path, range(4))
    run.log_metrics(4, {"loss/total": 4.0})
    run.log_metrics(5, {"loss/total": math.inf})
    run.log_metrics(6, {"loss/total": math.nan})
    log_steps(run, tmp_path, range(3, 9))
    shown = in_tensorboard(tmp_path)
    np.testing.assert_equal(shown, in_mlflow(run))
    assert [step for step, _ in shown["loss/total"]] == list(range(9))
    assert math.isnan(shown["loss/total"][6][1])


@pytest.mark.parametrize("cut", [1, 4, 5, 20, "zeros"])
def test_an_event_that_was_cut_off_is_written_again(cut: int | str, tmp_path: Path) -> None:
    files = EventFiles(locate(tmp_path))
    for step in range(3):
        files.add(points([step]))
    files.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-10] + bytes(500) if cut == "zeros" else content[: -int(cut)])
    assert [step for step, _ in in_tensorboard(tmp_path)["loss"]] == [0, 1], "the oracle sees the damage"
    after = EventFiles(locate(tmp_path))
    after.add(points(range(5)))
    after.close()
    assert in_tensorboard(tmp_path) == {"loss": [(step, float(np.float32(step / 3))) for step in range(5)]}


def test_files_stay_in_order_when_the_clock_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads files in the order of their names, and some of its readers drop steps that go back."""
    for time, steps in ((2_000.0, range(3)), (1_000.0, range(5)), (1_001.5, range(9))):
        monkeypatch.setattr(tensorboard.time, "time", lambda time=time: time)
        files = EventFiles(locate(tmp_path))
        files.add(points(steps))
        files.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    assert [step for step, _ in in_tensorboard(tmp_path)["loss"]] == list(range(9))


def test_a_folder_that_cannot_be_written_is_a_warning_and_completed_later(
    run: TrackedRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    obstacle = tmp_path / "tensorboard"
    obstacle.write_text("")
    log_steps(run, tmp_path, range(5))
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert warned[0].startswith(f"TensorBoard's files in {obstacle} are not written now: ")
    assert len(in_mlflow(run)["loss/total"]) == 5
    obstacle.unlink()
    complete(run, locate(tmp_path))
    assert in_tensorboard(tmp_path) == in_mlflow(run)
    before = sorted(obstacle.iterdir())
    complete(run, locate(tmp_path))
    assert sorted(obstacle.iterdir()) == before, "nothing was missing"


def test_completing_without_mlflow_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    complete(TrackedRun("http://127.0.0.1:9", "0"), locate(tmp_path))
    (record,) = caplog.records
    assert "may lack the last points" in record.message
    assert "does not answer" in record.message
