"""Trials of jobs/bench/chaos.py: run, break, and compare with the run that nobody touched."""

import hashlib
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from jobs.bench.shared.faults import KINDS, Trial
from jobs.bench.shared.trial_environment import GLOBAL, STEPS, TRIAL_SECONDS, Servers, remote_data
from pipelines.checkpoints.state import load, step_folder
from pipelines.cluster.simulated import SimulatedCluster
from pipelines.config.train import TrainConfig
from pipelines.storage import locate
from pipelines.training import fit


def attempt(
    seed: int,
    name: str,
    base: TrainConfig,
    reference: Callable[[float], dict[str, str]],
    cluster: SimulatedCluster,
    servers: Servers,
    longest: float,
) -> dict[str, Any]:
    """Make a trial; return its line.

    Args:
        name: of KINDS.
        reference: returns the hashes of the undisturbed run with this decay of averaged weights.
        longest: longest time in seconds that a server is away.
    """
    chance, kind = random.Random(seed), KINDS[name]
    ema = chance.choice([0.0, 0.9])
    expected = reference(ema)
    workers = chance.choice(kind.workers)
    config = replace(
        base,
        run=replace(
            base.run,
            name=f"trial-{seed}-{name}",
            storage=f"{servers.bucket}/runs" if kind.remote else base.run.storage,
            sample_log=not kind.remote,
        ),
        data=remote_data(base, servers) if kind.remote else base.data,
        optimizer=replace(base.optimizer, ema_decay=ema),
        tracking=replace(base.tracking, uri=servers.mlflow_uri) if kind.mlflow else base.tracking,
        scaling=replace(base.scaling, workers=workers, node_wait=2),
    )
    trial = Trial(chance, config, cluster, servers, longest)
    begun, problem, result = time.monotonic(), "", None
    try:
        if kind.before:
            kind.act(trial)
            future = _in_thread(lambda: fit(trial.config))
        else:
            future = _in_thread(lambda: fit(trial.config))
            kind.act(trial)
        result = future.result(timeout=TRIAL_SECONDS)
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"
        if isinstance(error, KeyboardInterrupt):
            raise
    finally:
        servers.storage.mode = servers.mlflow.mode = "ok"
    events = trial.events()
    found = hashes(trial.config) if result is not None else {}
    restarts = [event for event in events if event["event"] == "start"][1:]
    repeated = _repeated(trial.samples()) if not kind.remote else None
    lost = [event["lost_steps"] for event in restarts]
    line = {
        "seed": seed,
        "kind": name,
        "workers": workers,
        "ema": ema,
        "storage": "s3" if kind.remote else "local",
        "done": trial.done,
        "causes": [event.get("cause_class") for event in events if event["event"] in ("failure", "restart")],
        "attempts": len(restarts) + 1,
        "steps_lost": lost,
        "steps_repeated": repeated,
        "seconds_to_recover": _recovery(events),
        "samples_exactly_once": _exactly_once(trial.samples()) if not kind.remote else None,
        **found,
        "equal": found == expected,
        "seconds": round(time.monotonic() - begun, 1),
    }
    if kind.mlflow and result is not None:
        history = result.mlflow_run.history("loss/total")
        line["points_exactly_once"] = [step for step, _ in history] == list(range(1, STEPS + 1))
    line["broken"] = len(restarts) >= kind.restarts and trial.refused != 0
    line["needless_restart"] = bool(restarts) and not kind.restarts
    known = [n for n in [*lost, repeated if len(restarts) == 1 else None] if n is not None]
    line["within_bound"] = kind.bound is None or all(n <= kind.bound for n in known)
    checks = ("broken", "samples_exactly_once", "equal", "points_exactly_once", "within_bound")
    line["ok"] = not (problem or line["needless_restart"]) and all(line.get(check) is not False for check in checks)
    return {**line, "problem": problem} if problem else line


def hashes(config: TrainConfig) -> dict[str, str]:
    """Return hashes of the weights, averaged ones included, and of the optimizer state after the last step."""
    state = load(step_folder(locate(config.run.storage) / config.run.name, STEPS))
    return {"weights": _hash([state.model, state.averaged]), "optimizer": _hash(state.optimizer)}


def _hash(value: Any) -> str:
    digest = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            digest.update(item.contiguous().numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                digest.update(str(key).encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for each in item:
                add(each)
        else:
            digest.update(repr(item).encode())

    add(value)
    return digest.hexdigest()[:16]


def _exactly_once(lines: list[dict[str, Any]]) -> bool:
    """Return whether each position was used by one step, whichever worker computed it, and always the same image."""
    image_of: dict[int, tuple[int, int]] = {}
    for line in lines:
        for position, image in zip(line["positions"], line["image_ids"], strict=True):
            if image_of.setdefault(position, (line["step"], image)) != (line["step"], image):
                return False
    return sorted(image_of) == list(range(STEPS * GLOBAL))


def _repeated(lines: list[dict[str, Any]]) -> int:
    times = Counter((line["step"], position) for line in lines for position in line["positions"][:1])
    return len({step for (step, _), count in times.items() if count > 1})


def _recovery(events: list[dict[str, Any]]) -> list[float]:
    """Return the seconds from the end of each attempt to the restored state of the next."""
    pairs = pairwise(events)
    closing = ("failure", "restart")
    return [round(b["time"] - a["time"], 1) for a, b in pairs if a["event"] in closing and b["event"] == "start"]


def reference_of(base: TrainConfig, ema: float) -> dict[str, str]:
    """Run undisturbed; return the hashes of weights and optimizer state."""
    config = replace(
        base,
        run=replace(base.run, name=f"reference-{ema}"),
        optimizer=replace(base.optimizer, ema_decay=ema),
    ).with_workers(2)
    fit(config)
    return hashes(config)


def _in_thread(function: Callable[[], Any]) -> "Future[Any]":
    return ThreadPoolExecutor(1, "fit").submit(function)
