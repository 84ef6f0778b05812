"""The rehearsal of a run: a tiny model trained on simulated nodes, one of which is lost.

First, the placement of all workers is tested on nodes that claim the resources of the cluster, without starting a
worker. Then `fit` trains on two nodes in a separate process, like a job. One node is killed after the first checkpoint
and replaced; the run must resume from the checkpoint and lose no sample.
"""

import json
import logging
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray

from pipelines.checkpoints.state import step_folder
from pipelines.cluster.simulated import Node, SimulatedCluster, bundles_per_node, simulated
from pipelines.config.fields import FACTS
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.data.synthetic import SyntheticConfig, draw_and_pack
from pipelines.errors import RunFailedError
from pipelines.planning.placement import Placement, counts_per_node, place
from pipelines.storage import Location
from pipelines.training import PreparedRun, fit, ledger, prepare_run

logger = logging.getLogger(__name__)

WORKERS = 16
"""Maximum number of workers, on two nodes."""
STEPS, EVERY = 20, 5
"""Steps of the run, and between checkpoints."""
FREE_DATA_CPUS = 1
"""Data tasks that run at the same time. More would not fit in memory; each reserves a CPU as in the recipe."""

_LOSS = EVERY + 3
"""Steps completed before the node is lost: some after the first checkpoint, so that steps must be repeated."""
_IMAGES = 64
_START_SECONDS = 300
"""Timeout for the workers to start: sixteen processes that import PyTorch, possibly on few cores."""
_RUN_SECONDS = 900
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Results of a rehearsal."""

    recipe: TrainConfig
    """The configuration that was rehearsed."""
    config: TrainConfig
    """The configuration that was run in its place."""
    placement: Placement
    """Placement of all workers of the recipe."""
    before: tuple[int, ...]
    """Workers on each node before the loss."""
    after: tuple[int, ...]
    """Workers on each node after the loss."""
    lost_at: int
    """Steps completed when the node was lost."""
    resumed_at: int
    """Step of the checkpoint from which the run resumed."""
    redone: int
    """Steps that were repeated."""
    attempts: int
    """Attempts until the run finished."""
    cause: str
    """Cause of the failure according to the run's ledger."""
    positions: int
    """Positions in the training sequence, each used exactly once, not counting steps that were repeated later."""
    first_step_seconds: float
    """From the start to the end of the first step."""
    recovery_seconds: float
    """From the loss to the end of the next step."""
    seconds: float
    """Duration of placement and run together."""
    peak_bytes: int
    """Peak memory of all processes together. PSS: shared pages count once."""
    worker_bytes: int
    """Memory of one worker at the peak, on average."""


def rehearse(config: TrainConfig, nodes: Sequence[Node]) -> Rehearsal:
    """Rehearse a run on `nodes`. In the main thread only; leaves no processes or files behind.

    Raises:
        RunFailedError: the placement is not as expected, or the run did not survive the loss of a node.
    """
    if ray.is_initialized():
        raise RuntimeError("A rehearsal starts its own clusters, but this process has already joined one.")
    begun = time.monotonic()
    placement = place(config, nodes)
    logger.info(
        "All %d workers are placed: %s by node.", config.scaling.max_workers, counts_per_node(placement.workers)
    )
    environment = {
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS),
        FACTS["data.val"].variable: "",  # its categories are not those of the synthetic images
    }
    with simulated([], environment) as cluster:
        small = rehearsed(config, cluster.folder)
        per_node = ceil(small.scaling.max_workers / 2)
        node = Node(int(per_node * small.scaling.cpus_per_worker))
        data_cpus = int(small.scaling.data_cpus)
        cluster.add(Node(data_cpus))
        if data_cpus > FREE_DATA_CPUS:
            cluster.occupy(data_cpus - FREE_DATA_CPUS)
        handles = [cluster.add(node) for _ in range(ceil(small.scaling.max_workers / per_node))]
        draw_and_pack(cluster.folder, SyntheticConfig(split="train", num_images=_IMAGES, max_side=64))
        with _Driver(prepare_run(small)) as driver:
            facts = _lose_a_node(driver, cluster, handles[-1], node)
        peak = cluster.processes.peak
    worker_bytes = [peak[pid] for pid in facts.pop("pids") if pid in peak]
    return Rehearsal(
        recipe=config,
        config=small,
        placement=placement,
        **facts,
        seconds=time.monotonic() - begun,
        peak_bytes=sum(peak.values()),
        worker_bytes=sum(worker_bytes) // max(1, len(worker_bytes)),
    )


