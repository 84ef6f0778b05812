"""Performance model of a training step on many GPUs, from measured overheads and stated assumptions.

jobs/bench/scaling.py measures the overheads on this machine and prints the model with them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskformer import build_model
from maskformer.config import ModelConfig
from maskformer.preprocess import resized_shape
from pipelines.config.hardware import COCO_MASKS, IMAGES_PER_CPU_WITHOUT_RAY, Hardware
from pipelines.config.recipes import COCO_TRAIN_IMAGES
from pipelines.config.train import TrainConfig
from pipelines.planning.balance import step_pixels
from pipelines.planning.estimate import GB, GPU_TFLOPS, image_sizes, make_plan, planned_capacity
from pipelines.planning.memory import multiply_adds

Rows = list[Sequence[str]]

OPERATOR = (5e-6, 10e-6)  # seconds of host time per operator, best and worst case
COPY = 5.0  # GB/s from a GPU to pageable memory, for the copy of a checkpoint
SCORE = 0.3  # seconds to post-process and score one image of the quick PQ, without the network
POLL = 2.0  # seconds between two polls of Ray Train's controller for a report

OVERHEADS = {
    "step": 38.1,  # ms per `train_step` of the demo with one small image, one worker
    "agree": 0.32,  # ms to all-reduce two numbers between two workers, as before each step: gloo, loopback
    "loop": 5.5,  # ms per step outside of `train_step` and of waiting for data, one worker
    "report": 69.0,  # ms for which a small checkpoint delays two workers
    "start": 19.2,  # s from the call of fit() to the end of the first step, two workers
    "task": 39.0,  # ms per Ray Data task and its share of an execution, without its images
    "head": 2.2,  # CPU ms per task in the head's GCS
    "raylets": 15.1,  # CPU ms per task in all raylets
    "trainer": 32.7,  # CPU ms per task of 16 images in the trainer's process
}
"""Overheads measured on two cores of an AMD EPYC. The model uses them where jobs/bench/scaling.py measures none."""


def step_model(config: TrainConfig, hardware: Hardware, overheads: Mapping[str, float]) -> str:
    """Model a training step of a recipe on its GPUs, as text, and its efficiency relative to a single GPU.

    Args:
        hardware: the cluster; its `tflops` are those of one GPU.
        overheads: measured overheads with the names and units of OVERHEADS.
    """
    n, quick, every = config.scaling.max_workers, config.evaluation, config.checkpoint.every
    loop, agree, report, start, task = (overheads[key] / 1000 for key in ("loop", "agree", "report", "start", "task"))
    typical = image_sizes(config.data.augment)[1]
    pixels = step_pixels(
        config.batch_split, config.data.augment, dealt=not config.scaling.exact, window=config.data.group_by_area
    )
    average, largest = (count / math.prod(typical) for count in pixels)
    worst, best = hardware.tflops or GPU_TFLOPS
    per_task = config.data.samples_per_task
    plan = make_plan(
        config,
        replace(
            hardware, tflops=(worst / largest, best / largest)
        ),  # the worker with the most pixels determines the duration of a step
        planned_capacity(hardware, config.scaling),
        images=COCO_TRAIN_IMAGES,
        masks=COCO_MASKS,
        images_per_cpu=per_task / (per_task / IMAGES_PER_CPU_WITHOUT_RAY + task),
    )
    busy = [config.run.global_batch / rate for rate in plan.demand]
    compute = [seconds * average / largest for seconds in plan.compute]
    forward = operators(config.model, typical)
    launch = [3 * forward * seconds for seconds in OPERATOR]
    evaluated = resized_shape(480, 640, quick.short_side, quick.long_side)
    scored = [2e-12 * multiply_adds(config.model, evaluated) / rate + SCORE for rate in (best, worst)]
    snapshot, images = plan.state.checkpoint / (COPY * GB), math.ceil(quick.images / n)
    terms = {
        "computation, mean image": compute,
        "waiting for the largest image": _less(plan.compute, compute),
        "host slower than GPU": _less([*map(max, launch, plan.compute)], plan.compute),
        "all-reduce, not overlapped": _less(busy, plan.compute),
        "data": _less(plan.step_seconds, busy),
        "all-reduce of two numbers": [agree, agree * math.log2(n)],
        "loop: batch, log, stop flag": [loop, loop],
        "checkpoint": [(snapshot + report) / every, (snapshot + report + POLL) / every],
        "quick PQ": [images * seconds / quick.every for seconds in scored],
    }
    total = [sum(term[end] for term in terms.values()) for end in (0, 1)]
    single = [max(gpu, host) + loop for gpu, host in zip(compute, launch, strict=True)]
    rows: Rows = [(f"{config.recipe}, {n} GPUs", "best, ms", "", "worst, ms", "")]
    for name, term in {**terms, "total per step": total}.items():
        ends = [(f"{1000 * value:.1f}", f"{value / step:.0%}") for value, step in zip(term, total, strict=True)]
        rows.append((name, *ends[0], *ends[1]))
    efficiency = [one / many for one, many in zip(single, total, strict=True)]
    rates = [config.run.global_batch / step for step in total]
    tasks = rates[0] / per_task
    cores = [overheads[key] / 1000 * tasks / many
             for key, many in (("head", 1), ("raylets", plan.capacity.num_nodes), ("trainer", n))]  # fmt: skip
    alone = {
        f"{worst:g} TFLOP/s": plan.compute.worst - plan.compute.best,
        "all-reduce after the backward pass": plan.network_seconds - terms["all-reduce, not overlapped"][0],
        f"{1e6 * OPERATOR[1]:g} us per operator": max(0.0, launch[1] - plan.compute.best)
        - terms["host slower than GPU"][0],
        f"reports delayed by {POLL:g} s": POLL / every,
    }
    lines = [
        ("efficiency", f"{efficiency[0]:.0%} at best, {efficiency[1]:.0%} at worst, relative to one GPU without "
            f"checkpoints; {rates[0]:.0f} and {rates[1]:.0f} images/s"),
        ("sensitivity", "increase of the best step in ms if one assumption takes its worst value: "
            + ", ".join(f"{name}: {1000 * more:.0f}" for name, more in sorted(alone.items(), key=lambda m: -m[1]))),
        ("data tasks", f"{tasks:.1f}/s at best, of {per_task} images: {cores[0]:.1%} of a core for the head's GCS, "
            f"{cores[1]:.1%} for each raylet, {cores[2]:.1%} in each trainer"),
        ("data limit", f"{plan.supply:,.0f} images/s by data CPUs and storage; the GCS would use a full core at "
            f"{per_task * 1000 / overheads['head']:,.0f}"),
        ("task size", f"Ray takes {task / (task + per_task / IMAGES_PER_CPU_WITHOUT_RAY):.0%} of data CPU time, and "
            f"less than 5% from --data.samples-per-task {samples_per_task(task)}"),
        ("writing", f"{plan.state.checkpoint / (hardware.storage * GB):.1f} s in the background, of "
            f"{every * total[0]:.0f} s between two checkpoints"),
        ("failure", f"{1000 * start:.0f} s to start, as measured, and on average {every / 2 * total[0]:.0f} to "
            f"{every / 2 * total[1]:.0f} s of steps to repeat"),
        ("assumed", f"a GPU sustains {best:g} TFLOP/s at best, {worst:g} at worst (--cluster.tflops)"),
        ("assumed", f"{hardware.network:g} GB/s between nodes: {plan.network_bytes / GB:.2f} GB of gradients in "
            f"{1000 * plan.network_seconds:.0f} ms, at best during the backward pass, at worst after it"),
        ("assumed", f"images of sizes like COCO's; after the augmentation the mean area is {average:.2f} of that in "
            f"plan.py, an image of the worker with the most pixels in a step {largest:.2f}; time is proportional to "
            f"area, with no other stragglers"),
        ("assumed", f"{1e6 * OPERATOR[0]:.0f} to {1e6 * OPERATOR[1]:.0f} us of host time for each of {forward:,} "
            f"operators (counted), and twice that backward: {1000 * launch[0]:.0f} to {1000 * launch[1]:.0f} ms"),
        ("assumed", f"a checkpoint of {plan.state.checkpoint / GB:.2f} GB is copied from the GPU at {COPY:g} GB/s; its "
            f"report takes 0 to {POLL:g} s longer than measured"),
        ("assumed", f"the quick PQ takes {SCORE:g} s per image in addition to the network; {images} images per worker"),
        ("assumed", f"all-reduce of two numbers {1000 * agree:.2f} ms as measured between two, log2({n}) times that at "
            f"worst; loop {1000 * loop:.1f} ms and task {1000 * task:.0f} ms as measured"),
    ]  # fmt: skip
    return table(rows) + "\n" + "\n".join(f"{name:<13}{text}" for name, text in lines)


def _less(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Subtract element by element, but not below zero."""
    return [max(0.0, value - other) for value, other in zip(values, others, strict=True)]


