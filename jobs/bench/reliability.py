"""Measure what reliability costs while nothing fails, and what a failure costs, on this machine.

python jobs/bench/reliability.py

torchrun: steps per second of a run with two workers, against torchrun with the same model and batches. checkpoint: the
slowest step around a checkpoint of R50, which is written in the background. recovery: from the death of a worker to the
next step, early in a run and late. mlflow: the steps while MLflow is away, and whether it has every point afterwards.

Nothing else should run on the machine.
"""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal

from jobs.shared.cli import parse, run
from pipelines.config.recipes import DEMO, R50_MMDET
from pipelines.config.train import TrainConfig
from pipelines.data.augment_config import AugmentConfig

Part = Literal["torchrun", "checkpoint", "recovery", "mlflow"]

WINDOW = 10
"""Steps of a rate of the part torchrun: they include what happens only once in a while."""
LATE = 500_000
"""A step near the end of a published run."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Measure what reliability costs while nothing fails, and what a failure costs, on this machine."""

    parts: tuple[Part, ...] = ("torchrun", "checkpoint", "recovery", "mlflow")
    """Parts to run."""
    rounds: int = 3
    """Pairs of runs in the part torchrun; kills early and kills late in the part recovery."""
    steps: int = 70
    """Steps of each run in the part torchrun, of which the first 20 do not count."""
    side: int = 160
    """Side of an image in pixels in the part torchrun."""
    outage: float = 60
    """Seconds for which MLflow is away."""