def rehearsed_workers(config: TrainConfig) -> int:
    """Return the largest number of workers, up to WORKERS and the recipe's, that divides its global batch evenly."""
    micro_batches = config.run.global_batch // config.run.micro_batch
    return max(n for n in range(1, min(WORKERS, config.scaling.max_workers) + 1) if micro_batches % n == 0)


def rehearsed(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return the configuration to run in place of `config`: small, on CPUs, with all files in `folder`."""
    workers = rehearsed_workers(config)
    return replace(
        config,
        weights="none",
        model=DEMO.model,
        data=replace(config.data, train=str(folder / "train"), val="", augment=DEMO.data.augment),
        run=replace(config.run, name="rehearsal", storage=str(folder / "runs"), steps=STEPS, sample_log=True),
        scaling=replace(
            config.scaling,
            workers=workers,
            device="cpu",
            # Ray places workers by their CPUs: none must fit on the node for data tasks.
            cpus_per_worker=max(FREE_DATA_CPUS + 1, ceil(config.scaling.cpus_per_worker)),
            data_cpus=workers,
            threads=1,
        ),
        checkpoint=replace(config.checkpoint, every=EVERY),
        evaluation=replace(config.evaluation, every=0),
        tracking=replace(config.tracking, uri=f"sqlite:///{folder}/mlflow.db", log_every=1),
    )


def steps_redone(lines: Iterable[Mapping[str, Any]], config: TrainConfig) -> int:
    """Count the repeated steps, and check that every position was used exactly once apart from repetitions.

    Args:
        lines: the lines of the run's samples.jsonl.

    Raises:
        RunFailedError: a sample was lost or used twice, or a step was repeated with different samples.
    """
    used: dict[tuple[int, int], Mapping[str, Any]] = {}
    redone = set()
    for line in lines:
        key = step, rank = line["step"], line["rank"]
        if key in used:
            redone.add(step)
            if used[key] != line:
                raise RunFailedError(
                    f"Worker {rank} repeated step {step} with different images: {used[key]}, then {line}."
                )
        used[key] = line
    positions = Counter(position for line in used.values() for position in line["positions"])
    expected = Counter(range((config.run.steps or 0) * config.run.global_batch))
    if positions != expected:
        lost, surplus = sorted((expected - positions).elements()), sorted((positions - expected).elements())
        raise RunFailedError(
            f"The node loss changed the samples: positions {lost} were never used, {surplus} too often."
        )
    return len(redone)


def report(result: Rehearsal) -> str:
    """Return a rehearsal as text, in the format of a plan."""
    recipe, config = result.recipe, result.config
    asked, scaling = recipe.scaling, config.scaling
    replaced = ["the demo's model", "synthetic images and their sizes", f"{FREE_DATA_CPUS} data task at a time"]
    if scaling.max_workers != asked.max_workers:
        replaced.insert(0, f"{scaling.max_workers} of {asked.max_workers} workers")
    if scaling.device != asked.device:
        replaced.append(f"{scaling.device} instead of {asked.device}")
    if scaling.cpus_per_worker != asked.cpus_per_worker:
        replaced.append(f"{scaling.cpus_per_worker:g} CPUs per worker")
    rows = {
        "placement": f"{asked.max_workers} workers, {counts_per_node(result.placement.workers)} by node; "
        f"{result.placement.data_cpus:g} CPUs left for data tasks, {asked.data_cpus:g} needed; "
        f"{result.placement.seconds:.0f} s",
        "run": f"{config.batch_split} accumulated, {counts_per_node(result.before)} by node, {config.run.steps} steps",
        "replaced": f"{', '.join(replaced)}, a checkpoint every {config.checkpoint.every} steps, no quick PQ",
        "node loss": f"after step {result.lost_at}; resumed from step {result.resumed_at} with "
        f"{counts_per_node(result.after)} by node, {result.redone} steps repeated, finished in attempt "
        f"{result.attempts}",
        "cause in ledger": result.cause.rstrip("."),
        "samples": f"{result.positions} positions, each used once: none lost, none used twice",
        "time": f"{result.first_step_seconds:.0f} s to the first step, {result.recovery_seconds:.0f} s from the loss "
        f"to the next step, {result.seconds:.0f} s in total",
        "memory": f"{result.peak_bytes / 1e9:.1f} GB peak (PSS of all processes), "
        f"{result.worker_bytes / 1e9:.2f} GB per worker",
    }
    return "\n".join(f"{name:<18}{'rehearsed':<11}{text}" for name, text in rows.items())


class _Driver:
    """Runs `fit` in a separate process, like a job, and follows it through its run's folder."""

    def __init__(self, run: PreparedRun) -> None:
        self.config, self.run = run.config, run.folder
        context = multiprocessing.get_context("spawn")
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_drive, args=(run, answer), name="driver", daemon=True)
        self._process.start()
        answer.close()
        self._deadline = time.monotonic() + _RUN_SECONDS

    def __enter__(self) -> "_Driver":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()

    def until(self, what: str, condition: Callable[[], bool]) -> float:
        """Wait until `condition` holds, and return the time.

        Args:
            what: description of the condition for messages.

        Raises:
            RunFailedError: the run ended before, or the time limit was reached.
        """
        while not condition():
            if self._answer.poll(_POLL_SECONDS) and not condition():
                raise RunFailedError(f"The rehearsal ended before {what}. {self._outcome()}")
            if time.monotonic() > self._deadline:
                raise RunFailedError(f"The rehearsal did not reach {what} within {_RUN_SECONDS} s.")
        return time.monotonic()

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            RunFailedError: it failed or took too long.
        """
        self.until("the end of the run", self._answer.poll)
        if cause := self._outcome():
            raise RunFailedError(f"The rehearsal failed. {cause}")

    def _outcome(self) -> str:
        """Return why the run failed, empty if it finished."""
        try:
            return self._answer.recv()
        except EOFError:
            return "The driver process died."

    def samples(self) -> list[dict[str, Any]]:
        """Return the complete lines of the run's samples.jsonl so far."""
        file = Path(self.run.path) / "samples.jsonl"
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []

    def done(self, step: int, times: int = 1) -> bool:
        """Return whether all workers have completed a step, counted from 0, at least `times` times."""
        return sum(line["step"] == step for line in self.samples()) >= times * self.config.scaling.max_workers

    def starts(self) -> list[dict[str, Any]]:
        """Return the `start` events in the run's ledger, one per attempt."""
        return [event for event in ledger.read(self.run) if event["event"] == "start"]


