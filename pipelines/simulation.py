"""A Ray cluster whose nodes are processes of this machine: they claim any CPUs and GPUs, and can be lost.

It has a head without CPUs, as those of `cluster/` have, so that a driver and Ray Train's controller are on no node
that is lost. It shares nothing with other clusters of the machine, and goes with all that it started.
"""

import logging
import multiprocessing.resource_tracker
import os
import secrets
import signal
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.cluster_utils import Cluster
from ray.util import placement_group, placement_group_table

logger = logging.getLogger(__name__)

_TOKEN = secrets.token_hex(32)
"""Keeps other users of the machine and of its network out. Ray reads it once, so it is one for all clusters."""
_ON_DEMAND = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
"""Each node would start a Python process for every CPU that it claims."""
_OCCUPIED = "occupied"
_OCCUPY_SECONDS = 60
_SAMPLE_SECONDS = 3.0
_END_SECONDS = 15


class Node(NamedTuple):
    """What a node claims to have. Ray allows no fractions."""

    cpus: int
    gpus: int = 0


class Family:
    """The processes that this one starts from now on, theirs too: what memory they take, and their end."""

    def __init__(self) -> None:
        multiprocessing.resource_tracker.ensure_running()  # Python's own, which stays
        self._me = psutil.Process()
        self._others = set(self._me.children(recursive=True))
        self._alive: set[psutil.Process] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.peak: dict[int, int] = {}
        """Bytes by process id, this process's too, when together they took most: PSS, each page once."""

    def __enter__(self) -> "Family":
        threading.Thread(target=self._watch, name="memory", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self.sample()
        _, alive = psutil.wait_procs(self._alive, timeout=_END_SECONDS)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=_END_SECONDS)

    def sample(self) -> None:
        """Look who is there. Those seen once are known even when the process that started them is gone."""
        with self._lock:
            children = set(self._me.children(recursive=True)) - self._others
            self._alive = {process for process in self._alive | children if process.is_running()}
            bytes_now = {process.pid: _memory(process) for process in [self._me, *self._alive]}
            self.peak = max(self.peak, bytes_now, key=lambda sample: sum(sample.values()))

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            self.sample()


def _memory(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        info = process.memory_full_info()
        return getattr(info, "pss", info.uss)  # only Linux knows who shares a page
    return 0


@dataclass
class Simulation:
    """A simulated cluster, which this process has joined."""

    folder: Path
    """For files; it goes with the cluster."""
    family: Family
    _cluster: Cluster

    @property
    def address(self) -> str:
        """For drivers: $RAY_ADDRESS."""
        return str(self._cluster.address)

    def add(self, node: Node, **options: Any) -> Any:
        """Add a node and return its handle. The first one is the head. In the main thread only."""
        added = self._cluster.add_node(num_cpus=node.cpus, num_gpus=node.gpus, **options)
        # Ray would kill this one node only, and later.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return added

    def occupy(self, cpus: int) -> None:
        """Take CPUs of one node away, as if something ran on them. The cluster still counts them as its own."""
        if not placement_group([{"CPU": cpus}], name=_OCCUPIED).wait(_OCCUPY_SECONDS):
            raise RuntimeError(f"No node of the simulated cluster has {cpus} free CPUs.")

    def lose(self, handle: Any) -> None:
        """Kill a node's processes without a warning, as the loss of a machine does."""
        self.family.sample()
        self._cluster.remove_node(handle, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def simulated(nodes: Sequence[Node], environment: dict[str, str]) -> Iterator[Simulation]:
    """Start a head and `nodes` and join them, for as long as the block lasts. In the main thread only.

    Args:
        environment: variables for all that is started in the block; $RAY_ADDRESS leads to the cluster.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # /tmp: the names of sockets in the folder must stay below 104 characters.
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        _environment({"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, **environment}),
        Family() as family,
        ray_is_quiet(),
    ):
        simulation = Simulation(Path(folder), family, Cluster())
        os.environ.pop("RAY_ADDRESS", None)
        try:
            simulation.add(Node(0), include_dashboard=False, _system_config=dict(_ON_DEMAND))
            for node in nodes:
                simulation.add(node)
            os.environ["RAY_ADDRESS"] = simulation.address
            ray.init(address=simulation.address, log_to_driver=False, logging_level=logging.WARNING)
            yield simulation
        finally:
            ray.shutdown()
            simulation.shutdown()
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def ray_is_quiet() -> Iterator[None]:
    """Keep from stdout what Ray has to say of each lost node there, its raylet's last words and all."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    Config.initialize("")  # Ray read its part of the environment when it was imported
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        Config.initialize("")


def bundles_per_node() -> tuple[int, ...]:
    """Count the bundles of placement groups on each node of the joined cluster that has any, most first."""
    placed = Counter(
        node
        for group in placement_group_table().values()
        if group["state"] == "CREATED" and group["name"] != _OCCUPIED
        for node in group["bundles_to_node_id"].values()
    )
    return tuple(sorted(placed.values(), reverse=True))
