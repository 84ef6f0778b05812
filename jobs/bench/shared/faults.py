"""What jobs/bench/chaos.py does to a run: the kinds of faults."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.shared.faulty_server import Mode
from jobs.bench.shared.trial_environment import EVERY, STEPS, Servers, wait
from pipelines.checkpoints.state import step_folder, steps_saved
from pipelines.cluster.simulated import Node, SimulatedCluster
from pipelines.config.serialize import to_dict
from pipelines.config.train import TrainConfig
from pipelines.storage import locate
from pipelines.training import ledger


@dataclass
class Trial:
    """A run to break, and what was done to it."""

    chance: random.Random
    config: TrainConfig
    cluster: SimulatedCluster
    servers: Servers
    longest: float
    done: list[str] = field(default_factory=list)
    """What was broken, in words."""
    refused: int | None = None
    """Requests that a server did not answer; None if no server was to fail."""

    @property
    def folder(self) -> Path:
        """The run's folder; a local one."""
        return Path(self.config.run.storage, self.config.run.name)

    def events(self) -> list[dict[str, Any]]:
        return ledger.read(locate(self.config.run.storage) / self.config.run.name)

    def attempt(self, number: int) -> dict[str, Any]:
        """Wait until the workers of an attempt have started, and return that event."""
        return wait(lambda: [e for e in self.events() if e["event"] == "start"][number - 1 :], f"attempt {number}")[0]

    def reached(self, step: int) -> None:
        """Wait until the run has done a step."""
        wait(lambda: any(line["step"] >= step for line in self.samples()), f"step {step}")

    def samples(self) -> list[dict[str, Any]]:
        log = self.folder / "samples.jsonl"
        return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []

    def step(self, first: int = 1, last: int = STEPS - 2) -> int:
        return self.chance.randint(first, last)

    def kill(self, pid: int, what: str) -> None:
        os.kill(pid, signal.SIGKILL)  # a trial in which there is nothing left to kill fails
        self.done.append(what)


# Each function is called while the run is on, and returns when it has done its work.


def kill_worker(trial: Trial) -> None:
    started, step = trial.attempt(1), trial.step()
    trial.reached(step)
    rank = trial.chance.randrange(started["workers"])
    trial.kill(started["pids"][rank], f"SIGKILL of worker {rank} at step {step}")


def kill_in_recovery(trial: Trial) -> None:
    """A second kill hits the workers of the next attempt as soon as there are any, or after a few steps."""
    kill_worker(trial)
    before = {process.pid for process in worker_processes()}
    if trial.chance.random() < 0.5:
        victim = wait(lambda: [p for p in worker_processes() if p.pid not in before], "new workers")[0]
        trial.kill(victim.pid, "SIGKILL of a worker while it starts")
    else:
        started = trial.attempt(2)
        rank = trial.chance.randrange(started["workers"])
        trial.kill(started["pids"][rank], f"SIGKILL of worker {rank} right after the restart")


