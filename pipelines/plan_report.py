"""A plan as text, every figure with the mark of what it rests on."""

from dataclasses import dataclass
from typing import Literal

from pipelines.plan import GB, PASSES, Plan, Range

Mark = Literal["measured", "modelled", "published", "given"]
"""Run or counted here; arithmetic over the others; others' figure; said on the command line."""


@dataclass(frozen=True, kw_only=True)
class Marks:
    """What a plan's inputs rest on."""

    images: Mark
    cluster: Mark
    images_per_cpu: Mark


def report(plan: Plan, marks: Marks, source: str, price: float | None) -> str:
    """Return the plan as text, its warnings last.

    Args:
        source: where the images come from, in words.
        price: of a GPU hour; None gives the price as a formula.
    """
    config, hardware, machines = plan.config, plan.hardware, plan.machines
    scaling, state = config.scaling, plan.state
    on_gpu = scaling.device == "cuda"
    precision = config.precision if on_gpu else "float32"
    largest, typical = (f"{height}x{width}" for height, width in (plan.largest, plan.typical))
    sustained = "assumed (--cluster.tflops)" if hardware.tflops is None else "given"
    counted: Mark = "given" if config.run.steps else marks.images
    needed, data_cpus = Range(*reversed(plan.demand)), Range(*reversed(plan.data_cpus))

    rows: list[tuple[str, Mark, str]] = [
        ("recipe", "given", config.recipe),
        ("cluster", marks.cluster, f"{machines.nodes} node(s), {machines.gpus:g} GPUs, {machines.cpus:g} CPUs"),
        ("batch", "given", f"{config.plan} accumulated"),
        ("images", marks.images, f"{plan.images:,} {source}"),
        ("steps", counted, f"{plan.steps:,} = {plan.steps * config.run.global_batch:,} images"),
        ("state", "measured",
            f"{state.total / GB:.2f} GB on each {'GPU' if on_gpu else 'worker'}: parameters "
            f"{state.parameters / GB:.2f}, gradients {state.gradients / GB:.2f}, AdamW {state.optimizer / GB:.2f}, "
            f"DDP {state.buckets / GB:.2f}"),
    ]  # fmt: skip
    for label, masks, saved, memory in zip(
        ("mean", "95 of 100", "most"), plan.masks, plan.saved, plan.memory, strict=True
    ):
        text = (
            f"{memory / GB:.1f} GB at the peak, {saved / GB:.1f} of it saved for the backward pass: {masks} segments, "
            f"{config.run.micro_batch} x {largest}, {precision}"
        )
        rows.append((f"memory, {label}", "modelled", text))
    if on_gpu:
        rows.extend([
            ("memory of a GPU", "given", f"{hardware.gpu_memory:g} GB"),
            ("memory, published", "modelled",
                f"{plan.published_memory / GB:.1f} GB in mmdetection's layout: {plan.masks[2]} segments, "
                f"1 x {largest}, float32"),
        ])  # fmt: skip
    rows.extend([
        ("checkpoint", "measured",
            f"{state.checkpoint / GB:.2f} GB every {config.checkpoint.every} steps, {config.checkpoint.keep} kept"),
        ("operations", "measured",
            f"{plan.multiply_adds / 1e9:.1f} G multiply-adds for {typical}, forward; "
            f"{2 * PASSES * plan.multiply_adds / 1e12:.2f} T operations with the backward pass"),
        ("compute", "modelled", f"{_span(plan.compute, 1000, 0)} ms of a step at the sustained rate {sustained}"),
        ("network", "modelled",
            f"{plan.network_bytes / GB:.2f} GB of each step from each worker, ring all-reduce in float32; "
            + (f"{1000 * plan.network_seconds:.0f} ms at {hardware.network:g} GB/s" if machines.nodes > 1
                else "inside one node, not counted")),
        ("data rate", marks.images_per_cpu, f"{plan.images_per_cpu:g} images/s of one CPU"),
        ("data", "modelled",
            f"{_span(needed, 1, 0)} images/s needed, {_span(data_cpus, 1, 0)} CPUs; the run has {scaling.data_cpus:g}"),
        ("hours", "modelled", f"{_span(plan.hours)} ({_span(plan.step_seconds, 1, 2)} s a step), training alone"),
    ])  # fmt: skip
    if on_gpu:
        hours = f"{_span(plan.gpu_hours, 1, 0)} GPU hours"
        bill = f"{hours} x the price of one (--price)"
        if price is not None:
            bill = f"{_span(plan.gpu_hours, price, 0)} = {hours} x {price:g}"
        rows.append(("price", "modelled", bill))
    lines = [f"{name:<18}{mark:<11}{text}" for name, mark, text in rows]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in plan.warnings)])


def _span(values: Range, factor: float = 1.0, digits: int = 1) -> str:
    return " to ".join(f"{factor * value:,.{digits}f}" for value in values)
