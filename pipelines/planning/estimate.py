"""Estimating a run before it starts: batch split, memory, data rate, hours and price on a given cluster.

Nothing is started. The report marks the basis of every figure: `measured` by running or counting our code, `published`
by others, `given` on the command line, or `modeled` from these by the arithmetic in this module.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from maskformer.preprocess import resized_shape
from pipelines.cluster.capacity import Capacity, Demand, require_fit
from pipelines.config.hardware import Hardware
from pipelines.config.train import ScalingConfig, TrainConfig
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import total_steps
from pipelines.errors import UserError
from pipelines.planning.memory import StateMemory, activations, multiply_adds, published_layout, state_memory

GB = 1e9
GPU_TFLOPS = (5.0, 30.0)
"""TFLOP/s that a GPU sustains in training, worst and best case: a guess for an A100 with one image per forward pass."""
PACKED_IMAGE_BYTES = 160_000
"""Bytes of one image in a pack. Published: COCO train2017 is 18 GB of JPEG and 0.8 GB of panoptic PNG for 118,287
images."""
PASSES = 3
"""Cost of a forward and backward pass in forward passes: the gradients of inputs and of weights cost one each."""


def planned_capacity(hardware: Hardware, scaling: ScalingConfig) -> Capacity:
    """Return the capacity of the planned cluster; `nodes` is as many as the workers need if it is not set."""
    nodes = hardware.nodes
    if nodes is None:
        per_node = hardware.gpus_per_node if scaling.device == "cuda" else 0
        nodes = math.ceil(scaling.max_workers / per_node) if per_node else 1
    return Capacity.of([{"CPU": hardware.cpus_per_node, "GPU": hardware.gpus_per_node}] * nodes)


class Range(NamedTuple):
    """Best and worst case of a figure."""

    best: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Resources that a run needs. Memory is in bytes per worker."""

    config: TrainConfig
    hardware: Hardware
    capacity: Capacity
    steps: int
    """Optimizer steps of the run."""
    images: int
    """Number of training images."""
    largest: tuple[int, int]
    """Height and width of the image that memory is modeled for."""
    typical: tuple[int, int]
    """Height and width of the image that time is modeled for."""
    masks: tuple[int, int, int]
    """Segments per image: mean, 95th percentile and maximum."""
    state: StateMemory
    saved: tuple[int, ...]
    """Bytes saved for the backward pass, for each of `masks`."""
    memory: tuple[float, ...]
    """Peak bytes including the state, for each of `masks`."""
    published_memory: float
    """Peak bytes of the published implementation, for one image with the maximum of `masks`."""
    multiply_adds: int
    """Multiply-adds of the forward pass of a typical image."""
    compute: Range
    """Seconds of computation per step."""
    network_bytes: float
    """Bytes that each worker sends per step."""
    network_seconds: float
    """Seconds of communication between nodes per step."""
    images_per_cpu: float
    """Images that one CPU decodes and augments per second."""
    supply: float
    """Images per second that data CPUs and storage supply."""
    demand: Range
    """Images per second that the workers can consume."""
    step_seconds: Range
    """Seconds per step, limited by computation, network or data."""
    warnings: tuple[str, ...]

    @property
    def hours(self) -> Range:
        """Hours of training only, without start-up, evaluation and failures."""
        return Range(*(self.steps * seconds / 3600 for seconds in self.step_seconds))

    @property
    def gpu_hours(self) -> Range:
        """GPU hours that are paid for: those of all GPUs of the cluster, used or not."""
        return Range(*(self.capacity.total("GPU") * hours for hours in self.hours))

    @property
    def data_cpus(self) -> Range:
        """CPUs that supply as many images as the workers can consume."""
        return Range(*(math.ceil(rate / self.images_per_cpu) for rate in self.demand))


