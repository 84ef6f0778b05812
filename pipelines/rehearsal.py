"""The rehearsal: a recipe's very run with a tiny model on simulated nodes, one of which is lost on the way.

First the placement of all the recipe's workers is tried on nodes that claim what the cluster has, without starting a
worker. Then `fit` trains on two nodes in a process of its own, as a job does; a node is killed after the first
checkpoint, another takes its place, and the run must go on from there and lose no sample.
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
from ray.util import placement_group, remove_placement_group

from pipelines import checkpoint
from pipelines.config import VAL_DATA, TrainConfig
from pipelines.data.coco import CocoLayout
from pipelines.data.pack import PackConfig, pack
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.errors import RunFailed
from pipelines.recipes import DEMO
from pipelines.simulation import Family, Node, Simulation, bundles_per_node, ray_is_quiet, simulated
from pipelines.storage import Location, locate
from pipelines.training import fit, ledger
from pipelines.training.driver import per_worker

logger = logging.getLogger(__name__)

WORKERS = 16
"""At most; on two nodes."""
STEPS, EVERY = 20, 5
FREE_DATA_CPUS = 1
"""Data tasks at a time. Each takes a CPU as in the recipe; here all but one wait, or memory would not do."""

_LOSS = EVERY + 3
"""Steps done when the node is lost: some after the first checkpoint, so that there is something to do again."""
_PICTURES = 64
_PLACEMENT_SECONDS = 60
_START_SECONDS = 300
"""For a group of workers to start: sixteen processes that import PyTorch, on however few cores there are."""
_RUN_SECONDS = 900
_POLL_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where Ray puts all workers of a recipe, tried without starting them."""

    workers: tuple[int, ...]
    """On each node that has any, most first."""
    data_cpus: float
    """CPUs that are left for data tasks."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was rehearsed, and what came out. Seconds and bytes as named."""

    recipe: TrainConfig
    config: TrainConfig
    """As it was run."""
    placement: Placement
    before: tuple[int, ...]
    """Workers on each node, before the loss."""
    after: tuple[int, ...]
    lost_at: int
    """Steps done when the node was lost."""
    resumed_at: int
    """Steps of the checkpoint that the run went on from."""
    redone: int
    """Steps done twice."""
    attempts: int
    cause: str
    """What the run's ledger says of the loss."""
    positions: int
    """Of samples, each taken by exactly one worker in exactly one of the steps that count."""
    first_step_seconds: float
    recovery_seconds: float
    """From the loss to the end of the next step."""
    seconds: float
    """Of the placement and the run."""
    peak_bytes: int
    """Of all processes together: PSS, each page once."""
    worker_bytes: int
    """Of one worker at that time, on average."""


def rehearse(config: TrainConfig, nodes: Sequence[Node]) -> Rehearsal:
    """Rehearse a run whose workers are to go on `nodes`. In the main thread only; nothing of it is left behind.

    Raises:
        RunFailed: the workers do not go where they should, or the run did not survive the loss; with the cause.
    """
    if ray.is_initialized():
        raise RuntimeError("A rehearsal starts clusters of its own, and this process has joined one already.")
    begun = time.monotonic()
    placement = place(config, nodes)
    logger.info("All %d workers are placed: %s on a node.", config.scaling.workers, _counts(placement.workers))
    environment = {
        "OMP_NUM_THREADS": "1",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_SECONDS),
        VAL_DATA: "",  # its categories are not those of the drawn pictures
    }
    with simulated([], environment) as cluster:
        small = rehearsed(config, cluster.folder)
        per_node = ceil(small.scaling.workers / 2)
        node = Node(int(per_node * small.scaling.cpus_per_worker))
        data_cpus = int(small.scaling.data_cpus)
        cluster.add(Node(data_cpus))
        if data_cpus > FREE_DATA_CPUS:
            cluster.occupy(data_cpus - FREE_DATA_CPUS)
        handles = [cluster.add(node) for _ in range(ceil(small.scaling.workers / per_node))]
        _draw(cluster.folder, small.data.train)
        with _Drive(small, cluster.family) as drive:
            facts = _lose_a_node(drive, cluster, handles[-1], node)
        peak = cluster.family.peak
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


def place(config: TrainConfig, nodes: Sequence[Node]) -> Placement:
    """Ask Ray for room for all workers of `config` on `nodes`, just as Ray Train would, but start none.

    Raises:
        RunFailed: there is no room, or the workers are spread over more nodes than need be, or the data is left short.
    """
    begun = time.monotonic()
    scaling = config.scaling
    bundle = per_worker(config)
    with simulated(nodes, {}):
        # Ray Train's own request: a bundle for each worker, and its default strategy.
        group = placement_group([bundle] * scaling.workers, strategy="PACK")
        if not group.wait(_PLACEMENT_SECONDS):
            raise RunFailed(
                f"Ray found no room for {scaling.workers} workers of {bundle} on {len(nodes)} nodes within "
                f"{_PLACEMENT_SECONDS} s. Use larger nodes, or more of them."
            )
        workers = bundles_per_node()
        left = ray.cluster_resources()["CPU"] - scaling.workers * bundle["CPU"]
        remove_placement_group(group)
    expected = expected_placement(config, nodes)
    if workers != expected:
        raise RunFailed(
            f"The workers were to be placed {_counts(expected)} on a node, and Ray placed {_counts(workers)}."
        )
    if left + 1e-6 < scaling.data_cpus:
        raise RunFailed(f"{left:g} CPUs are left for the data tasks, which are to have {scaling.data_cpus:g}.")
    return Placement(workers=workers, data_cpus=left, seconds=time.monotonic() - begun)