def samples_per_task(task: float, share: float = 0.05) -> int:
    """Return the images per task for which an overhead of `task` seconds is at most `share` of the task's time."""
    return math.ceil(task * IMAGES_PER_CPU_WITHOUT_RAY * (1 - share) / share)


def operators(config: ModelConfig, size: tuple[int, int]) -> int:
    """Count the operators of the forward pass of one image of `size` (H, W)."""
    with torch.device("meta"):
        network = build_model(config).train()
        with _Counter() as counter:
            network(torch.empty(1, 3, *size))
    return counter.count


class _Counter(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


CONFIRM = """\
To confirm on a real cluster:
  the TFLOP/s that a GPU sustains with one image, an input of jobs/plan.py and of this model (--cluster.tflops)
  whether the host keeps ahead of the GPU: operators of losses, matching, clipping and AdamW are not counted
  the delay by the slowest worker of a step, and its cause: area, segments, matching, the node
  the duration of NCCL's all-reduce of gradients and of two numbers, and its overlap with the backward pass
  whether executors in the trainer's process delay the step, and whether all nodes read from storage equally fast
  GCS and raylets with 64 trainers on 8 machines: measured were processes of one machine, without a network
  copying a checkpoint from the GPU, writing it to S3 during training, Ray's report; start-up with NCCL"""


def table(rows: Rows) -> str:
    """Format rows as aligned columns, the first one left-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {text:>{width}}" for text, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )
