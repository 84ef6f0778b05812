"""Measure what scaling.reduction exact costs against fast, with two workers on this machine.

python jobs/bench/reduction.py

Workers are processes that communicate over loopback. What exact adds to a step does not depend on the size of images,
so it is measured with small ones, whose steps vary less; its share is that of a step with the recipe's images. CPU time
includes the threads that communicate, and tells more than wall time if the machine has other work.
"""

import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from jobs.shared.cli import parse, run
from pipelines.config.recipes import DEMO, R50_MMDET
from pipelines.config.train import TrainConfig

SMALL = 32
"""Side of a small image in pixels."""
CASES: dict[str, tuple[TrainConfig, int, int]] = {"demo": (DEMO, 4, 64), "R50": (R50_MMDET, 1, 512)}
"""Configuration, images per micro-batch and side of its images in pixels."""


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """Measure what scaling.reduction exact costs against fast, with two workers on this machine."""

    models: tuple[Literal["demo", "R50"], ...] = ("demo", "R50")
    """Models to measure."""
    workers: int = 2
    """Processes, with one PyTorch thread each."""
    accumulation: int = 1
    """Micro-batches per worker and step."""
    small_steps: int = 40
    """Steps of each kind with small images. Exact and fast take turns, so that both meet the same load."""
    steps: int = 5
    """Steps of each kind with the recipe's images."""


def main() -> None:
    flags = parse(Reduction, Reduction(), __doc__)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Medians of worker 0's steps, ms.")
    print(
        f"{'':<18}{'small: fast':>13}{'exact':>9}{'of it finish':>14}{'added':>9}"
        f"{'step: fast':>13}{'exact':>9}{'added/fast':>12}"
    )
    for name in flags.models:
        millions, times = _measure(flags, name)
        print(f"{name}, {millions:.1f} M parameters")
        for index, clock in enumerate(("wall", "CPU")):
            of_clock = {key: [1000 * pair[index] for pair in pairs] for key, pairs in times.items()}
            small_fast, small_exact, finish, fast, exact = (
                median(of_clock[key]) for key in ("small fast", "small exact", "small finish", "fast", "exact")
            )
            # Of neighbors, because the load of the machine changes.
            neighbors = zip(of_clock["small exact"], of_clock["small fast"], strict=True)
            added = median(one - other for one, other in neighbors)
            print(
                f"  {clock:<16}{small_fast:>13.1f}{small_exact:>9.1f}{finish:>14.1f}{added:>9.1f}"
                f"{fast:>13.0f}{exact:>9.0f}{added / fast:>12.1%}",
                flush=True,
            )
    print(f"Load at the end: {os.getloadavg()[0]:.1f}.")


def _measure(flags: Reduction, name: str) -> tuple[float, dict[str, list[tuple[float, float]]]]:
    """Return the millions of parameters, and wall and CPU seconds by kind of step."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (flags, name, f"file://{folder}/store", sender)
        members = [context.Process(target=_member, args=(rank, *arguments)) for rank in range(flags.workers)]
        for member in members:
            member.start()
        sender.close()
        answer = receiver.recv()
        for member in members:
            member.join()
    return answer


def _member(rank: int, flags: Reduction, name: str, store: str, answer: Any) -> None:
    """Do steps as this rank; rank 0 sends what `_measure` returns to `answer`."""
    import torch
    import torch.distributed as dist

    from maskformer import build_model, compute_losses
    from maskformer.optim import build_optimizer
    from pipelines.data.batch import PanopticBatch
    from pipelines.data.order import BatchSplit
    from pipelines.training.reduction import ExactReduction, FastReduction

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=flags.workers)
    config, images, side = CASES[name]
    global_batch = images * flags.workers * flags.accumulation
    split = BatchSplit(global_batch=global_batch, micro_batch=images, workers=flags.workers)
    # Each kind has a network of its own, since DDP's hooks stay on the one that it has wrapped.
    kinds = {}
    for kind, reduction in (("exact", ExactReduction), ("fast", FastReduction)):
        torch.manual_seed(0)
        network = build_model(config.model).train()
        kinds[kind] = reduction(network, split, torch.device("cpu")), build_optimizer(network, config.optimizer)

    def batch(side: int) -> PanopticBatch:
        """Return random images with four segments each."""
        quarters = torch.arange(1, 5, dtype=torch.int32).repeat_interleave(side // 4)
        return PanopticBatch(
            images=torch.randint(255, (images, 3, side, side), dtype=torch.uint8),
            index_maps=quarters.expand(images, side, side).contiguous(),
            sizes=((side, side),) * images,
            classes=(torch.arange(4),) * images,
            positions=tuple(range(images)),
            epochs=(0,) * images,
            image_ids=(0,) * images,
        )

    times: dict[str, list[tuple[float, float]]] = defaultdict(list)

    def clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def note(key: str, since: tuple[float, float]) -> None:
        wall, cpu = clocks()
        times[key].append((wall - since[0], cpu - since[1]))

    def step(kind: str, prefix: str, samples: PanopticBatch) -> None:
        dist.barrier()
        start = clocks()
        reduction, optimizer = kinds[kind]
        for turn in range(flags.accumulation):
            with reduction.micro_batch(last=turn == flags.accumulation - 1):
                output = reduction.model(*samples.inputs(config.model.pixel_mean, config.model.pixel_std))
                loss = compute_losses(output, samples.targets(), config.loss, 4.0 * images).total
                (loss * reduction.scale).backward()
        since = clocks()
        reduction.finish()
        if kind == "exact":
            note(f"{prefix}finish", since)
        torch.nn.utils.clip_grad_norm_(reduction.parameters, config.optimizer.clip_norm)
        optimizer.step()
        note(f"{prefix}{kind}", start)

    for prefix, samples, steps in (("small ", batch(SMALL), flags.small_steps), ("", batch(side), flags.steps)):
        for turn in range(1 + steps):
            for kind in ("exact", "fast") if turn % 2 else ("fast", "exact"):
                step(kind, prefix, samples)
    if rank == 0:
        millions = sum(p.numel() for p in kinds["exact"][0].parameters) / 1e6
        answer.send((millions, {key: values[1:] for key, values in times.items()}))  # the first one is a warm-up
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