def expected_placement(config: TrainConfig, nodes: Sequence[Node]) -> tuple[int, ...]:
    """Fill one node after another, the one with most room first; return the workers on each that has any."""
    bundle = per_worker(config)
    room = [int(node.cpus / bundle["CPU"] + 1e-6) for node in nodes]
    if "GPU" in bundle:
        room = [min(limit, node.gpus) for limit, node in zip(room, nodes, strict=True)]
    placed, rest = [], config.scaling.workers
    for limit in sorted(room, reverse=True):
        placed.append(min(limit, rest))
        rest -= placed[-1]
    return tuple(workers for workers in placed if workers)


def rehearsed_workers(config: TrainConfig) -> int:
    """Return the most workers, up to WORKERS and the recipe's, that give the recipe's global batch."""
    micro_batches = config.run.global_batch // config.run.micro_batch
    return max(n for n in range(1, min(WORKERS, config.scaling.workers) + 1) if micro_batches % n == 0)


def rehearsed(config: TrainConfig, folder: Path) -> TrainConfig:
    """Return what is run in place of `config`: all of it but what is replaced here. Its places are in `folder`."""
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
            # Ray places the workers by their CPUs: none shall find room on the node of the data.
            cpus_per_worker=max(FREE_DATA_CPUS + 1, ceil(config.scaling.cpus_per_worker)),
            data_cpus=workers,
            threads=1,
        ),
        checkpoint=replace(config.checkpoint, every=EVERY),
        evaluation=replace(config.evaluation, every=0),
        tracking=replace(config.tracking, uri=f"sqlite:///{folder}/mlflow.db", log_every=1),
    )


def steps_redone(lines: Iterable[Mapping[str, Any]], config: TrainConfig) -> int:
    """Count the steps done twice, having checked that every position was taken once by the steps that count.

    Args:
        lines: of the run's samples.jsonl.

    Raises:
        RunFailed: a sample was lost, taken twice, or replaced by another when its step was done again.
    """
    taken: dict[tuple[int, int], Mapping[str, Any]] = {}
    redone = set()
    for line in lines:
        key = step, rank = line["step"], line["rank"]
        if key in taken:
            redone.add(step)
            if taken[key] != line:
                raise RunFailed(f"Worker {rank} did step {step} again with other images: {taken[key]}, then {line}.")
        taken[key] = line
    positions = Counter(position for line in taken.values() for position in line["positions"])
    expected = Counter(range((config.run.steps or 0) * config.run.global_batch))
    if positions != expected:
        lost, surplus = sorted((expected - positions).elements()), sorted((positions - expected).elements())
        raise RunFailed(f"The loss of a node cost samples: positions {lost} were never taken, {surplus} too often.")
    return len(redone)


def report(result: Rehearsal) -> str:
    """Return a rehearsal as lines in the style of a plan's."""
    recipe, config = result.recipe, result.config
    asked, scaling = recipe.scaling, config.scaling
    replaced = ["the demo's model", "drawn pictures and their sizes", f"{FREE_DATA_CPUS} data task at a time"]
    if scaling.workers != asked.workers:
        replaced.insert(0, f"{scaling.workers} of {asked.workers} workers")
    if scaling.device != asked.device:
        replaced.append(f"{scaling.device} for {asked.device}")
    if scaling.cpus_per_worker != asked.cpus_per_worker:
        replaced.append(f"{scaling.cpus_per_worker:g} CPUs for each worker")
    rows = {
        "placement": f"{asked.workers} workers, {_counts(result.placement.workers)} on a node; "
        f"{result.placement.data_cpus:g} CPUs left for the data's {asked.data_cpus:g}; "
        f"{result.placement.seconds:.0f} s",
        "run": f"{config.plan} accumulated, {_counts(result.before)} on a node, {config.run.steps} steps",
        "in it replaced": f"{', '.join(replaced)}, a checkpoint every {config.checkpoint.every} steps, no quick PQ",
        "loss of a node": f"after step {result.lost_at}; went on from step {result.resumed_at} with "
        f"{_counts(result.after)} on a node, {result.redone} steps done again, attempt {result.attempts} finished",
        "its cause": f"{result.cause.rstrip('.')}, says the run's ledger",
        "samples": f"{result.positions} positions, each taken once: none lost, none twice",
        "time": f"{result.first_step_seconds:.0f} s to the first step, {result.recovery_seconds:.0f} s from the loss "
        f"to the next step, {result.seconds:.0f} s in all",
        "memory": f"{result.peak_bytes / 1e9:.1f} GB at the peak (PSS of all processes), "
        f"{result.worker_bytes / 1e9:.2f} GB of each worker",
    }
    return "\n".join(f"{name:<18}{'rehearsed':<11}{text}" for name, text in rows.items())


