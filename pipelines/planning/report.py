"""A plan as text, with the basis of every figure."""

import math
from dataclasses import dataclass
from typing import Literal

from maskformer.untrusted import escaped
from pipelines.planning.estimate import GB, PASSES, Plan, Range

Mark = Literal["measured", "modeled", "published", "given"]
"""Run or counted by our code; computed from other figures; published by others; given on the command line."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """The basis of a plan's inputs."""

    images: Mark
    """Basis of the number of training images."""
    cluster: Mark
    """Basis of nodes, GPUs and CPUs."""
    images_per_cpu: Mark
    """Basis of the images that one CPU decodes and augments per second."""


def report(plan: Plan, marks: Marks, source: str, price: float | None) -> str:
    """Return the plan as text, followed by its warnings.

    Args:
        source: description of the origin of the images.
        price: price of a GPU hour; with None the report shows a formula.
    """
    config, hardware, capacity = plan.config, plan.hardware, plan.capacity
    scaling, state = config.scaling, plan.state
    on_gpu = scaling.device == "cuda"
    precision = config.network_precision(scaling.device)
    largest, typical = (f"{height}x{width}" for height, width in (plan.largest, plan.typical))
    rate = "assumed" if hardware.tflops is None else "given"
    counted: Mark = "given" if config.run.steps else marks.images
    needed, data_cpus = Range(*reversed(plan.demand)), Range(*reversed(plan.data_cpus))

    rows: list[tuple[str, Mark, str]] = [
        ("recipe", "given", config.recipe),
        ("cluster", marks.cluster, f"{capacity.num_nodes} node(s), {capacity.total('GPU'):g} GPUs, "
            f"{capacity.total('CPU'):g} CPUs"),
        ("batch", "given", f"{config.batch_split} accumulated"),
        ("images", marks.images, f"{plan.images:,} {source}"),
        ("steps", counted, f"{plan.steps:,} = {plan.steps * config.run.global_batch:,} images"),
        ("state", "measured",
            f"{state.total / GB:.2f} GB per {'GPU' if on_gpu else 'worker'}: parameters "
            f"{state.parameters / GB:.2f}, gradients {state.gradients / GB:.2f}, AdamW moments "
            f"{state.optimizer / GB:.2f}"
            + (f", averaged weights {state.averaged / GB:.2f}" if state.averaged else "")),
    ]  # fmt: skip
    for label, masks, saved, memory in zip(
        ("mean", "95th pct.", "maximum"), plan.masks, plan.saved, plan.memory, strict=True
    ):
        text = (
            f"{memory / GB:.1f} GB peak, {saved / GB:.1f} GB of it saved for the backward pass, with {masks} segments: "
            f"{config.run.micro_batch} x {largest}, {precision}"
        )
        rows.append((f"memory, {label}", "modeled", text))
    if on_gpu:
        rows.extend([
            ("GPU memory", "given", f"{hardware.gpu_memory:g} GB"),
            ("memory, published", "modeled",
                f"{plan.published_memory / GB:.1f} GB peak in mmdetection, with {plan.masks[2]} segments: "
                f"1 x {largest}, float32"),
        ])  # fmt: skip
    rows.extend([
        ("checkpoint", "measured",
            f"{state.checkpoint / GB:.2f} GB every {config.checkpoint.every} steps, of which the newest "
            f"{config.checkpoint.keep} are kept"),
        ("operations", "measured",
            f"{plan.multiply_adds / 1e9:.1f} G multiply-adds per {typical} image in the forward pass; "
            f"{2 * PASSES * plan.multiply_adds / 1e12:.3g} T operations with the backward pass"),
        ("compute", "modeled", f"{_span(plan.compute, 1000, 0)} ms per step at the {rate} TFLOP/s (--cluster.tflops)"),
        ("network", "modeled",
            f"{plan.network_bytes / GB:.2f} GB sent per worker and step, ring all-reduce in float32; "
            + (f"{1000 * plan.network_seconds:.0f} ms at {hardware.network:g} GB/s" if capacity.num_nodes > 1
                else "within one node, time not counted")),
        ("data rate", marks.images_per_cpu, f"{plan.images_per_cpu:g} images/s per CPU"),
        ("data", "modeled",
            f"{_span(needed, 1, 0)} images/s needed, from {_span(data_cpus, 1, 0)} CPUs; the run has "
            f"{scaling.data_cpus:g}"),
        ("object store", "given",
            f"{config.data.object_store_gb * math.ceil(scaling.max_workers / capacity.num_nodes):g} GB of each node "
            f"for the streams of its workers (--data.object-store-gb)"),
        ("hours", "modeled", f"{_span(plan.hours)} ({_span(plan.step_seconds, 1, 2)} s per step), training only"),
    ])  # fmt: skip
    if on_gpu:
        hours = f"{_span(plan.gpu_hours, 1, 0)} GPU hours"
        bill = f"{hours} x price per GPU hour (--price)"
        if price is not None:
            bill = f"{_span(plan.gpu_hours, price, 0)} = {hours} x {price:g}"
        rows.append(("price", "modeled", bill))
    lines = [f"{name:<18}{mark:<11}{text}" for name, mark, text in rows]
    return "\n".join(map(escaped, [*lines, *(f"warning: {warning}" for warning in plan.warnings)]))


def _span(values: Range, factor: float = 1.0, digits: int = 1) -> str:
    return " to ".join(f"{factor * value:,.{digits}f}" for value in values)
