"""One worker's training loop. `train_step` computes a step, which depends on nothing but the step's number.

Exact resume rests on four things: the order of samples and every random draw are functions of the position in
the data; the complete state is saved; gradients are added in a fixed order; and nothing else carries over from
one step to the next.
"""

import contextlib
import json
import logging
import os
import threading
import time
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch.nn.parallel import DistributedDataParallel

from maskformer import build_model, compute_losses
from maskformer.matcher import NonFiniteLogitsError
from maskformer.optim import build_optimizer, learning_rate_factor
from pipelines.checkpoints.pretrained import load_initial_weights
from pipelines.checkpoints.state import load, newest, step_folder
from pipelines.config.train import TrainConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.stream import training_batches
from pipelines.errors import UserError
from pipelines.evaluation.quick_pq import quick_pq
from pipelines.storage import Location
from pipelines.tracking.metric_log import MetricLog
from pipelines.training.coordinator import WarningForwarder
from pipelines.training.meter import Meter
from pipelines.training.preflight import PreparedRun
from pipelines.training.saver import Saver


class NonFiniteError(ArithmeticError):
    """Logits or gradients are NaN or infinite. Another attempt would fail at the same step."""


def train_loop(job: dict[str, Any]) -> dict[str, Any]:
    """Train until the last step, or until the driver asks to stop; return where it ended.

    Args:
        job: `run` (a PreparedRun), `mlflow_run` (a TrackedRun) and `coordinator` (an actor).
    """
    run, coordinator = job["run"], job["coordinator"]
    config, total_steps = run.config, run.total_steps
    context = ray.train.get_context()
    rank, device = context.get_world_rank(), ray.train.torch.get_device()
    torch.set_num_threads(config.scaling.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    logging.getLogger("pipelines").addHandler(WarningForwarder(coordinator, rank))
    if fatal := ray.get(coordinator.fatal.remote()):
        return {"status": "failed", "cause": fatal}

    steps_per_epoch = len(run.train) / config.run.global_batch
    try:
        model, optimizer, first_step = _restore(run, rank, device)
    except UserError as error:  # such as weights that the driver could read and this node cannot
        ray.get(coordinator.declare_fatal.remote(str(error)))
        raise
    pids = [0] * config.batch_split.workers
    dist.all_gather_object(pids, os.getpid())
    if rank == 0:
        coordinator.add_event.remote("start", step=first_step, workers=config.batch_split.workers, pids=pids)

    batches = training_batches(
        run.train,
        config.batch_split.positions(rank, first_step, total_steps),
        seed=config.run.seed,
        augmentation=config.data.augment,
        micro_batch=config.run.micro_batch,
        samples_per_task=config.data.samples_per_task,
        cpus=config.scaling.data_cpus / config.scaling.workers,
        prefetch=config.data.prefetch,
    )
    saver = Saver(config, run.folder, rank, run.train.taxonomy)
    stop = _StopWatcher(coordinator) if rank == 0 else None
    metrics = MetricLog(job["mlflow_run"]) if rank == 0 else None
    meter = Meter(first_step, total_steps)
    status, step, norm = "finished", first_step, float("nan")
    while step < total_steps:
        factor = learning_rate_factor(step, total_steps, steps_per_epoch, config.schedule)
        try:
            micro_batches = meter.waiting_for(batches, config.batch_split.accumulation)
            num_masks, stopping = _agree(micro_batches, config, stop, device)
            losses, norm = train_step(model, optimizer, micro_batches, num_masks, factor, config, device)
        except (NonFiniteError, UserError) as error:  # another attempt would end in the same way
            message = f"step {step}, worker {rank}: {error}"
            if isinstance(error, NonFiniteError):
                message += f" The gradient norm of the step before was {norm:g}."
            ray.get(coordinator.declare_fatal.remote(message))
            raise type(error)(message) from error
        if config.run.sample_log:
            _log_samples(run.folder, step, rank, micro_batches)
        step += 1  # from here on, `step` counts the steps done

        if step % config.tracking.log_every == 0 or step in (1, total_steps):
            dist.all_reduce(losses)  # every rank's mean over its micro-batches
            if metrics is not None:
                names = ("loss/classification", "loss/focal", "loss/dice", "loss/total")
                values = dict(zip(names, (losses / config.batch_split.workers).tolist(), strict=True))
                speed = meter.report(step, config.run.global_batch)
                metrics.log(step, {**values, "gradient_norm": norm, "lr_factor": factor, **speed})
                coordinator.set_progress.remote(step=step, total=total_steps, loss=values["loss/total"], **speed)
        if config.evaluation.every and run.packs.val is not None and step % config.evaluation.every == 0:
            with meter.paused():
                quality = quick_pq(model.module, config, run.packs.val, rank, config.batch_split.workers)
            if metrics is not None:
                metrics.log(step, quality)
                coordinator.add_event.remote("quick PQ", step=step, **quality)
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
        factor: multiplies every group's initial learning rate.

    Raises:
        NonFiniteError: logits or gradients are not finite; names the images and the learning rate.
    """
    network = config.model
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(4, dtype=torch.float64, device=device)
    for index, batch in enumerate(micro_batches):
        # Dropout is seeded by the position of the micro-batch's first sample, whatever came before.
        torch.manual_seed((config.run.seed << 40) + batch.positions[0] & 0xFFFF_FFFF_FFFF_FFFF)
        batch = batch.to(device)
        last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=_autocast(config, device)):
                output = model(*batch.inputs(network.pixel_mean, network.pixel_std))
            try:
                losses = compute_losses(output, batch.targets(), config.loss, num_masks)
            except NonFiniteLogitsError as error:
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
    run: PreparedRun, rank: int, device: torch.device
) -> tuple[DistributedDataParallel, torch.optim.Optimizer, int]:
    """Build model and optimizer, and load the newest checkpoint that verifies: rank 0 chooses, all follow."""
    config = run.config
    state = newest(run.folder, load) if rank == 0 else None
    chosen = [state.step if state else None]
    dist.broadcast_object_list(chosen, src=0)
    if rank != 0 and chosen[0] is not None:
        state = load(step_folder(run.folder, chosen[0]))

    torch.manual_seed(config.run.seed)
    network = build_model(config.model)
    if state is None and config.weights != "none" and rank == 0:  # DDP sends them to the others
        load_initial_weights(network, config.weights, run.train.taxonomy)
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


def _agree(
    micro_batches: list[PanopticBatch], config: TrainConfig, stop: "_StopWatcher | None", device: torch.device
) -> tuple[float, bool]:
    """Return the divisor of the mask losses and whether to stop after this step, the same on all ranks."""
    masks = sum(batch.num_masks(config.model.num_queries) for batch in micro_batches)
    shared = torch.tensor([masks, stop is not None and stop.requested], dtype=torch.float64, device=device)
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


class _StopWatcher:
    """Asks the coordinator once a second, beside the training, whether a stop was requested."""

    def __init__(self, coordinator: Any) -> None:
        self.requested = False
        self._coordinator = coordinator
        threading.Thread(target=self._watch, name="stop watcher", daemon=True).start()

    def _watch(self) -> None:
        with contextlib.suppress(RayError):  # the driver is gone, and this worker with it
            while not self.requested:
                self.requested = ray.get(self._coordinator.stop_requested.remote())
                time.sleep(1)