class _Drive:
    """`fit` in a process of its own, as in a job, and what its run's folder tells of it."""

    def __init__(self, config: TrainConfig, family: Family) -> None:
        self.config, self.run = config, locate(config.run.storage) / config.run.name
        context = multiprocessing.get_context("spawn")
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_drive, args=(config, answer), name="driver", daemon=True)
        self._process.start()
        answer.close()
        self._deadline = time.monotonic() + _RUN_SECONDS

    def __enter__(self) -> "_Drive":
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.join()

    def until(self, what: str, condition: Callable[[], bool]) -> float:
        """Wait until `condition`, and return when that was.

        Raises:
            RunFailed: the run ended or took too long before.
        """
        while not condition():
            if self._answer.poll(_POLL_SECONDS) and not condition():
                raise RunFailed(f"The rehearsal ended before {what}. {self._last_words()}")
            if time.monotonic() > self._deadline:
                raise RunFailed(f"The rehearsal still waited for {what} after {_RUN_SECONDS} s.")
        return time.monotonic()

    def finish(self) -> None:
        """Wait for the end of the run.

        Raises:
            RunFailed: it failed or took too long.
        """
        self.until("the end of the run", self._answer.poll)
        if cause := self._last_words():
            raise RunFailed(f"The rehearsal failed. {cause}")

    def _last_words(self) -> str:
        try:
            return self._answer.recv()
        except EOFError:
            return "Its driver died."

    def samples(self) -> list[dict[str, Any]]:
        """Return the lines of the run's samples.jsonl, as far as it is written."""
        place = Path(self.run.path) / "samples.jsonl"
        return [json.loads(line) for line in place.read_text().split("\n")[:-1]] if place.exists() else []

    def done(self, step: int, times: int = 1) -> bool:
        """Tell whether all workers have done a step, counted from 0, so many times."""
        return sum(line["step"] == step for line in self.samples()) >= times * self.config.scaling.workers

    def starts(self) -> list[dict[str, Any]]:
        """Return the ledger's starts of attempts."""
        return [event for event in ledger.read(self.run) if event["event"] == "start"]


def _drive(config: TrainConfig, answer: Connection) -> None:
    try:
        # Nor do the workers' complaints about a node that was killed on purpose help anybody.
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level=logging.ERROR)
        with ray_is_quiet():
            result = fit(config)
        answer.send("" if result.status == "finished" else f"It {result.status} at step {result.step}.")
    except Exception as error:
        answer.send(f"{type(error).__name__}: {error}")


def _lose_a_node(drive: _Drive, cluster: Simulation, victim: Any, like: Node) -> dict[str, Any]:
    """Follow a run through the loss of `victim` and its replacement to its end; return the facts."""
    begun = time.monotonic()
    first_step = drive.until("the first step", lambda: drive.done(0))
    before = bundles_per_node()
    logger.info("Training on simulated nodes, %s workers on a node.", _counts(before))
    drive.until(f"step {_LOSS}", lambda: drive.done(_LOSS - 1) and _saved(drive.run, EVERY))
    lost = time.monotonic()
    cluster.lose(victim)
    lost_at = 1 + max(line["step"] for line in drive.samples())
    logger.info("A node is lost after step %d, and replaced.", lost_at)
    cluster.add(like)
    drive.until("another attempt", lambda: len(drive.starts()) > 1)
    resumed_at = drive.starts()[1]["step"]
    recovered = drive.until(f"step {resumed_at + 1} again", lambda: drive.done(resumed_at, times=2))
    after = bundles_per_node()
    logger.info("Training goes on from step %d.", resumed_at)
    drive.finish()
    if before != after:
        raise RunFailed(f"{_counts(before)} workers were on a node before one was lost, and {_counts(after)} after.")
    starts, samples = drive.starts(), drive.samples()
    return {
        "before": before,
        "after": after,
        "lost_at": lost_at,
        "resumed_at": resumed_at,
        "redone": steps_redone(samples, drive.config),
        "attempts": len(starts),
        "cause": next(event["cause"] for event in ledger.read(drive.run) if event["event"] == "failure"),
        "positions": STEPS * drive.config.run.global_batch,
        "first_step_seconds": first_step - begun,
        "recovery_seconds": recovered - lost,
        "pids": {pid for event in starts for pid in event["pids"]},
    }


def _saved(run: Location, step: int) -> bool:
    """Tell whether a checkpoint is whole: its manifest is written last."""
    return (checkpoint.folder(run, step) / "manifest.json").exists()


def _draw(folder: Path, train: str) -> None:
    draw_dataset(folder / "coco", SyntheticConfig(split="train", num_images=_PICTURES, max_side=64))
    pack(CocoLayout.find(str(folder / "coco"), "train"), train, PackConfig())


def _counts(workers: Sequence[int]) -> str:
    return " + ".join(map(str, workers))
