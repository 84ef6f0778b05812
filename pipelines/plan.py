"""What a run will take, before anyone pays: its split, memory, data rate, hours and price on a given cluster.

Nothing is started. Every figure says what it rests on: `measured` by running or counting our code, `published` by
others, `given` on the command line, or `modelled` from these by arithmetic that is written here.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from maskformer.inference import resized_shape
from pipelines.config import TrainConfig
from pipelines.data.augment import AugmentConfig
from pipelines.data.order import total_steps
from pipelines.errors import UserError
from pipelines.memory import StateMemory, activations, multiply_adds, published_layout, state_memory

GB = 1e9
GPU_TFLOPS = (5.0, 30.0)
"""What a GPU sustains in training, at worst and at best: a guess for an A100 with one image at a time."""
PACKED_IMAGE_BYTES = 160_000
"""Published: COCO's train2017 is 18 GB of JPEG and 0.8 GB of panoptic PNG for 118,287 images."""
PASSES = 3
"""Multiply-adds of forward and backward pass together, in forward passes: a gradient of inputs and one of weights."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A cluster as its price list describes it."""

    nodes: int | None = None
    """Machines. Default: as many as the workers need."""
    gpus_per_node: int = 8
    cpus_per_node: float = 96
    gpu_memory: float = 80
    """GB of one GPU."""
    tflops: tuple[float, float] | None = None
    """What one worker sustains in training, at worst and at best, in 10^12 operations a second (two for a
    multiply-add). Default: 5 to 30 for a GPU, a guess for an A100 with one image at a time; 0.01 to 0.05 for a CPU
    thread. Take it from a short run of your own: its images a second times the operations per image below."""
    network: float = 12.5
    """GB a second between two nodes."""
    storage: float = 1.25
    """GB a second that all nodes together read from where the pack lies, such as S3, and one writes."""

    def __post_init__(self) -> None:
        least = {"gpus_per_node": 0, "cpus_per_node": 0, "gpu_memory": 0, "network": 1e-9, "storage": 1e-9}
        for name, limit in least.items():
            if not limit <= getattr(self, name) < math.inf:
                raise ValueError(f"cluster.{name} must be a positive number, got {getattr(self, name)}.")
        if self.nodes is not None and self.nodes < 1:
            raise ValueError(f"cluster.nodes must be at least 1, got {self.nodes}.")
        if self.tflops is not None and not 0 < self.tflops[0] <= self.tflops[1] < math.inf:
            raise ValueError(f"cluster.tflops is a range (worst, best) above 0, got {self.tflops}.")

    def machines(self, config: TrainConfig) -> "Machines":
        """Count what there is, with as many nodes as the workers of `config` need if their number is open."""
        gpus, cpus, scaling = self.gpus_per_node, self.cpus_per_node, config.scaling
        if self.nodes is not None:
            nodes = self.nodes
        elif scaling.device == "cuda" and gpus:
            nodes = math.ceil(scaling.workers / gpus)
        else:
            nodes = 1
        return Machines(nodes, nodes * gpus, nodes * cpus)


class Machines(NamedTuple):
    """What a cluster has."""

    nodes: int
    """Those with GPUs, if there are any: they exchange the gradients."""
    gpus: float
    cpus: float

    @classmethod
    def of(cls, resources: Iterable[Mapping[str, float]]) -> "Machines":
        """Add up the resources of a live cluster's nodes, as Ray names them."""
        nodes = list(resources)
        with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
        return cls(
            len(with_gpus or nodes),
            sum(node.get("GPU", 0) for node in nodes),
            sum(node.get("CPU", 0) for node in nodes),
        )