def kill_during_write(trial: Trial) -> None:
    """Rank 0 dies when a checkpoint has some of its files."""
    started = trial.attempt(1)
    step = EVERY * trial.chance.randint(1, STEPS // EVERY - 1)
    stage = trial.chance.choice(["model.safetensors", "state.pt", "config.json", "manifest.json"])
    file = trial.folder / "checkpoints" / f"step_{step:08d}" / stage
    temporary = f".{stage}."  # where a file is written before it gets its name

    def seen() -> bool:
        try:
            return file.exists() or any(name.startswith(temporary) for name in os.listdir(file.parent))
        except FileNotFoundError:
            return False

    wait(seen, f"{stage} of step {step}", poll=0)
    trial.kill(started["pids"][0], f"SIGKILL of worker 0 while {stage} of step {step} is written")


def freeze_worker(trial: Trial) -> None:
    """A worker stops without dying: only the watchdog can tell."""
    started, step = trial.attempt(1), trial.step(4)
    trial.reached(step)
    rank = trial.chance.randrange(started["workers"])
    os.kill(started["pids"][rank], signal.SIGSTOP)
    trial.done.append(f"SIGSTOP of worker {rank} at step {step}")
    trial.attempt(2)


def lose_node(trial: Trial) -> None:
    """A node's raylet and all its processes die; another node comes."""
    trial.attempt(1)
    step = trial.step(last=STEPS - 6)
    trial.reached(step)
    nodes, index = _node_with_workers(trial)
    trial.cluster.lose(nodes[index])
    trial.done.append(f"loss of a node at step {step}")
    nodes[index] = trial.cluster.add(Node(1))


def kill_raylet(trial: Trial) -> None:
    """Only the raylet of a node dies; another node comes."""
    trial.attempt(1)
    step = trial.step(last=STEPS - 6)
    trial.reached(step)
    nodes, index = _node_with_workers(trial)
    broken = nodes[index]
    trial.kill(broken.all_processes["raylet"][0].process.pid, f"SIGKILL of a raylet at step {step}")
    nodes[index] = trial.cluster.add(Node(1))
    trial.attempt(2)
    trial.cluster.lose(broken)  # what is left of it


def shrink(trial: Trial) -> None:
    """A node is lost, and the run goes on with half of its workers; another node comes afterwards."""
    trial.attempt(1)
    step = trial.step(last=STEPS - 6)
    trial.reached(step)
    nodes, index = _node_with_workers(trial)
    trial.cluster.lose(nodes[index])
    try:
        if trial.attempt(2)["workers"] != 2:
            raise RuntimeError("The run did not go on with two workers.")
        trial.done.append(f"loss of a node at step {step}, on with 2 workers")
    finally:
        nodes[index] = trial.cluster.add(Node(1))


def drain_node(trial: Trial) -> None:
    """A node is announced to leave, and another one comes."""
    trial.attempt(1)
    step = trial.step(last=4)  # the command and the driver take a while to notice, and then there must be steps left
    trial.reached(step)
    nodes, index = _node_with_workers(trial)
    leaving = nodes[index]
    nodes[index] = trial.cluster.add(Node(1))
    command = [
        str(Path(sys.executable).with_name("ray")), "drain-node", "--address", trial.cluster.address,
        "--node-id", leaving.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "chaos", "--deadline-remaining-seconds", "3600",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    trial.done.append(f"notice that a node leaves at step {step}")
    wait(lambda: [e for e in trial.events() if e["event"] in ("restart", "end")], "the end of the attempt")
    trial.cluster.lose(leaving)


def _node_with_workers(trial: Trial) -> tuple[list[Any], int]:
    """Return the nodes that may be lost, and the index of one that has workers now."""
    nodes = trial.cluster.nodes  # pyright: ignore[reportAttributeAccessIssue] -- set by `world`
    pids = [event for event in trial.events() if event["event"] == "start"][-1]["pids"]
    raylets = {psutil.Process(pid).ppid() for pid in pids}
    of_workers = [index for index, node in enumerate(nodes) if node.all_processes["raylet"][0].process.pid in raylets]
    return nodes, trial.chance.choice(of_workers)


def fail_storage(trial: Trial) -> None:
    """The storage fails while a checkpoint is saved, while data or the images of the quick PQ are read, or between."""
    trial.attempt(1)
    step = EVERY * trial.chance.randint(1, STEPS // EVERY - 1)
    moments = {
        f"when step {step} is saved": f"(PUT|POST) .*/step_{step:08d}/",
        "when data is read": "GET /chaos/train/",
        "when the quick PQ reads its images": "GET /chaos/val/",
        f"when the manifest of step {step} is written": f"(PUT|POST) .*/step_{step:08d}/manifest.json",
    }
    moment = trial.chance.choice(list(moments))
    _storage_away(trial, moment, moments[moment])


def fail_storage_in_recovery(trial: Trial) -> None:
    """The storage is away when a killed worker's successor wants to restore."""
    started = trial.attempt(1)
    step = EVERY * trial.chance.randint(1, STEPS // EVERY - 2)
    newest = step_folder(locate(trial.config.run.storage) / trial.config.run.name, step) / "manifest.json"
    wait(newest.exists, f"checkpoint of step {step}", poll=0.2)
    rank = trial.chance.randrange(started["workers"])
    trial.kill(started["pids"][rank], f"SIGKILL of worker {rank} after step {step} was saved")
    _storage_away(trial, "when the next attempt restores", "GET .*/checkpoints/step_.*(safetensors|state.pt)")


def _storage_away(trial: Trial, moment: str, request: str) -> None:
    modes: list[Mode] = ["503", "silent", "refuse"]
    mode, server = trial.chance.choice(modes), trial.servers.storage
    seconds = trial.chance.uniform(5, trial.longest)
    before = server.counts[mode]
    server.fail_at(request, mode)
    if not server.wait_until(mode, timeout=60):  # nothing of that kind is left to do
        moment, server.mode = "toward the end", mode
    time.sleep(seconds)
    server.mode = "ok"
    trial.refused = server.counts[mode] - before
    trial.done.append(f"the storage answers {mode} for {seconds:.0f} s {moment}")


def stop_mlflow(trial: Trial) -> None:
    trial.attempt(1)
    step = trial.step()
    trial.reached(step)
    seconds = trial.chance.uniform(5, trial.longest)
    before = trial.servers.mlflow.counts["refuse"]
    trial.servers.mlflow.mode = "refuse"
    time.sleep(seconds)
    trial.servers.mlflow.mode = "ok"
    trial.refused = trial.servers.mlflow.counts["refuse"] - before
    trial.done.append(f"MLflow refuses connections for {seconds:.0f} s at step {step}")


def kill_driver(trial: Trial) -> None:
    """The driver is a process of its own; it is killed, and the same command is run again."""
    _interrupt_driver(trial, "SIGKILL of the driver")


def change_workers(trial: Trial) -> None:
    """The driver is killed, and the run is resumed with another number of workers."""
    _interrupt_driver(trial, "SIGKILL of the driver")
    before = trial.config.scaling.max_workers
    workers = trial.chance.choice([n for n in (1, 2, 4) if n != before])
    trial.config = trial.config.with_workers(workers)
    trial.done.append(f"resumed with {workers} workers instead of {before}")


def truncate_newest(trial: Trial) -> None:
    """The newest checkpoint loses its end while no driver is running."""
    _interrupt_driver(trial, "SIGKILL of the driver", first=2 * EVERY + 1)
    run = locate(str(trial.folder))
    step = steps_saved(run)[-1]
    folder = Path(step_folder(run, step).path)
    names = [name for name in ("model.safetensors", "state.pt", "manifest.json") if (folder / name).exists()]
    file = folder / trial.chance.choice(names)
    content = file.read_bytes()
    file.write_bytes(content[: trial.chance.randrange(len(content))])
    trial.done.append(f"{file.name} of step {step} is truncated")


def _interrupt_driver(trial: Trial, what: str, first: int = 1) -> None:
    step = trial.step(first)
    with _process(trial.config, os.environ) as driver:
        trial.attempt(1)
        trial.reached(step)
        driver.kill()
        driver.wait()
    trial.done.append(f"{what} at step {step}")


def kill_tree(trial: Trial) -> None:
    """The driver with a Ray of its own dies with all its processes."""
    step = trial.step()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    with _process(trial.config, environment) as driver:
        trial.attempt(1)
        trial.reached(step)
        family = psutil.Process(driver.pid).children(recursive=True)
        for process in [psutil.Process(driver.pid), *family]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        driver.wait()
        psutil.wait_procs(family, timeout=30)
    trial.done.append(f"SIGKILL of the driver, Ray and all workers at step {step}")


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    act: Callable[[Trial], None]
    before: bool = False
    """Whether it has a driver of its own, after whose end the run is resumed."""
    remote: bool = False
    """Whether the run is on S3."""
    mlflow: bool = False
    """Whether the run logs to a server."""
    workers: tuple[int | str, ...] = (2, 4)
    restarts: int = 1
    """Minimum number of restarts; 0: there must be none."""
    bound: int | None = EVERY
    """Maximum of the steps that one restart may repeat; None: while the storage is away, any number."""


KINDS = {
    "worker": Kind(kill_worker),
    "driver": Kind(kill_driver, before=True, workers=(1, 2, 4)),
    "storage": Kind(fail_storage, remote=True, workers=(1, 2), restarts=0),
    "recovery": Kind(kill_in_recovery),
    "write": Kind(kill_during_write),
    "workers": Kind(change_workers, before=True, workers=(1, 2, 4)),
    "node": Kind(lose_node, workers=(4,)),
    "storage-restore": Kind(fail_storage_in_recovery, remote=True, workers=(2,), bound=None),
    "drain": Kind(drain_node, workers=(4,), bound=0),
    "truncated": Kind(truncate_newest, before=True, bound=2 * EVERY),
    "freeze": Kind(freeze_worker),
    "mlflow": Kind(stop_mlflow, mlflow=True, workers=(2,), restarts=0),
    "tree": Kind(kill_tree, before=True, workers=(1, 2)),
    "raylet": Kind(kill_raylet, workers=(4,)),
    "shrink": Kind(shrink, workers=("2:4",)),
}


@contextmanager
def _process(config: TrainConfig, environment: Any) -> Iterator["subprocess.Popen[bytes]"]:
    """Run `fit` in a process of its own."""
    code = (
        "import json, sys; from pipelines.config.serialize import from_dict; "
        "from pipelines.config.train import TrainConfig; from pipelines.training import fit; "
        "fit(from_dict(TrainConfig, json.loads(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, json.dumps(to_dict(config))]
    output = subprocess.DEVNULL
    process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def worker_processes() -> list[psutil.Process]:
    """Return the worker processes of Ray Train on this machine that this process's cluster started."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        with suppress(psutil.Error):
            if process.info["cmdline"] and process.info["cmdline"][0].startswith("ray::RayTrainWorker"):
                found.append(process)
    return found
