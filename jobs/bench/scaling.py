"""Measure what our machinery costs per step, per start and per worker, and model 16 and 64 GPUs with it.

python jobs/bench/scaling.py

Workers and nodes are processes of this machine. Where they want more cores than it has, wall time tells of that and
CPU time alone of the machinery; the tables have both. Every assumption of the model has a line of its own.
"""

import logging
import math
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from jobs.cli import parse, run
from jobs.plan import COCO_MASKS, IMAGES_PER_CPU
from maskformer import build_model
from maskformer.config import ModelConfig
from maskformer.inference import resized_shape
from maskformer.optim import build_optimizer
from pipelines.config import ScalingConfig, TrainConfig
from pipelines.data.augment import AugmentConfig, Sample, augment, sample_rng
from pipelines.data.batch import PanopticBatch
from pipelines.memory import multiply_adds, state_memory
from pipelines.plan import GB, GPU_TFLOPS, Hardware, image_sizes, make_plan
from pipelines.recipes import COCO_TRAIN_IMAGES, DEMO, R50_MMDET, SWIN_L_MMDET

logger = logging.getLogger(__name__)

SIDE = 48
"""Pixels of a picture: decoding it costs next to nothing, and the demo's network little."""
EVERY, LOG_EVERY = 50, 5
TASKS = 17
"""Ray Data tasks of a measured stream: executions of one, eight and eight."""
PER_TASK = (1, 4, 16, 64)
IDLE = 4.0  # seconds to look at what Ray takes when nothing runs
DRAWS = 400  # of an augmented image
POLL = 2.0  # seconds between two looks of Ray Train's controller for a report


Rows = list[Sequence[str]]

OPERATOR = (5e-6, 10e-6)  # seconds of the host for an operator, at best and at worst
COPY = 5.0  # GB a second from a GPU to pageable memory, for a checkpoint's snapshot
SCORE = 0.3  # seconds to post-process and score an image of the quick PQ, beside the network

OVERHEADS = {
    "step": 38.1,  # ms of the demo's `train_step` with one small picture, one worker
    "agree": 0.32,  # ms until two workers agree on two numbers, as before each step: gloo, loopback
    "loop": 5.5,  # ms of a step beside `train_step` and waiting for data, one worker
    "report": 69.0,  # ms that a small checkpoint holds two workers up
    "start": 19.2,  # s from the call of fit() to the end of the first step, two workers
    "task": 39.0,  # ms of a Ray Data task and its share of an execution, beside its images
    "head": 2.2,  # CPU ms of a task in the head's GCS
    "raylets": 15.1,  # CPU ms of a task in all raylets
    "trainer": 32.7,  # CPU ms of a task of 16 images in the trainer's process
}
"""Measured on two cores of an AMD EPYC: for the model, when a part is left out."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Measure what our machinery costs per step, per start and per worker, and model 16 and 64 GPUs with it."""

    parts: tuple[Literal["step", "fit", "data", "model"], ...] = ("step", "fit", "data", "model")
    """step: DDP alone. fit: whole runs. data: Ray Data. model: 16 and 64 GPUs."""
    workers: tuple[int, ...] = (1, 2, 3)
    """Of step and fit."""
    streams: tuple[int, ...] = (1, 2, 4, 8)
    """Workers of data."""
    nodes: int = 2
    """Simulated nodes of data."""
    rounds: int = 3
    """Of step and data; each takes all variants in turn."""
    steps: int = 300
    """Of each run of fit."""
    cluster: Hardware = field(default_factory=Hardware)


def main() -> None:
    flags = parse(Scaling)
    overheads = dict(OVERHEADS)
    logging.getLogger("pipelines").setLevel(logging.WARNING)
    print(f"{psutil.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start. Figures: median [least, most].")
    for part, measure in {"step": measure_steps, "fit": measure_fits, "data": measure_data}.items():
        if part in flags.parts:
            logger.info("Part %s.", part)
            table, found = measure(flags, overheads)
            overheads |= found
            print(f"\n{table}\nLoad at its end: {os.getloadavg()[0]:.1f}.", flush=True)
    if "model" in flags.parts:
        for recipe in (R50_MMDET, SWIN_L_MMDET):
            print(f"\n{model(recipe, flags, overheads)}", flush=True)
        print(f"\n{CONFIRM}")


