"""One worker's loop. What a step computes is `train_step`, and it depends on the step's number alone.

Exact resume rests on four things: the order of samples and every random draw are functions of the position in
the data; the state is saved whole; gradients are added in a fixed order; and nothing else carries over from
step to step.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import Checkpoint, CheckpointUploadMode
from torch.nn.parallel import DistributedDataParallel

from maskformer import Taxonomy, build_model, compute_losses
from maskformer.matcher import NonFiniteLogits
from maskformer.optim import build_optimizer, learning_rate_factor
from pipelines import checkpoint, pretrained
from pipelines.config import TrainConfig, from_dict
from pipelines.data.batch import PanopticBatch
from pipelines.data.manifest import open_pack
from pipelines.data.stream import training_batches
from pipelines.errors import UserError
from pipelines.evaluation.quick import quick_pq
from pipelines.storage import Location, locate
from pipelines.tracking import MetricLog


class NonFiniteError(ArithmeticError):
    """Logits or gradients are NaN or infinite. It would come again at the same step."""


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """Train until the last step, or until the driver asks to stop; return where it ended.

    Args:
        job: `config` (as a dictionary), `run` (URI), `total_steps`, `mlflow_run_id` and `control` (an actor).
    """
    config, run, control = from_dict(TrainConfig, job["config"]), locate(job["run"]), job["control"]
    total_steps = job["total_steps"]
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    torch.set_num_threads(config.scaling.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if fatal := ray.get(control.fatal.remote()):
        return {"status": "failed", "cause": fatal}

    samples = open_pack(config.data.train, config.data.require_thing)
    steps_per_epoch = len(samples) / config.run.global_batch
    try:
        model, optimizer, first_step = _restore(config, run, rank, device, samples.taxonomy)
    except UserError as error:  # such as weights that the driver could read and this node cannot
        ray.get(control.declare_fatal.remote(str(error)))
        raise
    pids = [0] * config.plan.workers
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        control.add_event.remote("start", step=first_step, workers=config.plan.workers, pids=pids)

    batches = training_batches(
        samples,
        config.plan.positions(rank, first_step, total_steps),
        seed=config.run.seed,
        augmentation=config.data.augment,
        micro_batch=config.run.micro_batch,
        samples_per_task=config.data.samples_per_task,
        cpus=config.scaling.data_cpus / config.scaling.workers,
        prefetch=config.data.prefetch,
    )
    saver = _Saver(config, run, rank, samples.taxonomy)
    stop = _StopFlag(control) if rank == 0 else None
    metrics = MetricLog(config.tracking.uri, job["mlflow_run_id"]) if rank == 0 else None
    meter = _Meter(first_step, total_steps)
    status, step, norm = "finished", first_step, float("nan")
    while step < total_steps:
        factor = learning_rate_factor(step, total_steps, steps_per_epoch, config.schedule)
        try:
            micro_batches = meter.waiting_for(batches, config.plan.accumulation)
            num_masks, stopping = _agree(micro_batches, config, stop, device)
            losses, norm = train_step(model, optimizer, micro_batches, num_masks, factor, config, device)
        except (NonFiniteError, UserError) as error:  # another attempt would end in the same way
            message = f"step {step}, worker {rank}: {error}"
            if isinstance(error, NonFiniteError):
                message += f" The gradient norm of the step before was {norm:g}."
            ray.get(control.declare_fatal.remote(message))
            raise type(error)(message) from error
        if config.run.sample_log:
            _log_samples(run, step, rank, micro_batches)
        step += 1  # from here on, `step` counts the steps done

        if step % config.tracking.log_every == 0 or step in (1, total_steps):
            dist.all_reduce(losses)  # every rank's mean over its micro-batches
            if metrics is not None:
                names = ("loss/classification", "loss/focal", "loss/dice", "loss/total")
                values = dict(zip(names, (losses / config.plan.workers).tolist(), strict=True))
                speed = meter.report(step, config.run.global_batch)
                metrics.log(step, {**values, "gradient_norm": norm, "lr_factor": factor, **speed})
                control.set_progress.remote(step=step, total=total_steps, loss=values["loss/total"], **speed)
        if config.evaluation.every and config.data.val and step % config.evaluation.every == 0:
            with meter.paused():
                quality = quick_pq(model.module, config, rank, config.plan.workers, device)
            if metrics is not None:
                metrics.log(step, quality)
                control.add_event.remote("quick PQ", step=step, **quality)
        if step % config.checkpoint.every == 0 or step == total_steps or stopping:
            saver.save(step, model.module, optimizer)
        if stopping and step < total_steps:
            status = "stopped"
            break
    batches.close()
    saver.finish()
    if metrics is not None:
        metrics.close()
    return {"status": status, "step": step}


def train_step(
    model: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[PanopticBatch],
    num_masks: float,
    factor: float,
    config: TrainConfig,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """Do one optimizer step; return this rank's losses (classification, focal, dice, total) and the gradient norm.

    Args:
        num_masks: the divisor of the mask losses, the mean over all micro-batches of all ranks.
        factor: on every group's initial learning rate.

    Raises:
        NonFiniteError: logits or gradients are not finite; names the images and the learning rate.
    """
    network = config.model
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for place, batch in enumerate(micro_batches):
        # Dropout draws from the position of the micro-batch's first sample, so it knows no history.
        torch.manual_seed((config.run.seed << 40) + batch.positions[0] & 0xFFFF_FFFF_FFFF_FFFF)
        batch = batch.to(device)
        last = place == len(micro_batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=_autocast(config, device)):
                output = model(*batch.inputs(network.pixel_mean, network.pixel_std))
            try:
                losses = compute_losses(output, batch.targets(), config.loss, num_masks)
            except NonFiniteLogits as error:
                images = ", ".join(map(str, batch.image_ids))
                lr = max(group["lr"] for group in optimizer.param_groups)
                raise NonFiniteError(f"{error} Images {images}, learning rate {lr:g}.") from error
            (losses.total / len(micro_batches)).backward()
        parts = torch.stack([losses.classification, losses.focal, losses.dice, losses.total])
        total += parts.detach() / len(micro_batches)
    clip = config.optimizer.clip_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item()
    if not np.isfinite(norm):
        images = ", ".join(str(image) for batch in micro_batches for image in batch.image_ids)
        lr = max(group["lr"] for group in optimizer.param_groups)
        raise NonFiniteError(f"The gradient's norm is {norm}. Images {images}, learning rate {lr:g}.")
    optimizer.step()
    return total, norm


def _autocast(config: TrainConfig, device: torch.device) -> bool:
    return device.type == "cuda" and config.precision == "bfloat16"


def _restore(
    config: TrainConfig, run: Location, rank: int, device: torch.device, taxonomy: Taxonomy
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, int]:
    """Build model and optimizer, and load the newest checkpoint that verifies: rank 0 chooses, all follow."""
    state = checkpoint.newest(run) if rank == 0 else None
    chosen = [state.step if state else None]
    dist.broadcast_object_list(chosen, src=0)
    if rank != 0 and chosen[0] is not None:
        state = checkpoint.load(checkpoint.folder(run, chosen[0]))

    torch.manual_seed(config.run.seed)
    network = build_model(config.model)
    if state is None and config.weights != "none" and rank == 0:  # DDP hands them to the others
        pretrained.start(network, config.weights, taxonomy)
    network.to(device).train()
    model = DistributedDataParallel(
        network, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False
    )
    _settle_buckets(model, device)
    optimizer = build_optimizer(network, config.optimizer)
    if state is not None:
        network.load_state_dict(state.model)
        optimizer.load_state_dict(state.optimizer)
    return model, optimizer, state.step if state else 0


def _settle_buckets(model: DistributedDataParallel, device: torch.device) -> None:
    """Let DDP arrange its gradient buckets before the first real step.

    After its first backward pass DDP regroups the buckets, and with more than two ranks another grouping adds
    the gradients in another order. A run that resumes would meet that at another step than one that never
    stopped; a backward pass of zeros makes it the same for both.
    """
    output = model(torch.zeros(1, 3, 64, 64, device=device), None)
    (0.0 * (output.class_logits.sum() + output.mask_logits.sum())).backward()
    model.zero_grad(set_to_none=True)


def surroundings(config: TrainConfig) -> dict[str, Any]:
    """Return what bit-identity depends on beside the configuration."""
    return {
        "workers": config.scaling.workers,
        "threads": config.scaling.threads,
        "device": config.scaling.device,
        "torch": str(torch.__version__),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _agree(
    micro_batches: list[PanopticBatch], config: TrainConfig, stop: "_StopFlag | None", device: torch.device
) -> tuple[float, bool]:
    """Return the divisor of the mask losses and whether to stop after this step, the same on all ranks."""
    masks = sum(batch.num_masks(config.model.num_queries) for batch in micro_batches)
    shared = torch.tensor([masks, stop is not None and stop.is_set], dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    total, stopping = shared.tolist()
    return max(1.0, total / (config.run.global_batch // config.run.micro_batch)), stopping > 0


def _log_samples(run: Location, step: int, rank: int, micro_batches: list[PanopticBatch]) -> None:
    line = {
        "step": step,
        "rank": rank,
        "epochs": [epoch for batch in micro_batches for epoch in batch.epochs],
        "positions": [position for batch in micro_batches for position in batch.positions],
        "image_ids": [image for batch in micro_batches for image in batch.image_ids],
    }
    # One write of one short line in append mode: lines of different workers do not mix.
    with open(f"{run.path}/samples.jsonl", "ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


class _Saver:
    """Saves in the background on rank 0 and tells Ray of each checkpoint once it is in place."""

    def __init__(self, config: TrainConfig, run: Location, rank: int, taxonomy: Any) -> None:
        self._config, self._run, self._taxonomy = config, run, taxonomy
        self._writer = checkpoint.BackgroundWriter(run, config.checkpoint.keep) if rank == 0 else None
        self._unreported: int | None = None

    def save(self, step: int, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.finish()
        if self._writer is not None:
            state = checkpoint.TrainingState(
                step=step,
                model=checkpoint.snapshot(network.state_dict()),
                optimizer=checkpoint.snapshot(optimizer.state_dict()),
                surroundings=surroundings(self._config),
            )
            self._writer.submit(state, self._config, self._taxonomy)
        self._unreported = step

    def finish(self) -> None:
        """Wait for the checkpoint under way and report it. All ranks must call this equally often."""
        if self._unreported is None:
            return
        reported = None
        if self._writer is not None:
            self._writer.wait()
            place = checkpoint.folder(self._run, self._unreported)
            reported = Checkpoint(place.path, filesystem=place.filesystem)
        ray.train.report(
            {"step": self._unreported}, checkpoint=reported, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )
        self._unreported = None


class _StopFlag:
    """Asks the driver once a second, beside the training, whether to stop."""

    def __init__(self, control: Any) -> None:
        self.is_set = False
        self._control = control
        threading.Thread(target=self._watch, name="stop flag", daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(RayError):  # the driver is gone, and this worker with it
            while not self.is_set:
                self.is_set = ray.get(self._control.stop_requested.remote())
                time.sleep(1)


class _Meter:
    """Measures rate, time to go and the share of time spent waiting for data."""

    def __init__(self, step: int, total_steps: int) -> None:
        self._total = total_steps
        self._step, self._since, self._waited = step, time.perf_counter(), 0.0

    def waiting_for(self, batches: Iterator[PanopticBatch], count: int) -> list[PanopticBatch]:
        start = time.perf_counter()
        taken = [next(batches) for _ in range(count)]
        self._waited += time.perf_counter() - start
        return taken

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def report(self, step: int, global_batch: int) -> dict[str, float]:
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        rate = max(step - self._step, 1) / seconds
        facts = {
            "images_per_second": rate * global_batch,
            "data_wait_share": self._waited / seconds,
            "eta_seconds": (self._total - step) / rate,
        }
        self._step, self._since, self._waited = step, now, 0.0
        return facts
