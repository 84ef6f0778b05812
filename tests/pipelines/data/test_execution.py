"""Ray Data executions: the errors of tasks, and a loop that waits instead of spinning."""

import time
from types import SimpleNamespace

import pyarrow as pa
import pytest
import ray
import ray.data
from ray.exceptions import RayError

from pipelines.data.execution import _LONGEST_WAIT, _SHORTEST_WAIT, _WaitForTasks, mapped, outputs
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]


def numbers(count: int) -> ray.data.Dataset:
    return ray.data.from_items([{"number": number} for number in range(count)], override_num_blocks=count)


@pytest.mark.parametrize("kind", [UserError, StorageRefusedError, StorageUnavailableError])
def test_errors_of_tasks_keep_their_kind(kind: type[Exception]) -> None:
    def fail(table: pa.Table) -> pa.Table:
        raise kind("Cannot read it: the reason.") from UserError("The cause.")

    with pytest.raises(kind, match=r"^Cannot read it: the reason\.$"):
        list(outputs(mapped(numbers(1), fail, "failing", in_order=True, task_cpus=0.5)))


def test_other_errors_of_tasks_stay_as_they_are() -> None:
    def fail(table: pa.Table) -> pa.Table:
        raise OSError("pipelines.errors.UserError: not this one")

    with pytest.raises(RayError, match="not this one"):
        list(outputs(mapped(numbers(1), fail, "failing", in_order=True, task_cpus=0.5)))


def test_blocks_arrive_in_the_order_of_their_inputs() -> None:
    def delay_even_ones(table: pa.Table) -> pa.Table:
        time.sleep(0.1 if table["number"][0].as_py() % 2 == 0 else 0)
        return table

    tables = outputs(mapped(numbers(12), delay_even_ones, "ordered", in_order=True, task_cpus=0.5))
    assert [number for table in tables for number in table["number"].to_pylist()] == list(range(12))


def test_the_loop_waits_while_outputs_are_held_back() -> None:
    done = SimpleNamespace(get_waitable=lambda: ref)  # `ray.wait` on it returns at once
    ref = ray.put(0)
    executor = SimpleNamespace(_topology=[SimpleNamespace(get_active_tasks=lambda: [done])])
    waiting = _WaitForTasks()
    waiting.on_execution_step(executor)
    start = time.perf_counter()
    for _ in range(10):
        waiting.on_execution_step(executor)
    assert time.perf_counter() - start >= _SHORTEST_WAIT + 7 * _LONGEST_WAIT