# ---- DDP alone


def measure_steps(flags: Scaling, _: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Time `train_step` with and without the exchange of gradients, and the agreement before it."""
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
        ("DDP alone", "step alone, ms", "in step, ms", "exchange", "agree, ms", "CPU alone", "in step", "agree")
    ]
    for n in flags.workers:
        wall, cpu = (
            [[1000 * pair[kind] for pair in times[n, what]] for what in ("alone", "together", "agree")]
            for kind in (0, 1)
        )
        exchange = f"{median(wall[1]) - median(wall[0]):.1f}"
        used = [f"{median(values):.2f}" for values in cpu]
        rows.append((_count(n), _spread(wall[0]), _spread(wall[1]), exchange, _spread(wall[2], 2), *used))
    megabytes = sum(parameter.nbytes for parameter in build_model(DEMO.model).parameters()) / 1e6
    notes = f"One {SIDE}x{SIDE} picture each, {megabytes:.1f} MB of gradients, gloo on loopback; CPU of worker 0, ms."
    kept = {"step": (1, "together"), "agree": (2, "agree")}
    found = {name: 1000 * median(wall for wall, _ in times[key]) for name, key in kept.items() if key in times}
    return f"{_table(rows)}\n{notes}", found


def _member(rank: int, flags: Scaling, store: str, answer: Any) -> None:
    """Take part in the groups that have this rank; rank 0 answers with wall and CPU seconds of every step."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

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
    batches, device = [_picture()], torch.device("cpu")

    def step(n: int, together: bool) -> None:
        with nullcontext() if together else models[n].no_sync():
            train_step(models[n], optimizers[n], batches, 3.0, 1e-3, DEMO, device)

    def agree(n: int) -> None:
        numbers = torch.zeros(2, dtype=torch.float64)
        dist.all_reduce(numbers, group=models[n].process_group)
        numbers.tolist()

    variants = {"alone": lambda n: step(n, False), "together": lambda n: step(n, True), "agree": agree}
    times: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for turn in range(1 + flags.rounds):  # the first warms up
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


def _picture() -> PanopticBatch:
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


# ---- whole runs


def measure_fits(flags: Scaling, overheads: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Run `fit` for each number of workers: its start, its steps, and what a checkpoint holds up."""
    from mlflow.tracking import MlflowClient

    from pipelines.simulation import Node, simulated
    from pipelines.storage import locate
    from pipelines.training import fit, ledger

    rows: Rows = [("fit", "workers are up, s", "first step, s", "step, ms", "of it data", "checkpoint holds up, ms")]
    found: dict[str, float] = {}
    with simulated([Node(2 * max(flags.workers))], {"OMP_NUM_THREADS": "1"}) as cluster:
        _draw(cluster.folder)
        for n in flags.workers:
            since = time.time()
            result = fit(_small(n, flags.steps, cluster.folder))
            up = next(e["time"] for e in ledger.read(locate(result.folder)) if e["event"] == "start") - since
            client, name = MlflowClient(result.tracking_uri), result.mlflow_run_id
            stamps = {m.step: m.timestamp for m in client.get_metric_history(name, "loss/total")}
            waits = [m.value for m in client.get_metric_history(name, "data_wait_share") if m.step > 100]
            first = stamps.pop(1) / 1000 - since
            # The first hundred steps warm up. A checkpoint is saved after its step was logged.
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
        f"The same pictures and network, Ray running already; a checkpoint of "
        f"{state_memory(DEMO.model).checkpoint / 1e6:.0f} MB every {EVERY} steps, to a local disk. Driver, data tasks, "
        f"database and the checkpoint's writing want the same cores."
    )
    return f"{_table(rows)}\n{notes}", found


def _small(workers: int, steps: int, folder: Path) -> TrainConfig:
    places = {"name": f"on-{workers}", "storage": f"{folder}/runs"}
    return replace(
        DEMO,
        data=replace(DEMO.data, train=f"{folder}/train", augment=_augmentation(), samples_per_task=16),
        run=replace(DEMO.run, **places, steps=steps, global_batch=workers, micro_batch=1),
        scaling=ScalingConfig(workers=workers, device="cpu", cpus_per_worker=1, data_cpus=workers),
        checkpoint=replace(DEMO.checkpoint, every=EVERY),
        evaluation=replace(DEMO.evaluation, every=0),
        tracking=replace(DEMO.tracking, uri=f"sqlite:///{folder}/mlflow.db", log_every=LOG_EVERY),
    )


def _augmentation() -> AugmentConfig:
    return AugmentConfig(short_sides=(SIDE,), long_side=SIDE, crop_probability=0)


def _draw(folder: Path) -> None:
    from pipelines.data.coco import CocoLayout
    from pipelines.data.pack import PackConfig, pack
    from pipelines.data.synthetic import SyntheticConfig, draw_dataset

    draw_dataset(folder / "coco", SyntheticConfig(num_images=64, min_side=SIDE, max_side=SIDE))
    pack(CocoLayout.find(str(folder / "coco"), "train"), f"{folder}/train", PackConfig())


# ---- Ray Data


def measure_data(flags: Scaling, _: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Let workers take streams of tiny pictures: what a task costs beside its images, and whom."""
    import ray

    from pipelines.data.manifest import PackedSet, open_pack
    from pipelines.data.stream import training_batches
    from pipelines.simulation import Node, simulated

    @ray.remote(num_cpus=0, scheduling_strategy="SPREAD")
    class Trainer:
        def take(self, samples: PackedSet, seed: int, per_task: int) -> tuple[float, float, float]:
            """Return seconds to the first image and to the last, and CPU seconds of this process."""
            since, cpu, first = time.perf_counter(), time.process_time(), 0.0
            for _ in training_batches(
                samples, np.arange(TASKS * per_task), seed=seed, augmentation=_augmentation(), micro_batch=1,
                samples_per_task=per_task, cpus=1, prefetch=8,
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
        ray.get([trainer.take.remote(samples, 0, 16) for trainer in trainers])  # processes start
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
    rows: Rows = [("Ray Data", "tasks/s", "images/s each", "first image, s", "a task, ms", "cores busy",
             "CPU ms of a task: head", "raylets", "data task", "trainer")]  # fmt: skip
    for (n, per_task), rounds in taken.items():
        rate, first, task, busy, *cpu = zip(*rounds, strict=True)
        each = f"{median(rate) * per_task / n:.0f}"
        texts = f"{median(rate):.1f}", each, _spread(first), _spread(task, 0), f"{median(busy):.1f}"
        rows.append((f"{_count(n)}, {per_task} a task", *texts, *(f"{median(values):.1f}" for values in cpu)))
    typical = {key: [median(values) for values in zip(*rounds, strict=True)] for key, rounds in taken.items()}
    slope, task = np.polyfit(PER_TASK, [typical[1, per_task][2] for per_task in PER_TASK], 1)
    widest = typical[max(flags.streams), 16]
    found = {"task": float(task), "head": widest[4], "raylets": widest[5], "trainer": widest[7]}
    notes = (
        f"A worker's data tasks run one at a time, on {_count(flags.nodes, 'simulated node')}. "
        f"CPU is less what Ray takes idle, {1000 * idle['gcs_server']:.0f} ms a second of the head and "
        f"{1000 * idle['raylet']:.0f} of the raylets. One worker's task takes {task:.0f} ms and {slope:.1f} ms for "
        f"each picture."
    )
    return f"{_table(rows)}\n{notes}", found


def _cpu_seconds() -> dict[str, float]:
    """Return CPU seconds of this process's descendants by role: gcs_server, raylet, ray (tasks, actors), other."""
    seconds = {"gcs_server": 0.0, "raylet": 0.0, "ray": 0.0, "other": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            name, used = process.name(), process.cpu_times()
        except psutil.Error:  # gone meanwhile
            continue
        role = "ray" if name.startswith("ray::") else name
        seconds[role if role in seconds else "other"] += used.user + used.system
    return seconds


# ---- 16 and 64 GPUs


def model(config: TrainConfig, flags: Scaling, overheads: dict[str, float]) -> str:
    """Model a step of a recipe on its GPUs, and compare it with one GPU's."""
    hardware, n, shown, every = flags.cluster, config.scaling.workers, config.evaluation, config.checkpoint.every
    loop, agree, report, start, task = (overheads[key] / 1000 for key in ("loop", "agree", "report", "start", "task"))
    typical, areas = image_sizes(config.data.augment)[1], drawn_areas(config.data.augment)
    usual, largest = mean(areas) / math.prod(typical), expected_largest(areas, n) / math.prod(typical)
    worst, best = hardware.tflops or GPU_TFLOPS
    per_task = config.data.samples_per_task
    plan = make_plan(
        config,
        replace(hardware, tflops=(worst / largest, best / largest)),  # a step lasts as long as its largest image
        hardware.machines(config),
        images=COCO_TRAIN_IMAGES,
        masks=COCO_MASKS,
        images_per_cpu=per_task / (per_task / IMAGES_PER_CPU + task),
    )
    busy = [config.run.global_batch / rate for rate in plan.demand]
    compute = [seconds * usual / largest for seconds in plan.compute]
    forward = operators(config.model, typical)
    launch = [3 * forward * seconds for seconds in OPERATOR]
    evaluated = resized_shape(480, 640, shown.short_side, shown.long_side)
    scored = [2e-12 * multiply_adds(config.model, evaluated) / rate + SCORE for rate in (best, worst)]
    snapshot, images = plan.state.checkpoint / (COPY * GB), math.ceil(shown.images / n)
    terms = {
        "compute, mean image": compute,
        "the step's largest image": _less(plan.compute, compute),
        "host slower than GPU": _less([*map(max, launch, plan.compute)], plan.compute),
        "gradients, not hidden": _less(busy, plan.compute),
        "data": _less(plan.step_seconds, busy),
        "agreement": [agree, agree * math.log2(n)],
        "loop: batch, log, stop flag": [loop, loop],
        "checkpoint": [(snapshot + report) / every, (snapshot + report + POLL) / every],
        "quick PQ": [images * seconds / shown.every for seconds in scored],
    }
    total = [sum(term[end] for term in terms.values()) for end in (0, 1)]
    single = [max(own, host) + loop for own, host in zip(compute, launch, strict=True)]
    rows: Rows = [(f"{config.recipe}, {n} GPUs", "best, ms", "", "worst, ms", "")]
    for name, term in {**terms, "a step": total}.items():
        ends = [(f"{1000 * value:.1f}", f"{value / whole:.0%}") for value, whole in zip(term, total, strict=True)]
        rows.append((name, *ends[0], *ends[1]))
    share = [own / whole for own, whole in zip(single, total, strict=True)]
    rates = [config.run.global_batch / whole for whole in total]
    tasks = rates[0] / per_task
    cores = [overheads[key] / 1000 * tasks / many
             for key, many in (("head", 1), ("raylets", plan.machines.nodes), ("trainer", n))]  # fmt: skip
    alone = {
        f"{worst:g} TFLOP/s": plan.compute.worst - plan.compute.best,
        "gradients after the backward pass": plan.network_seconds - terms["gradients, not hidden"][0],
        f"a host of {1e6 * OPERATOR[1]:g} us": max(0.0, launch[1] - plan.compute.best)
        - terms["host slower than GPU"][0],
        f"reports that wait {POLL:g} s": POLL / every,
    }
    lines = [
        ("efficiency", f"{share[0]:.0%} at best, {share[1]:.0%} at worst, against one GPU that never saves; "
            f"{rates[0]:.0f} and {rates[1]:.0f} images/s"),
        ("decides", "ms more of the best step, by one assumption alone at its worst: "
            + ", ".join(f"{name} {1000 * more:.0f}" for name, more in sorted(alone.items(), key=lambda m: -m[1]))),
        ("data tasks", f"{tasks:.1f}/s at best, of {per_task} images: {cores[0]:.1%} of a core for the head's GCS, "
            f"{cores[1]:.1%} for each raylet, {cores[2]:.1%} in each trainer"),
        ("data's limit", f"{plan.supply:,.0f} images/s by data CPUs and storage; the GCS would fill a core at "
            f"{per_task * 1000 / overheads['head']:,.0f}"),
        ("task's size", f"Ray takes less of a data CPU's time than 5 % from --data.samples-per-task "
            f"{samples_per_task(task)}, {task / (task + per_task / IMAGES_PER_CPU):.0%} as it is"),
        ("writing", f"{plan.state.checkpoint / (hardware.storage * GB):.1f} s in the background, of "
            f"{every * total[0]:.0f} s between two checkpoints"),
        ("a failure", f"{1000 * start:.0f} s to start, as here, and {every / 2 * total[0]:.0f} to "
            f"{every / 2 * total[1]:.0f} s of steps to do again, on average"),
        ("assumed", f"a GPU sustains {best:g} TFLOP/s at best, {worst:g} at worst (--cluster.tflops)"),
        ("assumed", f"{hardware.network:g} GB/s between nodes: {plan.network_bytes / GB:.2f} GB of gradients in "
            f"{1000 * plan.network_seconds:.0f} ms, at best beside the backward pass, at worst after it"),
        ("assumed", f"images of 480x640; drawn {DRAWS} times, the mean has {usual:.2f} of the area plan.py counts "
            f"with, the largest of {n} {largest:.2f}; time goes with the area, nothing else makes a worker late"),
        ("assumed", f"{1e6 * OPERATOR[0]:.0f} to {1e6 * OPERATOR[1]:.0f} us of the host for each of {forward:,} "
            f"operators (counted), twice that backward: {1000 * launch[0]:.0f} to {1000 * launch[1]:.0f} ms"),
        ("assumed", f"a checkpoint's {plan.state.checkpoint / GB:.2f} GB leave the GPU at {COPY:g} GB/s; its report "
            f"waits 0 to {POLL:g} s more than here"),
        ("assumed", f"the quick PQ scores an image in {SCORE:g} s beside the network, {images} on each worker"),
        ("assumed", f"agreement {1000 * agree:.2f} ms as here between two, times log2({n}) at worst; loop "
            f"{1000 * loop:.1f} ms and task {1000 * task:.0f} ms as here"),
    ]  # fmt: skip
    return _table(rows) + "\n" + "\n".join(f"{name:<13}{text}" for name, text in lines)


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [max(0.0, value - other) for value, other in zip(values, others, strict=True)]


def samples_per_task(task: float, share: float = 0.05) -> int:
    """Return the images of a task that costs `task` seconds beside them, for that to be below `share` of its time."""
    return math.ceil(task * IMAGES_PER_CPU * (1 - share) / share)


@lru_cache
def drawn_areas(config: AugmentConfig) -> list[int]:
    """Return the pixels of a 480x640 image, as most of COCO's, in so many draws of its augmentation."""
    sample = Sample(np.zeros((480, 640, 3), np.uint8), np.ones((480, 640), np.uint16), np.zeros(1, np.int16))
    return [augment(sample, sample_rng(0, 0, draw), config).index_map.size for draw in range(DRAWS)]


def expected_largest(values: Sequence[float], draws: int) -> float:
    """Return the mean of the largest of so many independent draws from `values`."""
    ordered, below = np.sort(values), np.arange(len(values) + 1) / len(values)
    return float(ordered @ np.diff(below**draws))


def operators(config: ModelConfig, size: tuple[int, int]) -> int:
    """Count the operators that the forward pass of one image of `size` (H, W) hands to the device."""
    with torch.device("meta"):
        network = build_model(config).train()
        with _Counter() as counter:
            network(torch.empty(1, 3, *size))
    return counter.count


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


CONFIRM = """\
a real cluster has to confirm:
  what a GPU sustains with one image; jobs/plan.py and this model take it by --cluster.tflops
  whether the host keeps ahead of the GPU: losses, matching, clipping and AdamW are not among the operators counted
  how late the slowest worker of a step is, and why: area, segments, matching, the node
  NCCL's time for the gradients, its overlap with the backward pass, and for two numbers among all workers
  that executors in the trainer's process do not hold the step up, and that storage gives every node its share
  GCS and raylets with 64 trainers on 8 machines: here are processes of one machine, and no network between them
  a checkpoint's copy from the GPU, its writing to S3 beside the training, Ray's report; start-up with NCCL"""


# ---- text


def _count(number: int, what: str = "worker") -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _spread(values: Sequence[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _table(rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


if __name__ == "__main__":
    run(main)