class Range(NamedTuple):
    """A figure at best and at worst."""

    best: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the run takes. Bytes, seconds and hours as named; memory per worker."""

    config: TrainConfig
    hardware: Hardware
    machines: Machines
    steps: int
    images: int
    """Of the training set."""
    largest: tuple[int, int]
    """Height and width that memory is counted for."""
    typical: tuple[int, int]
    """Height and width that hours are counted for."""
    masks: tuple[int, int, int]
    state: StateMemory
    saved: tuple[int, ...]
    """Bytes saved for the backward pass, for each of `masks`."""
    memory: tuple[float, ...]
    """Bytes at the peak, state included, for each of `masks`."""
    published_memory: float
    """The published implementation's, one image with the most masks."""
    multiply_adds: int
    """Of a typical image, forward."""
    compute: Range
    """Seconds of a step."""
    network_bytes: float
    """That each worker sends in a step."""
    network_seconds: float
    images_per_cpu: float
    supply: float
    """Images a second that the data side gives."""
    demand: Range
    """Images a second that the workers can use."""
    step_seconds: Range
    warnings: tuple[str, ...]

    @property
    def hours(self) -> Range:
        """Of training alone: no start-up, no evaluation, no failure."""
        return Range(*(self.steps * seconds / 3600 for seconds in self.step_seconds))

    @property
    def gpu_hours(self) -> Range:
        """What is paid for: every GPU of the cluster, used or not."""
        return Range(*(self.machines.gpus * hours for hours in self.hours))

    @property
    def data_cpus(self) -> Range:
        """CPUs that give what the workers can use."""
        return Range(*(math.ceil(rate / self.images_per_cpu) for rate in self.demand))


