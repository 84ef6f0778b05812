"""A simulated Ray cluster: its nodes are processes of this machine, claim any CPUs and GPUs, and can be killed.

The head has no CPUs, like those in `cluster/`, so the driver and Ray Train's controller never run on a node that is
killed. The cluster is isolated from others on this machine and ends all processes that it started.
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
from contextlib import contextmanager, suppress
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
"""Keeps out other users of the machine and its network. Ray reads it once, so all clusters share it."""
_ON_DEMAND = {"enable_worker_prestart": False, "prestart_worker_first_driver": False}
"""Without these settings each node would start a Python process for every CPU that it claims."""
_OCCUPIED = "occupied"
_OCCUPY_SECONDS = 60
_SAMPLE_SECONDS = 3.0
_END_SECONDS = 15


class Node(NamedTuple):
    """The resources that a simulated node claims. Ray allows no fractions."""

    cpus: int
    gpus: int = 0


class ProcessTree:
    """All descendants that this process starts from now on: measures their memory, and ends them on exit."""

    def __init__(self) -> None:
        multiprocessing.resource_tracker.ensure_running()  # belongs to Python and is not ended
        self._me = psutil.Process()
        self._others = set(self._me.children(recursive=True))
        self._alive: set[psutil.Process] = set()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.peak: dict[int, int] = {}
        """Bytes by process id, this process included, when the sum was largest. PSS: shared pages count once."""

    def __enter__(self) -> "ProcessTree":
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
        """Measure memory now, and remember new descendants even if the process that started them ends."""
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
        return getattr(info, "pss", info.uss)  # PSS is only available on Linux
    return 0


@dataclass
class SimulatedCluster:
    """A simulated cluster that this process has joined."""

    folder: Path
    """Temporary folder, deleted with the cluster."""
    processes: ProcessTree
    """All processes of the cluster."""
    _cluster: Cluster

    @property
    def address(self) -> str:
        """The value of $RAY_ADDRESS for drivers."""
        return str(self._cluster.address)

    def add(self, node: Node, **options: Any) -> Any:
        """Add a node and return its handle. The first one is the head. In the main thread only."""
        added = self._cluster.add_node(num_cpus=node.cpus, num_gpus=node.gpus, **options)
        # The SIGTERM handler that Ray installs would end only this node, and later.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return added

    def occupy(self, cpus: int) -> None:
        """Reserve CPUs of one node, as if something ran on them. They still count as resources of the cluster."""
        if not placement_group([{"CPU": cpus}], name=_OCCUPIED).wait(_OCCUPY_SECONDS):
            raise RuntimeError(f"No node of the simulated cluster has {cpus} free CPUs.")

    def lose(self, handle: Any) -> None:
        """Kill a node's processes without warning, like the loss of a machine."""
        self.processes.sample()
        self._cluster.remove_node(handle, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def simulated(
    nodes: Sequence[Node], environment: dict[str, str], dashboard: bool = False
) -> Iterator[SimulatedCluster]:
    """Start a head and `nodes` and join them, for the duration of the block. In the main thread only.

    Args:
        environment: variables for all processes started in the block. $RAY_ADDRESS is set to the cluster.
        dashboard: start Ray's dashboard, without which Ray does not clean up after drivers that were killed.
    """
    handler = signal.getsignal(signal.SIGTERM)
    # /tmp: paths of sockets in the folder must stay below 104 characters.
    with (
        tempfile.TemporaryDirectory(prefix="rehearsal-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        _environment({"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN, **environment}),
        ProcessTree() as processes,
    ):
        cluster = SimulatedCluster(Path(folder), processes, Cluster())
        os.environ.pop("RAY_ADDRESS", None)
        try:
            cluster.add(Node(0), include_dashboard=dashboard, _system_config=dict(_ON_DEMAND))
            for node in nodes:
                cluster.add(node)
            os.environ["RAY_ADDRESS"] = cluster.address
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.WARNING)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    Config.initialize("")  # Ray has read its variables on import
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        Config.initialize("")


def bundles_per_node() -> tuple[int, ...]:
    """Return the number of placement group bundles on each node of the joined cluster that has any, largest first."""
    placed = Counter(
        node
        for group in placement_group_table().values()
        if group["state"] == "CREATED" and group["name"] != _OCCUPIED
        for node in group["bundles_to_node_id"].values()
    )
    return tuple(sorted(placed.values(), reverse=True))
