import threading

import pytest
import torch

from maskformer import LossConfig, MaskFormerOutput, Targets, compute_losses
from maskformer.pieces import for_each

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_task_runs_once_and_errors_are_raised(threads: int):
    done: list[int] = []
    for_each(done.append, range(50), CPU)
    assert sorted(done) == list(range(50))

    def fail(number: int) -> None:
        if number == 3:
            raise ValueError("task 3")

    with pytest.raises(ValueError, match="task 3"):
        for_each(fail, range(8), CPU)
    for_each(done.append, range(50, 60), CPU)
    assert sorted(done) == list(range(60))


def test_tasks_compute_with_one_thread_each_and_others_with_as_many_as_before(threads: int):
    inside: list[int] = []

    def compute(_: int) -> None:
        torch.ones(1 << 20).add_(1)  # large enough for several threads
        inside.append(torch.get_num_threads())

    for_each(compute, range(8), CPU)
    assert set(inside) == {1}
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_tasks_record_nothing_for_autograd(threads: int):
    weight = torch.ones(3, requires_grad=True)
    results: list[torch.Tensor] = []
    for_each(lambda number: results.append(weight * number), range(4), CPU)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_losses_are_the_same_without_gradients(threads: int, mode: type):
    generator = torch.Generator().manual_seed(0)
    output = MaskFormerOutput(
        torch.randn(3, 2, 6, 5, generator=generator), torch.randn(3, 2, 6, 4, 5, generator=generator)
    )
    targets = [
        Targets(torch.arange(3), torch.randint(0, 4, (16, 20), generator=generator, dtype=torch.int32))
        for _ in range(2)
    ]
    expected = compute_losses(output, targets, LossConfig()).by_layer
    with mode():
        again = MaskFormerOutput(*(logits.clone() for logits in output))
        assert torch.equal(compute_losses(again, targets, LossConfig()).by_layer, expected)
        assert torch.equal(compute_losses(output, targets, LossConfig()).by_layer, expected)
