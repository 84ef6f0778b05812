"""One worker's training loop. `train_step` computes a step, which depends on nothing but the step's number.

Exact resume rests on four things: the order of samples and every random draw are functions of the position in
the data; the complete state is saved; gradients are added in a fixed order; and nothing else carries over from
one step to the next.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from torch import nn

from maskformer import MaskFormer, build_model, compute_losses
from maskformer.matcher import NonFiniteLogitsError
from maskformer.optim import AveragedWeights, build_optimizer, learning_rate_factor
from maskformer.targets import to_device
from maskformer.untrusted import escaped
from pipelines.checkpoints.pretrained import load_initial_weights
from pipelines.checkpoints.state import TrainingState, environment, load, newest, read_manifest, step_folder
from pipelines.config.train import TrainConfig
from pipelines.data.batch import PanopticBatch
from pipelines.data.order import dropout_seed
from pipelines.data.stream import training_batches
from pipelines.errors import StorageRefusedError, StorageUnavailableError, UserError
from pipelines.evaluation.quick_pq import quick_pq
from pipelines.storage import Location, set_patience
from pipelines.tracking.metric_log import MetricLog
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.tensorboard import EventFiles
from pipelines.training import replay
from pipelines.training.coordinator import DRAIN, RESIZE, STOP, Heartbeat, WarningForwarder
from pipelines.training.meter import Meter
from pipelines.training.preflight import PreparedRun, require_compiler
from pipelines.training.reduction import (
    ExactReduction,
    FastReduction,
    Reduction,
    broadcast_module,
    broadcast_state,
    gather_losses,
)
from pipelines.training.saver import Saver
from pipelines.training.watchdog import Activity, register_stack_dump

logger = logging.getLogger(__name__)

_MOST_SKIPPED = 20
"""Steps that are not finite and skipped, after which a run ends nevertheless."""


class NonFiniteError(ArithmeticError):
    """Logits or gradients of a step are NaN or infinite, on any worker; raised on all of them."""


@dataclass(frozen=True)
class Job:
    """What an attempt's workers need to know."""

    run: PreparedRun
    """The run; its configuration has the attempt's number of workers."""
    mlflow_run: TrackedRun
    coordinator: Any
    attempt: int
    """Number of the attempt, from 1."""
    reached: int
    """The most steps that an earlier attempt had done."""
    non_finite_steps: frozenset[int]
    """The steps that were not finite in an earlier attempt."""


def train_loop(job: Job) -> dict[str, Any]:
    """Train until the last step, or until the driver asks to stop; return where it ended.

    Returns:
        `status` (finished, stopped, drained or resized), `step`, and `early` if the quick PQ ended the run.
    """
    entered = time.time()
    rank = ray.train.get_context().get_world_rank()
    logging.getLogger("pipelines").addHandler(WarningForwarder(job.coordinator, job.attempt, rank))
    worker = _Worker(job, rank, entered)
    try:
        return worker.train()
    except Exception as error:
        # Told by the worker itself: Ray passes on a traceback as text, and perhaps another worker's first.
        facts = {"kind": _kind(error), "failed_step": worker.step, "cause": _describe(error, worker.step, rank)}
        with suppress(RayError):  # then the driver has Ray's words only
            ray.get(job.coordinator.add_event.remote(job.attempt, "error", rank=rank, **facts), timeout=30)
        raise


def _kind(error: Exception) -> str:
    kinds = {
        NonFiniteError: "non-finite",
        StorageUnavailableError: "storage",
        StorageRefusedError: "storage",
        UserError: "data",
    }
    return next((name for kind, name in kinds.items() if isinstance(error, kind)), "worker")