def make_plan(
    config: TrainConfig,
    hardware: Hardware,
    capacity: Capacity,
    *,
    images: int,
    masks: tuple[int, int, int],
    images_per_cpu: float,
) -> Plan:
    """Estimate what a run needs on a cluster, and refuse a run that is impossible.

    Args:
        images: number of training images, without those that are skipped.
        masks: segments per image: mean, 95th percentile (which must fit in memory) and maximum.
        images_per_cpu: images that one CPU decodes and augments per second.

    Raises:
        UserError: the cluster is too small, or the global batch does not divide evenly among the workers.
    """
    scaling, run = config.scaling, config.run
    split = config.batch_split
    remedy = "Plan for a larger cluster (--cluster.nodes, --cluster.gpus-per-node, --cluster.cpus-per-node)"
    if scaling.device == "cuda" and not capacity.total("GPU"):
        remedy += ", or train on CPUs (--scaling.device cpu)"
    require_fit(
        capacity,
        Demand.of(scaling),
        f"{remedy}, or lower --scaling.workers (gradient accumulation keeps the global batch of {run.global_batch}), "
        f"--scaling.cpus-per-worker or --scaling.data-cpus.",
        what=f"The recipe {config.recipe}",
    )
    largest, typical = image_sizes(config.data.augment)

    state = state_memory(config.model, averaged=config.optimizer.ema_decay > 0)
    on_gpu = scaling.device == "cuda"
    bfloat16 = config.network_precision(scaling.device) == "bfloat16"
    held = activations(config.model, run.micro_batch, largest, masks, scaling.device, bfloat16)
    memory = tuple(state.total + peak for peak in held.peak)
    if on_gpu and memory[1] > hardware.gpu_memory * GB:
        raise UserError(
            f"A worker needs {memory[1] / GB:.1f} GB with {masks[1]} segments in an image of {_size(largest)}, but a "
            f"GPU has {hardware.gpu_memory:g} GB. Parameters, gradients and optimizer take {state.total / GB:.1f} GB, "
            f"activations of the network {held.network / GB:.1f} GB, the losses the rest. Use GPUs with more memory "
            f"(--cluster.gpu-memory), a smaller --run.micro-batch (now {run.micro_batch}) or smaller images "
            f"(--data.augment.short-sides, --data.augment.long-side)."
        )

    operations = 2 * PASSES * multiply_adds(config.model, typical)
    per_worker = split.accumulation * run.micro_batch
    worst, best = hardware.tflops or (GPU_TFLOPS if on_gpu else (0.01 * scaling.threads, 0.05 * scaling.threads))
    compute = Range(per_worker * operations / (best * 1e12), per_worker * operations / (worst * 1e12))
    # Ring all-reduce: each worker sends 2 (n - 1) / n of the gradients, in float32 with or without autocast. Only
    # communication between nodes is slow enough to matter.
    network_bytes = 2 * (scaling.max_workers - 1) / scaling.max_workers * state.gradients
    network_seconds = network_bytes / (hardware.network * GB) if capacity.num_nodes > 1 else 0.0
    # Best case: communication overlaps the backward pass. Worst case: it follows it.
    busy = Range(max(compute.best, network_seconds), compute.worst + network_seconds)
    supply = min(scaling.data_cpus * images_per_cpu, hardware.storage * GB / PACKED_IMAGE_BYTES)
    demand = Range(*(run.global_batch / seconds for seconds in busy))
    step_seconds = Range(*(max(seconds, run.global_batch / supply) for seconds in busy))

    plan = Plan(
        config=config,
        hardware=hardware,
        capacity=capacity,
        steps=run.steps or total_steps(run.epochs, images, run.global_batch),
        images=images,
        largest=largest,
        typical=typical,
        masks=masks,
        state=state,
        saved=held.saved,
        memory=memory,
        published_memory=published_layout(config.model, largest, masks[2]),
        multiply_adds=operations // (2 * PASSES),
        compute=compute,
        network_bytes=network_bytes,
        network_seconds=network_seconds,
        images_per_cpu=images_per_cpu,
        supply=supply,
        demand=demand,
        step_seconds=step_seconds,
        warnings=(),
    )
    return _with_warnings(plan)


def image_sizes(augment: AugmentConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return height and width of the largest landscape image in training, and of a typical one.

    A typical image is 480x640, like most of COCO, resized to the mean of the short sides.
    """
    short = max(augment.short_sides)
    mean = round(sum(augment.short_sides) / len(augment.short_sides))
    return (min(short, augment.long_side), augment.long_side), resized_shape(480, 640, mean, augment.long_side)


def _with_warnings(plan: Plan) -> Plan:
    config, hardware, gpus = plan.config, plan.hardware, plan.capacity.total("GPU")
    scaling, warnings = config.scaling, []
    if scaling.device == "cuda":
        if gpus > scaling.max_workers:
            warnings.append(f"{gpus - scaling.max_workers:g} of {gpus:g} GPUs are paid for and idle.")
        _, percentile, most = (figure / GB for figure in plan.memory)
        if most > hardware.gpu_memory:
            warnings.append(
                f"An image of {_size(plan.largest)} with {plan.masks[2]} segments needs {most:.1f} of "
                f"{hardware.gpu_memory:g} GB. It would end the run out of memory, and again after every restart."
            )
        elif percentile > 0.9 * hardware.gpu_memory:
            warnings.append(
                f"A peak of {percentile:.1f} of {hardware.gpu_memory:g} GB leaves little for kernel workspaces."
            )
    if plan.supply < plan.demand.best:
        by_cpus = scaling.data_cpus * plan.images_per_cpu
        limit = (
            f"{scaling.data_cpus:g} data CPUs ({plan.data_cpus.best:g} would suffice) supply"
            if by_cpus <= plan.supply
            else f"Storage at {hardware.storage:g} GB/s supplies"
        )
        warnings.append(f"{limit} {plan.supply:.0f} images/s, but the workers could use up to {plan.demand.best:.0f}.")
    if plan.network_seconds > plan.compute.best:
        warnings.append(
            f"All-reduce takes {1000 * plan.network_seconds:.0f} ms per step, while computation may take only "
            f"{1000 * plan.compute.best:.0f} ms: the network is the bottleneck."
        )
    writing = plan.state.checkpoint / (hardware.storage * GB)
    if writing > config.checkpoint.every * plan.step_seconds.best:
        warnings.append(
            f"Writing a checkpoint takes {writing:.0f} s, but the next one is due after "
            f"{config.checkpoint.every * plan.step_seconds.best:.0f} s. Raise --checkpoint.every."
        )
    return replace(plan, warnings=tuple(warnings))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