def make_plan(
    config: TrainConfig,
    hardware: Hardware,
    machines: Machines,
    *,
    images: int,
    masks: tuple[int, int, int],
    images_per_cpu: float,
) -> Plan:
    """Work out what a run takes on a cluster, and refuse what cannot work.

    Args:
        images: of the training set, those left out not counted.
        masks: segments of an image: the mean, the 95th percentile (which must fit) and the most.
        images_per_cpu: that one CPU decodes and augments in a second.

    Raises:
        UserError: the cluster is too small, or the number of workers cannot give the global batch.
    """
    scaling, run = config.scaling, config.run
    split = config.plan
    _require_machines(config, machines)
    largest, typical = image_sizes(config.data.augment)

    state = state_memory(config.model)
    on_gpu = scaling.device == "cuda"
    held = activations(
        config.model, run.micro_batch, largest, masks, scaling.device, on_gpu and config.precision == "bfloat16"
    )
    memory = tuple(state.total + peak for peak in held.peak)
    if on_gpu and memory[1] > hardware.gpu_memory * GB:
        raise UserError(
            f"A worker needs {memory[1] / GB:.1f} GB with {masks[1]} segments in an image of {_size(largest)} and a "
            f"GPU has {hardware.gpu_memory:g}: {state.total / GB:.1f} for parameters, gradients and optimizer, "
            f"{held.network / GB:.1f} saved by the network, the rest for the losses. Use larger GPUs "
            f"(--cluster.gpu-memory), a smaller --run.micro-batch (now {run.micro_batch}) or smaller images "
            f"(--data.augment.short-sides, --data.augment.long-side)."
        )

    operations = 2 * PASSES * multiply_adds(config.model, typical)
    per_worker = split.accumulation * run.micro_batch
    worst, best = hardware.tflops or (GPU_TFLOPS if on_gpu else (0.01 * scaling.threads, 0.05 * scaling.threads))
    compute = Range(per_worker * operations / (best * 1e12), per_worker * operations / (worst * 1e12))
    # Ring all-reduce: each gradient travels around the ring twice, but for its own stretch. float32, whatever autocast
    # does. Only what crosses between nodes is slow enough to count.
    network_bytes = 2 * (scaling.workers - 1) / scaling.workers * state.gradients
    network_seconds = network_bytes / (hardware.network * GB) if machines.nodes > 1 else 0.0
    # At best the gradients travel while the rest of the backward pass runs, at worst after it.
    busy = Range(max(compute.best, network_seconds), compute.worst + network_seconds)
    supply = min(scaling.data_cpus * images_per_cpu, hardware.storage * GB / PACKED_IMAGE_BYTES)
    demand = Range(*(run.global_batch / seconds for seconds in busy))
    step_seconds = Range(*(max(seconds, run.global_batch / supply) for seconds in busy))

    plan = Plan(
        config=config,
        hardware=hardware,
        machines=machines,
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
    """Return the largest height and width of a landscape image in training, and those of a typical one.

    A typical image is 480x640, as most of COCO's, resized to the mean of the short sides.
    """
    short = max(augment.short_sides)
    mean = round(sum(augment.short_sides) / len(augment.short_sides))
    return (min(short, augment.long_side), augment.long_side), resized_shape(480, 640, mean, augment.long_side)


def _require_machines(config: TrainConfig, machines: Machines) -> None:
    scaling = config.scaling
    if scaling.device == "cuda" and machines.gpus == 0:
        raise UserError(
            f"The recipe {config.recipe} trains on {scaling.workers} GPUs and the cluster has none. Plan for one that "
            f"has them (--cluster.gpus-per-node), or for CPUs: --scaling.device cpu."
        )
    if scaling.device == "cuda" and scaling.workers > machines.gpus:
        raise UserError(
            f"{scaling.workers} workers need a GPU each and the cluster has {machines.gpus:g} on {machines.nodes} "
            f"node(s). Use more --cluster.nodes, or fewer --scaling.workers: the global batch of "
            f"{config.run.global_batch} stays, by accumulation."
        )
    if scaling.cpus > machines.cpus + 1e-6:
        raise UserError(
            f"The run takes {scaling.cpus:g} CPUs ({scaling.workers} workers x {scaling.cpus_per_worker:g} and "
            f"{scaling.data_cpus:g} for the data) and the cluster has {machines.cpus:g}. Lower --scaling.data-cpus or "
            f"--scaling.cpus-per-worker, or use a larger cluster."
        )


def _with_warnings(plan: Plan) -> Plan:
    config, hardware, machines = plan.config, plan.hardware, plan.machines
    scaling, warnings = config.scaling, []
    if scaling.device == "cuda":
        if machines.gpus > scaling.workers:
            warnings.append(f"{machines.gpus - scaling.workers:g} of {machines.gpus:g} GPUs are paid for and idle.")
        _, usual, most = (figure / GB for figure in plan.memory)
        if most > hardware.gpu_memory:
            warnings.append(
                f"An image of {_size(plan.largest)} with {plan.masks[2]} segments needs {most:.1f} GB of "
                f"{hardware.gpu_memory:g}: when it comes the run dies, and it comes again after a restart."
            )
        elif usual > 0.9 * hardware.gpu_memory:
            warnings.append(f"{usual:.1f} of {hardware.gpu_memory:g} GB leave little for workspaces of the kernels.")
    if plan.supply < plan.demand.best:
        by_cpus = scaling.data_cpus * plan.images_per_cpu
        limit = (
            f"{scaling.data_cpus:g} data CPUs ({plan.data_cpus.best:g} would do)"
            if by_cpus <= plan.supply
            else f"{hardware.storage:g} GB/s of the storage"
        )
        warnings.append(
            f"{limit} give {plan.supply:.0f} images/s, and the workers could use up to {plan.demand.best:.0f}."
        )
    if plan.network_seconds > plan.compute.best:
        warnings.append(
            f"All-reduce takes {1000 * plan.network_seconds:.0f} ms of a step and computing may take only "
            f"{1000 * plan.compute.best:.0f}: the network decides."
        )
    writing = plan.state.checkpoint / (hardware.storage * GB)
    if writing > config.checkpoint.every * plan.step_seconds.best:
        warnings.append(
            f"A checkpoint takes {writing:.0f} s to write and the next is due after "
            f"{config.checkpoint.every * plan.step_seconds.best:.0f}. Raise --checkpoint.every."
        )
    return replace(plan, warnings=tuple(warnings))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