def _describe(error: Exception, step: int | None, rank: int) -> str:
    where = f"worker {rank}" if step is None else f"step {step}, worker {rank}"
    if isinstance(error, NonFiniteError):
        return f"step {step}, {error}"
    known = isinstance(error, StorageUnavailableError | UserError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    return f"{where}: {' '.join(text.split())[:2000]}"


@contextmanager
def fitting(folder: Location) -> Iterator[None]:
    """Turn what torch raises for a state of another network or optimizer into an error that names the run.

    Raises:
        UserError: it does.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"The newest checkpoint of {folder} does not fit its network and optimizer ({type(error).__name__}: "
            f"{escaped(error, 300)}). Restore an undamaged copy, or start a new run with another --run.name."
        ) from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of AdamW, which torch does not check. Its settings stay those of the configuration.

    Raises:
        ValueError: the state of a parameter is not that of AdamW. Other exceptions if it is none of this optimizer.
    """
    own = optimizer.state_dict()["param_groups"]
    if [len(group["params"]) for group in state["param_groups"]] != [len(group["params"]) for group in own]:
        raise ValueError("its parameters are in other groups")
    optimizer.load_state_dict({"state": state["state"], "param_groups": own})
    for parameter, values in optimizer.state.items():
        moments = [values["exp_avg"], values["exp_avg_sq"]]
        if any(moment.shape != parameter.shape for moment in moments) or not math.isfinite(float(values["step"])):
            raise ValueError(f"the state of a parameter of the shape {tuple(parameter.shape)} is not its own")


@dataclass
class _Progress:
    """What carries over from step to step beside weights and optimizer; it is saved in checkpoints."""

    best_step: int = 0
    best_quality: float = -math.inf
    without_best: int = 0
    """Quick PQs since the best."""
    skipped: int = 0
    """Steps skipped because they were not finite."""
    damaged: int = 0
    """Images in whose place others were used, since they could not be read."""
    unsent: list[dict[str, Any]] = field(default_factory=list)
    """Points that MLflow did not have when the checkpoint was saved."""

    def judge(self, step: int, quality: float) -> bool:
        """Add a quick PQ; return whether it is the best so far."""
        best = quality > self.best_quality
        if best:
            self.best_step, self.best_quality = step, quality
        self.without_best = 0 if best else self.without_best + 1
        return best

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "best_quality": self.best_quality if self.best_step else None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "_Progress":
        known = {name: value for name, value in values.items() if name in vars(cls()) and value is not None}
        return cls(**known)


class _Worker:
    """The state of one worker's training loop."""

    def __init__(self, job: Job, rank: int, entered: float) -> None:
        self.step: int | None = None
        """Steps done; None before the state is restored."""
        self._job, self._run, self._rank, self._entered = job, job.run, rank, entered
        self._config = job.run.config
        self._device = ray.train.torch.get_device()
        self._activity = Activity()
        self._meter: Meter | None = None
        self._figures: dict[str, Any] = {}

    def train(self) -> dict[str, Any]:
        """Restore the newest state, and train from there."""
        config = self._config
        set_patience(config.scaling.storage_patience)
        torch.set_num_threads(config.scaling.threads)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        register_stack_dump()
        self._activity.enter("start", 0)
        with ExitStack() as stack:
            heartbeat = Heartbeat(self._job.coordinator, self._job.attempt, self._rank, self._beat)
            stack.callback(heartbeat.close)
            self._restore()
            saver = metrics = None
            if self._rank == 0:
                saver = Saver(config, self._run.folder, self._run.train.taxonomy)
                if self._progress.best_step:  # an attempt may have ended after the checkpoint and before best.json
                    saver.mark_best(self._progress.best_step, self._progress.best_quality)
                metrics = MetricLog(
                    self._job.mlflow_run,
                    self._run.folder,
                    self._progress.unsent,
                    event_files=EventFiles(self._run.folder) if config.tracking.tensorboard else None,
                )
            outcome = self._train(heartbeat, saver, metrics)
            if saver is not None and metrics is not None:
                self._activity.enter("saving", self._done)
                with self._timed.part("checkpoint"):
                    saver.finish()
                metrics.close()
            self._activity.enter("end", self._done)
        return {**outcome, "step": self._done, "until": time.time(), "split": self._timed.split}

    @property
    def _done(self) -> int:
        assert self.step is not None
        return self.step

    @property
    def _timed(self) -> Meter:
        assert self._meter is not None
        return self._meter

    def _beat(self) -> dict[str, Any]:
        split = {} if self._meter is None else {"split": self._meter.split}
        return {**self._activity.beat(), **self._figures, **split, "done": self.step, "until": time.time()}

    def _restore(self) -> None:
        """Build network and optimizer, and load the newest checkpoint that verifies: rank 0 reads it for all."""
        run, config, rank = self._run, self._config, self._rank
        saved = newest(run.folder, load) if rank == 0 else None
        loaded = broadcast_state(vars(saved) if saved is not None else None, self._device)
        state = None if loaded is None else TrainingState(**loaded)

        torch.manual_seed(config.run.seed % 2**63)
        network = build_model(config.model)
        if state is None and config.weights != "none" and rank == 0:
            logger.info("%s", load_initial_weights(network, config.weights, run.train.taxonomy))
        network.to(self._device).train()
        if state is not None:
            with fitting(run.folder):
                network.load_state_dict(state.model)
        else:
            broadcast_module(network)
        trained: nn.Module = network
        if config.scaling.compile:
            require_compiler()
            # Not in place: the quick PQ has images of many sizes, and each would be compiled. For each size anew, since
            # PyTorch 2.14 fails to compile this network for sizes that it does not know.
            trained = cast("nn.Module", torch.compile(network, dynamic=False))
        reduction = ExactReduction if config.scaling.exact else FastReduction
        self._reduction: Reduction = reduction(trained, config.batch_split, self._device)
        self._network: MaskFormer = network
        self._optimizer = build_optimizer(network, config.optimizer)
        decay = config.optimizer.ema_decay
        self._averaged = AveragedWeights(network, decay) if decay else None
        if state is not None:
            with fitting(run.folder):
                load_optimizer(self._optimizer, state.optimizer)
                if self._averaged is not None and state.averaged is not None:
                    self._averaged.load_state_dict(state.averaged)
        self._progress = _Progress.from_dict(state.progress if state else {})
        self.step = state.step if state else 0

        gathered: list[Any] = [None] * config.batch_split.workers
        dist.all_gather_object(gathered, (os.getpid(), environment(config)))
        self._meter = Meter(self.step, run.total_steps, self._job.reached)
        if rank == 0:
            self._compare_environments([of_rank for _, of_rank in gathered], resumed=state is not None)
            self._figures["start"] = {
                "step": self.step,
                "workers": config.batch_split.workers,
                "pids": [pid for pid, _ in gathered],
                "entered": self._entered,
                "restored": time.time(),
            }
            self._job.coordinator.add_event.remote(self._job.attempt, "start", **self._figures["start"])

    def _compare_environments(self, environments: list[dict[str, Any]], resumed: bool) -> None:
        """Warn if the numbers will not be bit for bit those of an uninterrupted run.

        Args:
            environments: of each rank.
            resumed: whether a checkpoint says what they were before.
        """
        before = read_manifest(step_folder(self._run.folder, self._done))["environment"] if resumed else {}
        # Checkpoints of before have fewer entries.
        changed = [
            f"{key} {expected} -> {now[key]}{'' if rank == 0 else f' on worker {rank}'}"
            for rank, now in enumerate(environments)
            for key, expected in {**environments[0], **before}.items()
            if key in now and now[key] != expected and (rank == 0 or now[key] != environments[0][key])
        ]
        if changed:
            more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
            logger.warning(
                "The order of samples stays exact, but the numbers may not be bit-identical to those of an "
                "uninterrupted run: %s%s.",
                ", ".join(changed[:10]),
                more,
            )

    def _train(self, heartbeat: Heartbeat, saver: Saver | None, metrics: MetricLog | None) -> dict[str, Any]:
        """Do steps until the run or the attempt ends; return the status."""
        run, config, meter = self._run, self._config, self._timed
        split, total_steps = config.batch_split, run.total_steps
        if 0 < config.run.patience <= self._progress.without_best:  # the attempt before ended after its last checkpoint
            return {"status": "finished", "early": self._done < total_steps}
        batches = training_batches(
            run.train,
            config.sample_order(run.train),
            rank=self._rank,
            first_step=self._done,
            last_step=total_steps,
            samples_per_task=config.data.samples_per_task,
            cpus=config.scaling.data_cpus / split.workers,
            object_store=int(config.data.object_store_gb * 1e9),
            prefetch=config.data.prefetch,
            damaged=config.data.damaged,
            patience=config.scaling.storage_patience,
            name=f"train-{self._rank}",
        )
        first = True
        try:
            while self._done < total_steps:
                step = self._done
                self._activity.enter("data", step)
                with nullcontext() if first else meter.part("data"):
                    micro_batches = [next(batches) for _ in range(split.accumulation)]
                first = False
                meter.stepping(step)
                self._warn_of_skipped(micro_batches)
                images = tuple(image for batch in micro_batches for image in batch.image_ids)
                self._activity.enter("step", step, images)
                num_masks, request, damaged = _agree(micro_batches, config, heartbeat.request, self._rank, self._device)
                self._progress.damaged += damaged
                factor = learning_rate_factor(
                    step, total_steps, len(run.train) / config.run.global_batch, config.schedule
                )
                losses, norm = self._step(micro_batches, num_masks, factor)
                if config.run.sample_log:
                    _log_samples(run.folder, step, self._rank, micro_batches)
                self.step = step = step + 1  # from here on, `step` counts the steps done

                self._log(metrics, losses, norm, factor)
                best, early = self._evaluate(metrics)
                due = step % config.checkpoint.every == 0 or step == total_steps or request >= DRAIN or early
                if saver is not None and metrics is not None:
                    with meter.part("checkpoint"):
                        saver.check()
                        if due or (best and config.checkpoint.keep_best):
                            self._progress.unsent = metrics.in_memory()
                            saver.save(self._state())
                        if best and config.checkpoint.keep_best:
                            saver.mark_best(step, self._progress.best_quality)
                        self._figures["checkpoint"] = saver.saved
                if due:
                    self._report()
                if step == total_steps or early:
                    return {"status": "finished", "early": step < total_steps}
                if request >= DRAIN:
                    return {"status": "stopped" if request == STOP else "drained"}
                if request == RESIZE and due:
                    return {"status": "resized"}
            return {"status": "finished"}
        finally:
            batches.close()

    def _step(
        self, micro_batches: list[PanopticBatch], num_masks: float, factor: float
    ) -> tuple[torch.Tensor | None, float]:
        """Do a step; return this rank's losses, None for a step that is skipped, and the gradient norm.

        Raises:
            NonFiniteError: the step is not finite, for the first time or with the policy to stop.
        """
        step = self._done
        try:
            losses, norm = train_step(
                self._reduction, self._optimizer, micro_batches, num_masks, factor, self._config, self._device
            )
        except NonFiniteError as raised:
            error = raised
            if "norm" in self._figures:  # the same on all ranks
                error = NonFiniteError(
                    f"{raised} The gradient's norm was {self._figures['norm']:.3g} in the last finite step."
                )
            if step not in self._job.non_finite_steps:
                raise error from None  # repeated once from the checkpoint: a faulty device may have caused it
            if self._config.run.non_finite == "stop" or self._progress.skipped >= _MOST_SKIPPED:
                self._write_replay(micro_batches, num_masks, factor)
                raise error from None
            self._progress.skipped += 1
            if self._rank == 0:
                logger.warning("Step %d is skipped, %d so far. %s", step, self._progress.skipped, error)
            return None, math.nan
        if self._averaged is not None:
            self._averaged.update(self._network)
        self._figures["norm"] = norm
        return losses, norm

    def _write_replay(self, micro_batches: list[PanopticBatch], num_masks: float, factor: float) -> None:
        """Write what jobs/replay.py needs to repeat this step alone. All ranks must call it, and return together."""
        folder = self._run.folder / "replay" / f"step_{self._done:08d}"
        self._activity.enter("saving", self._done)
        try:
            replay.write_batches(folder, self._rank, micro_batches)
            failed = False
        except (UserError, StorageUnavailableError, OSError) as error:
            logger.warning("The step cannot be kept for jobs/replay.py. %s", error)
            failed = True
        failures: list[Any] = [None] * self._config.batch_split.workers
        dist.all_gather_object(failures, failed)
        if self._rank == 0 and not any(failures):
            self._write_bundle(folder, num_masks, factor)
        # The error that follows on any rank ends all of them, also one that writes.
        dist.all_gather_object(failures, None)

    def _write_bundle(self, folder: Location, num_masks: float, factor: float) -> None:
        try:
            replay.write_bundle(
                folder,
                run=self._run,
                step=self._done,
                network_state=self._network.state_dict(),
                num_masks=num_masks,
                factor=factor,
                recent_norms=[self._figures["norm"]] if "norm" in self._figures else [],
                workers=self._config.batch_split.workers,
                taxonomy=self._run.train.taxonomy,
            )
            logger.warning("To look into this step: python jobs/replay.py --bundle %s", folder)
        except (UserError, StorageUnavailableError, OSError) as error:
            logger.warning("The step cannot be kept for jobs/replay.py. %s", error)

    def _log(self, metrics: MetricLog | None, losses: torch.Tensor | None, norm: float, factor: float) -> None:
        """Log losses and rates. All ranks must call it."""
        config, step = self._config, self._done
        if losses is None or not (step % config.tracking.log_every == 0 or step in (1, self._run.total_steps)):
            return
        mean = gather_losses(losses, self._rank, config.batch_split)
        if metrics is not None:
            names = ("loss/classification", "loss/focal", "loss/dice", "loss/total")
            values = dict(zip(names, mean.tolist(), strict=True))
            speed = self._timed.report(step, config.run.global_batch)
            counts = {"damaged_images": self._progress.damaged, "skipped_steps": self._progress.skipped}
            counted = {name: float(count) for name, count in counts.items() if count}
            metrics.log(step, {**values, "gradient_norm": norm, "lr_factor": factor, **speed, **counted})
            self._figures["progress"] = {
                "step": step,
                "total": self._run.total_steps,
                "loss": values["loss/total"],
                **speed,
            }

    def _evaluate(self, metrics: MetricLog | None) -> tuple[bool, bool]:
        """Compute the quick PQ if it is due; return whether it is the best, and whether it ends the run.

        All ranks must call it, and get the same.
        """
        config, step, val = self._config, self._done, self._run.packs.val
        if not config.evaluation.every or val is None or step % config.evaluation.every:
            return False, False
        self._activity.enter("quick PQ", step)
        averaged = self._averaged.swapped(self._network) if self._averaged is not None else nullcontext()
        with self._timed.part("evaluation"), averaged:
            quality = quick_pq(self._network, config, val, self._rank, config.batch_split.workers)
        if quality is None:
            return False, False
        if metrics is not None:
            metrics.log(step, quality)
            self._job.coordinator.add_event.remote(self._job.attempt, "quick PQ", step=step, **quality)
        self._figures["quick_pq"] = quality["quick_pq/all"]
        best = self._progress.judge(step, quality["quick_pq/all"])
        early = 0 < config.run.patience <= self._progress.without_best
        return best, early

    def _report(self) -> None:
        """Report the last figures to Ray Train, for callbacks of its own. All ranks must call it.

        Not at every step: Ray Train takes one report in half a second, and a rank that reports waits for the others.
        """
        figures = dict(self._figures.get("progress", {}))
        if "quick_pq" in self._figures:
            figures["quick_pq"] = self._figures["quick_pq"]
        with self._timed.part("checkpoint"):
            ray.train.report(figures)

    def _state(self) -> TrainingState:
        averaged = None if self._averaged is None else self._averaged.state_dict()
        return TrainingState(
            step=self._done,
            model=self._network.state_dict(),
            optimizer=self._optimizer.state_dict(),
            averaged=averaged,
            progress=self._progress.to_dict(),
        )

    def _warn_of_skipped(self, micro_batches: list[PanopticBatch]) -> None:
        for batch in micro_batches:
            for text in batch.skipped:
                logger.warning("Step %d: %s", self._done, text)


def train_step(
    reduction: Reduction,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[PanopticBatch],
    num_masks: float,
    factor: float,
    config: TrainConfig,
    device: torch.device,
) -> tuple[torch.Tensor, float]:
    """Do one optimizer step.

    Args:
        num_masks: the divisor of the mask losses, the mean over all micro-batches of all ranks.
        factor: multiplies every group's initial learning rate.

    Returns:
        The losses of this rank's micro-batches ([A, 4] float64: classification, focal, dice, total) and the norm of
        the gradient.

    Raises:
        NonFiniteError: logits or gradients of any rank are not finite; names the images and the learning rate. The
            weights are as before. All ranks raise it, with the same message.
    """
    network, bfloat16 = config.model, config.network_precision(device.type) == "bfloat16"
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    rows = torch.zeros(len(micro_batches), 4, dtype=torch.float64, device=device)
    problems: list[str] = []
    for turn, index in enumerate(reduction.turns):
        # Dropout is seeded by the position of the micro-batch's first sample, whatever came before.
        torch.manual_seed(dropout_seed(config.run.seed, micro_batches[index].positions[0], device.type))
        batch = micro_batches[index]
        with reduction.micro_batch(last=turn == len(micro_batches) - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                output = reduction.model(*batch.inputs(network.pixel_mean, network.pixel_std, device))
            try:
                losses = compute_losses(output, batch.targets(device), config.loss, num_masks)
                total = losses.total
                rows[index] = torch.stack([losses.classification, losses.focal, losses.dice, total]).detach()
            except NonFiniteLogitsError as error:
                problems.append(f"{error} Images {', '.join(map(str, batch.image_ids))}")
                # So that the gradient is not finite on any rank, and all of them end the step in the same way.
                total = (output.class_logits.sum() + output.mask_logits.sum()) * math.nan
            (total * reduction.scale).backward()
    reduction.finish()
    clip = config.optimizer.clip_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(reduction.parameters, clip).item()
    if not math.isfinite(norm):
        lr = max(group["lr"] for group in optimizer.param_groups)
        raise NonFiniteError(f"{_first_problem(problems, micro_batches, norm)}, learning rate {lr:g}.")
    optimizer.step()
    return rows, norm


def _first_problem(problems: list[str], micro_batches: list[PanopticBatch], norm: float) -> str:
    """Return what the first rank with logits that are not finite found, else what is wrong with the gradient."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problems[:1])
    for rank, of_rank in enumerate(found):
        if of_rank:
            return f"worker {rank}: {of_rank[0]}"
    images = [image for batch in micro_batches for image in batch.image_ids]
    dist.all_gather_object(found, images)
    every = [image for of_rank in found for image in of_rank]
    return f"all workers: The gradient's norm is {norm}. Images {', '.join(map(str, every))}"


def _agree(
    micro_batches: list[PanopticBatch], config: TrainConfig, request: int, rank: int, device: torch.device
) -> tuple[float, int, int]:
    """Return what all ranks must agree on before a step.

    Returns:
        The divisor of the mask losses, the driver's request as rank 0 knows it, and the number of images in whose place
        others are used.
    """
    masks = sum(batch.num_masks(config.model.num_queries) for batch in micro_batches)
    damaged = sum(len(batch.skipped) for batch in micro_batches)
    numbers = [masks, request if rank == 0 else 0, damaged]
    shared = to_device(torch.tensor(numbers, dtype=torch.float64), device)
    dist.all_reduce(shared)
    total, agreed, replaced = shared.tolist()
    return max(1.0, total / (config.run.global_batch // config.run.micro_batch)), int(agreed), int(replaced)


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
