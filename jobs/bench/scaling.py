"""Measure the overhead of Ray and DDP per step, start and worker, and model 16 and 64 GPUs with it.

python jobs/bench/scaling.py

Workers and nodes are processes of this machine. If they need more cores than it has, wall time includes waiting for a
core and CPU time does not; the tables show both. Each assumption of the model is printed on its own line.
"""

import logging
import math
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any, Literal

import psutil

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from pipelines.config.hardware import Hardware
from pipelines.config.recipes import DEMO, R50_MMDET, SWIN_L_MMDET
from pipelines.config.train import ScalingConfig, TrainConfig
from pipelines.data.augment_config import AugmentConfig

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from pipelines.data.batch import PanopticBatch
    from pipelines.planning.performance import Rows

logger = logging.getLogger(__name__)

SIDE = 48
"""Side of an image in pixels. Decoding such an image costs almost nothing, and the network of the demo little."""
EVERY, LOG_EVERY = 50, 5
"""Steps between checkpoints, and between logged losses."""
TASKS = 17
"""Ray Data tasks of a measured stream: executions of one, eight and eight."""
PER_TASK = (1, 4, 16, 64)
"""Images per Ray Data task."""
IDLE = 4.0  # seconds for which the CPU time of an idle Ray is measured


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Measure the overhead of Ray and DDP per step, start and worker, and model 16 and 64 GPUs with it."""

    parts: tuple[Literal["step", "fit", "data", "model"], ...] = ("step", "fit", "data", "model")
    """Parts to run. step: DDP alone. fit: complete runs. data: Ray Data. model: model of 16 and 64 GPUs."""
    workers: tuple[int, ...] = (1, 2, 3)
    """Numbers of workers in the parts step and fit."""
    streams: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of workers in the part data."""
    nodes: int = 2
    """Simulated nodes in the part data."""
    rounds: int = 3
    """Repetitions in the parts step and data. Each one runs all variants in turn."""
    steps: int = 300
    """Optimizer steps of each run in the part fit."""
    cluster: Hardware = field(default_factory=Hardware)
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


def main() -> None:
    flags = parse(Scaling, Scaling(), __doc__)

    from pipelines.planning.performance import CONFIRM, OVERHEADS, step_model  # imports torch, which --help should not

    overheads = dict(OVERHEADS)
    logging.getLogger("pipelines").setLevel(logging.WARNING)
    print(f"{psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Figures: median [min, max].")
    for part, measure in {"step": measure_steps, "fit": measure_fits, "data": measure_data}.items():
        if part in flags.parts:
            logger.info("Part %s.", part)
            with quiet(flags.verbose):
                text, found = measure(flags, overheads)
            overheads |= found
            print(f"\n{text}\nLoad at the end: {os.getloadavg()[0]:.1f}.", flush=True)
    if "model" in flags.parts:
        for recipe in (R50_MMDET, SWIN_L_MMDET):
            print(f"\n{step_model(recipe, flags.cluster, overheads)}", flush=True)
        print(f"\n{CONFIRM}")


# ---- DDP alone