def _drive(run: PreparedRun, answer: Connection) -> None:
    try:
        # Errors of workers on a node that is killed on purpose are of no use either.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
        result = fit(run)
        answer.send("" if result.status == "finished" else f"The run is {result.status} at step {result.step}.")
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


def _lose_a_node(driver: _Driver, cluster: SimulatedCluster, victim: Any, like: Node) -> dict[str, Any]:
    """Follow a run through the loss and replacement of the node `victim` to its end; return fields of a Rehearsal."""
    begun = time.monotonic()
    first_step = driver.until("the first step", lambda: driver.done(0))
    before = bundles_per_node()
    logger.info("Training on simulated nodes, workers by node: %s.", counts_per_node(before))
    driver.until(f"step {_LOSS}", lambda: driver.done(_LOSS - 1) and _saved(driver.run, EVERY))
    lost = time.monotonic()
    cluster.lose(victim)
    lost_at = 1 + max(line["step"] for line in driver.samples())
    logger.info("A node was lost after step %d. Adding a replacement.", lost_at)
    cluster.add(like)
    driver.until("another attempt", lambda: len(driver.starts()) > 1)
    resumed_at = driver.starts()[1]["step"]
    recovered = driver.until(f"the repetition of step {resumed_at + 1}", lambda: driver.done(resumed_at, times=2))
    after = bundles_per_node()
    logger.info("Training resumed from step %d.", resumed_at)
    driver.finish()
    if before != after:
        raise RunFailedError(
            f"The workers by node changed from {counts_per_node(before)} to {counts_per_node(after)} by the node loss."
        )
    starts, samples = driver.starts(), driver.samples()
    return {
        "before": before,
        "after": after,
        "lost_at": lost_at,
        "resumed_at": resumed_at,
        "redone": steps_redone(samples, driver.config),
        "attempts": len(starts),
        "cause": next(event["cause"] for event in ledger.read(driver.run) if event["event"] == "failure"),
        "positions": STEPS * driver.config.run.global_batch,
        "first_step_seconds": first_step - begun,
        "recovery_seconds": recovered - lost,
        "pids": {pid for event in starts for pid in event["pids"]},
    }


def _saved(run: Location, step: int) -> bool:
    """Return whether a checkpoint is complete: its manifest is written last."""
    return (step_folder(run, step) / "manifest.json").exists()