def main() -> None:
    flags = parse(Reliability, Reliability(), __doc__)
    from pipelines.cluster.session import session

    logging.basicConfig(level=logging.ERROR)
    os.environ.update(OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    measures: dict[Part, Callable[[Reliability, Path], str]] = {
        "torchrun": _torchrun,
        "checkpoint": _checkpoint,
        "recovery": _recovery,
        "mlflow": _mlflow,
    }
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start.", flush=True)
    with tempfile.TemporaryDirectory(prefix="reliability-", ignore_cleanup_errors=True) as folder, session():
        for part in flags.parts:
            print(f"{part}: {measures[part](flags, Path(folder, part))}", flush=True)
    print(f"Load at the end: {os.getloadavg()[0]:.1f}.")


def _config(folder: Path, base: TrainConfig, side: int, workers: int, steps: int) -> TrainConfig:
    """Draw a data set of images with `side`; return a configuration without checkpoints and quick PQ."""
    from pipelines.data.pack import PackConfig
    from pipelines.data.synthetic import SyntheticConfig, draw_and_pack

    if not (folder / "train").exists():
        draw_and_pack(folder, SyntheticConfig(num_images=64, min_side=side, max_side=side), PackConfig())
    return replace(
        DEMO,
        model=replace(base.model, num_classes=7),  # of the drawn images
        data=replace(
            DEMO.data,
            train=str(folder / "train"),
            val="",
            augment=AugmentConfig(short_sides=(side,), long_side=side, crop_probability=0),
        ),
        run=replace(
            DEMO.run,
            name="run",
            storage=str(folder / "runs"),
            steps=steps,
            global_batch=workers,
            micro_batch=1,
        ),
        scaling=replace(DEMO.scaling, cpus_per_worker=0.5, data_cpus=1, threads=1, reduction="fast"),
        optimizer=replace(DEMO.optimizer, lr=1e-6),  # random weights, and no warm-up
        checkpoint=replace(DEMO.checkpoint, every=10**6),
        evaluation=replace(DEMO.evaluation, every=0),
        tracking=replace(DEMO.tracking, log_every=1, uri=f"sqlite:///{folder}/mlflow.db"),
    ).with_workers(workers)


def _seconds(result: Any, global_batch: int) -> dict[int, float]:
    """Return the seconds per step, by the steps done, from the rates in MLflow."""
    return {step: global_batch / rate for step, rate in result.mlflow_run.history("images_per_second")}


# ---- against torchrun


def _torchrun(flags: Reliability, folder: Path) -> str:
    from pipelines.config.serialize import to_dict
    from pipelines.data.manifest import open_pack
    from pipelines.data.stream import training_batches
    from pipelines.training import fit

    config = _config(folder, R50_MMDET, flags.side, 2, flags.steps)
    config = replace(config, tracking=replace(config.tracking, log_every=WINDOW))
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    for rank in range(2):
        samples = open_pack(config.data.train)
        batches = training_batches(
            samples, config.sample_order(samples), rank=rank, first_step=0, last_step=flags.steps, samples_per_task=16,
            cpus=1, object_store=10**9, prefetch=1,
        )  # fmt: skip
        (folder / f"batches_{rank}.pickle").write_bytes(pickle.dumps(list(batches)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "jobs.bench.shared.plain_loop", str(folder),
    ]  # fmt: skip
    ours: list[float] = []
    plain: list[float] = []
    for turn in range(flags.rounds):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times = json.loads((folder / "times.json").read_text())
        plain += [(times[step] - times[step - WINDOW]) / WINDOW for step in range(30, flags.steps + 1, WINDOW)]
        result = fit(replace(config, run=replace(config.run, name=f"run-{turn}")))
        ours += [seconds for step, seconds in _seconds(result, 2).items() if step >= 30 and step % WINDOW == 0]
    return (
        f"R50, 2 workers, {flags.side}x{flags.side}, {flags.rounds} pairs of runs in turn, seconds per step over "
        f"{WINDOW} steps: torchrun {_spread(plain)}, run {_spread(ours)}; {median(ours) / median(plain) - 1:+.1%}"
    )


# ---- checkpoints


def _checkpoint(flags: Reliability, folder: Path) -> str:
    from pipelines.training import fit

    every, steps = 8, 40
    config = _config(folder, R50_MMDET, 512, 1, steps)
    seconds = _seconds(fit(replace(config, checkpoint=replace(config.checkpoint, every=every))), 1)
    # A state is copied after the step that was logged, and then written: both count to the step after.
    around = {step: seconds[step] for step in seconds if every < step and (step - 1) % every in (0, 1)}
    usual = median(value for step, value in seconds.items() if step > 2)
    first = max(around[step] for step in (every + 1, every + 2))
    later = max(value for step, value in around.items() if step > every + 2)
    other = max(value for step, value in seconds.items() if step > 2 and step not in around)
    return (
        f"R50, 1 worker with 1 thread, 512x512, {len(around)} steps after {steps // every - 1} checkpoints: median of "
        f"all {usual:.2f} s; slowest after the first checkpoint, which takes new memory, {first:.2f} s, "
        f"{first / usual:.2f} times; after a later one {later:.2f} s, {later / usual:.2f} times; "
        f"slowest other step {other:.2f} s"
    )


# ---- recovery


def _recovery(flags: Reliability, folder: Path) -> str:
    from pipelines.checkpoints.state import load, newest, save, step_folder
    from pipelines.storage import locate
    from pipelines.training import goodput
    from pipelines.training.preflight import prepare_run

    config = _config(folder, DEMO, 48, 2, 60)
    config = replace(config, checkpoint=replace(config.checkpoint, every=10))
    early: list[dict[str, float]] = []
    for turn in range(flags.rounds):
        early.append(_killed(replace(config, run=replace(config.run, name=f"early-{turn}")), 25))
    state = newest(locate(folder / "runs" / "early-0"), load)
    assert state is not None
    late: list[dict[str, float]] = []
    for turn in range(flags.rounds):
        name = f"late-{turn}"
        changed = replace(config, run=replace(config.run, name=name, steps=LATE + 60))
        run_folder = locate(folder / "runs" / name)
        # What a run that came this far has: its checkpoint, and the config.json that the next start compares.
        save(step_folder(run_folder, LATE), replace(state, step=LATE), changed, _taxonomy(config))
        earlier = json.loads(Path(folder, "runs", "early-0", "config.json").read_text())
        record = {**prepare_run(changed).record, "mlflow_run_id": earlier["mlflow_run_id"]}
        Path(run_folder.path, "config.json").write_text(json.dumps(record))
        late.append(_killed(changed, LATE + 25))
    lines = [f"demo, 2 workers, {flags.rounds} kills each; seconds from the death to the next step, median"]
    for name, found in (("step 25", early), (f"step {LATE + 25:,}", late)):
        parts = {part: median(one.get(part, 0.0) for one in found) for part in goodput.RECOVERY}
        listed = ", ".join(f"{part.replace('_', ' ')} {seconds:.2f}" for part, seconds in parts.items())
        lines.append(f"  {name:<14} {median(sum(one.values()) for one in found):6.2f} ({listed})")
    return "\n".join(lines)


def _taxonomy(config: TrainConfig) -> Any:
    from pipelines.data.manifest import open_pack

    return open_pack(config.data.train).taxonomy


def _killed(config: TrainConfig, step: int) -> dict[str, float]:
    """Run, and kill a worker after `step`; return the seconds of the parts of the recovery."""
    from pipelines.storage import locate
    from pipelines.training import fit, goodput, ledger

    run_folder = locate(config.run.storage) / config.run.name
    config = replace(config, run=replace(config.run, sample_log=True))
    log = Path(run_folder.path, "samples.jsonl")
    killed: list[float] = []

    def kill() -> None:
        while True:
            if log.exists() and any(json.loads(line)["step"] >= step for line in log.read_text().split("\n")[:-1]):
                break
            time.sleep(0.01)
        pids = [event for event in ledger.read(run_folder) if event["event"] == "start"][-1]["pids"]
        os.kill(pids[1], signal.SIGKILL)
        killed.append(time.time())

    threading.Thread(target=kill, daemon=True).start()
    fit(config)
    attempt = goodput.account(ledger.read(run_folder)).attempts[0]
    assert attempt.recovery is not None
    # The last sign of life may be a second older than the death.
    failed = next(event for event in ledger.read(run_folder) if event["event"] == "failure")
    return {**attempt.recovery, "detect": failed["time"] - killed[0]}


# ---- MLflow


def _mlflow(flags: Reliability, folder: Path) -> str:
    from jobs.bench.shared.trial_environment import mlflow_server
    from pipelines.training import fit

    with mlflow_server() as server, ThreadPoolExecutor(1) as pool:
        config = _config(folder, DEMO, 96, 1, 10**6)
        config = replace(config, tracking=replace(config.tracking, uri=server.url))
        probe = fit(replace(config, run=replace(config.run, name="probe", steps=60)))
        step_seconds = median(_seconds(probe, 1).values())
        steps = int(3.5 * flags.outage / step_seconds)
        future = pool.submit(fit, replace(config, run=replace(config.run, steps=steps)))
        run_folder, began = folder / "runs" / "run", time.monotonic()
        while not (run_folder / "ledger.jsonl").exists():
            if future.done() or time.monotonic() - began > 300:
                raise RuntimeError(f"The run does not start. {future.exception() if future.done() else ''}")
            time.sleep(0.1)
        time.sleep(1.2 * flags.outage)
        spans = [time.time()]
        server.mode = "refuse"
        time.sleep(flags.outage)
        server.mode = "ok"
        spans.append(time.time())
        result = future.result()
        stamps = _stamps(result)
        seconds = _seconds(result, 1)
        before = [seconds[step] for step, stamp in stamps.items() if stamp < spans[0] and step > 50]
        during = [seconds[step] for step, stamp in stamps.items() if spans[0] <= stamp < spans[1]]
        missing = set(range(1, steps + 1)) - {step for step, _ in result.mlflow_run.history("loss/total")}
    return (
        f"demo, 1 worker, away for {flags.outage:.0f} s: {len(missing)} of {steps} points lost; step before and "
        f"during, ms: median {1000 * median(before):.1f} and {1000 * median(during):.1f}, 95th percentile "
        f"{1000 * _p95(before):.1f} and {1000 * _p95(during):.1f} ({_p95(during) / _p95(before) - 1:+.1%})"
    )


def _stamps(result: Any) -> dict[int, float]:
    """Return when each step was logged, in seconds since 1970."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(result.mlflow_run.uri)
    return {
        point.step: point.timestamp / 1000
        for point in client.get_metric_history(result.mlflow_run.run_id, "images_per_second")
    }


def _p95(values: Sequence[float]) -> float:
    return quantiles(values, n=20)[-1]


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    run(main)