def measure_steps(flags: Scaling, _: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Time `train_step` with and without all-reduce of the gradients, and the all-reduce of two numbers before it."""
    from maskformer import build_model
    from pipelines.planning.performance import table

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        arguments = (flags, f"file://{folder}/store", sender)
        members = [context.Process(target=_member, args=(rank, *arguments)) for rank in range(max(flags.workers))]
        for member in members:
            member.start()
        sender.close()
        times: dict[tuple[int, str], list[tuple[float, float]]] = receiver.recv()
        for member in members:
            member.join()
    rows: Rows = [
        ("DDP alone", "no all-reduce, ms", "all-reduce, ms", "difference", "two numbers, ms",
         "CPU: no all-reduce", "all-reduce", "two numbers"),
    ]  # fmt: skip
    for n in flags.workers:
        wall, cpu = (
            [[1000 * pair[kind] for pair in times[n, what]] for what in ("alone", "together", "agree")]
            for kind in (0, 1)
        )
        difference = f"{median(wall[1]) - median(wall[0]):.1f}"
        used = [f"{median(values):.2f}" for values in cpu]
        rows.append((_count(n), _spread(wall[0]), _spread(wall[1]), difference, _spread(wall[2], 2), *used))
    megabytes = sum(parameter.nbytes for parameter in build_model(DEMO.model).parameters()) / 1e6
    notes = (
        f"One {SIDE}x{SIDE} image per worker, {megabytes:.1f} MB of gradients, gloo on loopback; CPU ms of worker 0."
    )
    kept = {"step": (1, "together"), "agree": (2, "agree")}
    found = {name: 1000 * median(wall for wall, _ in times[key]) for name, key in kept.items() if key in times}
    return f"{table(rows)}\n{notes}", found


def _member(rank: int, flags: Scaling, store: str, answer: Any) -> None:
    """Take part in the process groups with this rank; rank 0 sends wall and CPU seconds of every step to `answer`."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from maskformer import build_model
    from maskformer.optim import build_optimizer
    from pipelines.training.worker import train_step

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=max(flags.workers))
    groups = {n: dist.new_group(list(range(n))) for n in flags.workers}
    models = {
        n: DistributedDataParallel(build_model(DEMO.model), process_group=group)
        for n, group in groups.items()
        if rank < n
    }
    optimizers = {n: build_optimizer(network.module, DEMO.optimizer) for n, network in models.items()}
    batches, device = [_batch()], torch.device("cpu")

    def step(n: int, together: bool) -> None:
        train_step(_Grouped(models[n], together), optimizers[n], batches, 3.0, 1e-3, DEMO, device)

    def agree(n: int) -> None:
        numbers = torch.zeros(2, dtype=torch.float64)
        dist.all_reduce(numbers, group=models[n].process_group)
        numbers.tolist()

    variants = {"alone": lambda n: step(n, False), "together": lambda n: step(n, True), "agree": agree}
    times: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for turn in range(1 + flags.rounds):  # the first one is a warm-up
        for n in flags.workers:
            for what, variant in variants.items():
                dist.barrier()
                for _ in range(20 if rank < n else 0):
                    wall, cpu = time.perf_counter(), time.process_time()
                    variant(n)
                    if turn:
                        times[n, what].append((time.perf_counter() - wall, time.process_time() - cpu))
    if rank == 0:
        answer.send(dict(times))
    dist.barrier()
    dist.destroy_process_group()


class _Grouped:
    """The reduction of one micro-batch of a process group by DDP; or none at all."""

    def __init__(self, model: "DistributedDataParallel", together: bool) -> None:
        self.model: nn.Module = model
        self.parameters: list[nn.Parameter] = list(model.parameters())
        self.turns: list[int] = [0]
        self.scale: float = 1.0
        self._ddp, self._together = model, together

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        with nullcontext() if self._together else self._ddp.no_sync():
            yield

    def finish(self) -> None:
        pass


def _batch() -> "PanopticBatch":
    """Return a batch of one random image with three segments."""
    import torch

    from pipelines.data.batch import PanopticBatch

    thirds = torch.arange(1, 4, dtype=torch.int32).repeat_interleave(SIDE // 3)
    return PanopticBatch(
        images=torch.randint(255, (1, 3, SIDE, SIDE), dtype=torch.uint8),
        index_maps=thirds.expand(1, SIDE, SIDE).contiguous(),
        sizes=((SIDE, SIDE),),
        classes=(torch.arange(3),),
        positions=(0,),
        epochs=(0,),
        image_ids=(0,),
    )


# ---- complete runs


def measure_fits(flags: Scaling, overheads: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Run `fit` for each number of workers, and time its start, its steps and the delay by a checkpoint."""
    from mlflow.tracking import MlflowClient

    from pipelines.cluster.simulated import Node, simulated
    from pipelines.planning.memory import state_memory
    from pipelines.planning.performance import table
    from pipelines.storage import locate
    from pipelines.training import fit, ledger

    rows: Rows = [("fit", "workers started, s", "first step, s", "step, ms", "of it data", "checkpoint delay, ms")]
    found: dict[str, float] = {}
    with simulated([Node(2 * max(flags.workers))], {"OMP_NUM_THREADS": "1"}) as cluster:
        _draw(cluster.folder)
        for n in flags.workers:
            since = time.time()
            result = fit(_small(n, flags.steps, cluster.folder))
            up = next(e["time"] for e in ledger.read(locate(result.folder)) if e["event"] == "start") - since
            client, run_id = MlflowClient(result.mlflow_run.uri), result.mlflow_run.run_id
            stamps = {m.step: m.timestamp for m in client.get_metric_history(run_id, "loss/total")}
            waits = [m.value for m in client.get_metric_history(run_id, "data_wait_share") if m.step > 100]
            first = stamps.pop(1) / 1000 - since
            # The first hundred steps are a warm-up. A checkpoint is saved after its step was logged.
            spans = {s: stamps[s + LOG_EVERY] - stamps[s] for s in stamps if s >= 100 and s + LOG_EVERY in stamps}
            steps = [span / LOG_EVERY for s, span in spans.items() if s % EVERY]
            held = [span - LOG_EVERY * median(steps) for s, span in spans.items() if s % EVERY == 0]
            texts = f"{up:.1f}", f"{first:.1f}", _spread(steps), f"{mean(waits):.0%}", _spread(held, 0)
            rows.append((_count(n), *texts))
            if n == 1:
                found["loop"] = max(0.0, (1 - mean(waits)) * median(steps) - overheads["step"])
            if n == 2:
                found |= {"start": first, "report": max(0.0, median(held))}
    notes = (
        f"The same images and network, with Ray already running; a checkpoint of "
        f"{state_memory(DEMO.model).checkpoint / 1e6:.0f} MB every {EVERY} steps, on a local disk. Driver, data tasks, "
        f"database and the writing of checkpoints share the same cores."
    )
    return f"{table(rows)}\n{notes}", found


def _small(workers: int, steps: int, folder: Path) -> TrainConfig:
    names = {"name": f"on-{workers}", "storage": f"{folder}/runs"}
    return replace(
        DEMO,
        data=replace(DEMO.data, train=f"{folder}/train", augment=_augmentation(), samples_per_task=16),
        run=replace(DEMO.run, **names, steps=steps, global_batch=workers, micro_batch=1),
        scaling=ScalingConfig(workers=workers, device="cpu", cpus_per_worker=1, data_cpus=workers),
        checkpoint=replace(DEMO.checkpoint, every=EVERY),
        evaluation=replace(DEMO.evaluation, every=0),
        tracking=replace(DEMO.tracking, uri=f"sqlite:///{folder}/mlflow.db", log_every=LOG_EVERY),
    )


def _augmentation() -> AugmentConfig:
    return AugmentConfig(short_sides=(SIDE,), long_side=SIDE, crop_probability=0)


def _draw(folder: Path) -> None:
    from pipelines.data.synthetic import SyntheticConfig, draw_and_pack

    draw_and_pack(folder, SyntheticConfig(num_images=64, min_side=SIDE, max_side=SIDE))


# ---- Ray Data


def measure_data(flags: Scaling, _: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Let workers consume streams of tiny images, and measure the overhead of a data task by process."""
    import numpy as np
    import ray

    from pipelines.cluster.simulated import Node, simulated
    from pipelines.data.manifest import PackedSet, open_pack
    from pipelines.data.order import BatchSplit
    from pipelines.data.sample_order import SampleOrder
    from pipelines.data.stream import training_batches
    from pipelines.planning.performance import table

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    class Trainer:
        def take(self, samples: PackedSet, seed: int, per_task: int) -> tuple[float, float, float]:
            """Return seconds to the first and to the last image, and CPU seconds of this process."""
            since, cpu, first = time.perf_counter(), time.process_time(), 0.0
            order = SampleOrder(
                image_ids=samples.image_ids,
                heights=samples.index["height"].to_numpy(),
                widths=samples.index["width"].to_numpy(),
                seed=seed,
                augmentation=_augmentation(),
                split=BatchSplit(global_batch=1, micro_batch=1, workers=1),
            )
            for _ in training_batches(
                samples, order, rank=0, first_step=0, last_step=TASKS * per_task,
                samples_per_task=per_task, cpus=1, object_store=10**9, prefetch=8,
            ):  # fmt: skip
                first = first or time.perf_counter() - since
            return first, time.perf_counter() - since, time.process_time() - cpu

    variants = dict.fromkeys([*((n, 16) for n in flags.streams), *((1, per_task) for per_task in PER_TASK)])
    taken: dict[tuple[int, int], list[list[float]]] = defaultdict(list)
    node = Node(math.ceil(max(flags.streams) / flags.nodes))
    with simulated([node] * flags.nodes, {"OMP_NUM_THREADS": "1"}) as cluster:
        _draw(cluster.folder)
        samples = open_pack(f"{cluster.folder}/train")
        trainers: list[Any] = [Trainer.remote() for _ in range(max(flags.streams))]
        ray.get([trainer.take.remote(samples, 0, 16) for trainer in trainers])  # starts the processes
        before = _cpu_seconds()
        time.sleep(IDLE)
        idle = {role: (used - before[role]) / IDLE for role, used in _cpu_seconds().items()}
        for turn in range(flags.rounds):
            for n, per_task in variants:
                before, since = _cpu_seconds(), time.perf_counter()
                facts = ray.get([trainer.take.remote(samples, turn, per_task) for trainer in trainers[:n]])
                seconds, tasks = time.perf_counter() - since, n * TASKS
                first, last, trainer_cpu = (mean(values) for values in zip(*facts, strict=True))
                spent = {role: used - before[role] - idle[role] * seconds for role, used in _cpu_seconds().items()}
                cpu = [spent["gcs_server"], spent["raylet"], spent["ray"] - n * trainer_cpu, n * trainer_cpu]
                busy = sum(spent.values()) / seconds
                used = [1000 * value / tasks for value in cpu]
                taken[n, per_task].append([tasks / seconds, first, 1000 * last / TASKS, busy, *used])
    rows: Rows = [("Ray Data", "tasks/s", "images/s each", "first image, s", "ms per task", "cores busy",
             "CPU ms per task: head", "raylets", "data task", "trainer")]  # fmt: skip
    for (n, per_task), rounds in taken.items():
        rate, first, task, busy, *cpu = zip(*rounds, strict=True)
        each = f"{median(rate) * per_task / n:.0f}"
        texts = f"{median(rate):.1f}", each, _spread(first), _spread(task, 0), f"{median(busy):.1f}"
        rows.append((f"{_count(n)}, {per_task} per task", *texts, *(f"{median(values):.1f}" for values in cpu)))
    typical = {key: [median(values) for values in zip(*rounds, strict=True)] for key, rounds in taken.items()}
    slope, task = np.polyfit(PER_TASK, [typical[1, per_task][2] for per_task in PER_TASK], 1)
    widest = typical[max(flags.streams), 16]
    found = {"task": float(task), "head": widest[4], "raylets": widest[5], "trainer": widest[7]}
    notes = (
        f"The data tasks of a worker run one at a time, on {_count(flags.nodes, 'simulated node')}. CPU time excludes "
        f"that of an idle Ray: {1000 * idle['gcs_server']:.0f} ms/s of the head and "
        f"{1000 * idle['raylet']:.0f} ms/s of the raylets. With one worker a task takes {task:.0f} ms and "
        f"{slope:.1f} ms per image."
    )
    return f"{table(rows)}\n{notes}", found


def _cpu_seconds() -> dict[str, float]:
    """Return CPU seconds of this process's descendants by role: gcs_server, raylet, ray (tasks and actors), other."""
    seconds = {"gcs_server": 0.0, "raylet": 0.0, "ray": 0.0, "other": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            name, used = process.name(), process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        role = "ray" if name.startswith("ray::") else name
        seconds[role if role in seconds else "other"] += used.user + used.system
    return seconds


def _count(number: int, what: str = "worker") -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    run(main)
