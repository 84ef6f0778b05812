"""Checks of the joined cluster before a job starts: its capacity, and whether every node sees the storage."""

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state  # Ray has no public way to ask by node
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.cluster.capacity import Capacity
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

_JOB_FOLDERS = "/runtime_resources/working_dir_files/"
"""Path component of the working directories that Ray makes for submitted jobs and deletes afterwards."""

_ANSWER_SECONDS = 60
"""Timeout of a node's answer. The node may have to start a process first."""

_APPEAR_SECONDS = 5
"""How long a node waits for a file to appear: a network file system may show new files with a delay."""


def capacity() -> Capacity:
    """Return the resources of the joined cluster."""
    return Capacity.of(resources().values())


def resources() -> dict[str, dict[str, float]]:
    """Return the resources of the joined cluster's nodes, in use or not, by the node's id."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def free_resources() -> dict[str, dict[str, float]]:
    """Return what is free now on each node that is not about to leave the cluster, by the node's id."""
    leaving = draining_nodes()
    return {node: free for node, free in available_resources_per_node().items() if node not in leaving}


def draining_nodes() -> set[str]:
    """Return the ids of the nodes that will leave the cluster: preempted, or drained by `ray drain-node`."""
    return set(state.get_draining_nodes())


def require_permanent(locations: Mapping[str, str]) -> None:
    """Refuse locations in the folder that Ray makes for a submitted job and deletes afterwards.

    Args:
        locations: absolute path or URI by the flag that sets it.

    Raises:
        UserError: a location is in that folder, so its files would be lost.
    """
    for flag, location in locations.items():
        if _JOB_FOLDERS in location:
            raise UserError(
                f"{flag} is {location}, inside the working directory that Ray made for this job and will delete. Use "
                f"s3:// or an absolute path for files that a submitted job writes."
            )


def require_shared(folder: str, files: Mapping[str, str]) -> None:
    """Refuse locations on this node's disk that other nodes do not see. Does nothing on a single node.

    Args:
        folder: path or URI of --run.storage, where all nodes write.
        files: path or URI of an existing file by the flag that sets it.

    Raises:
        UserError: nodes do not see a location; the message lists both.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    named = {path: f"{path} ({flag})" for flag, path in files.items() if not storage.is_remote(path)}
    # A folder of that name may exist on every node. Only a new file shows whether it is the same folder.
    marker = storage.locate(folder) / f".seen-{uuid.uuid4().hex}"
    if marker.is_local:
        named[marker.path] = f"{folder} (--run.storage)"
    if not others or not named:
        return
    try:
        if marker.is_local:
            marker.write_bytes(b"")
        unseen = _unseen(others, list(named))
    finally:
        if marker.is_local:
            marker.delete()
    if unseen:
        paths = sorted({named[path] for of_node in unseen.values() for path in of_node})
        nodes = sorted(unseen)
        more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
        raise UserError(
            f"The cluster has {len(others) + 1} nodes, and not all of them see the same files: "
            f"{', '.join(nodes[:5])}{more} lack {', '.join(paths)}. Use s3:// URIs, or a file system that every "
            f"node mounts at the same path; for --tracking.uri an MLflow server."
        )


def _unseen(nodes: Sequence[dict[str, Any]], paths: list[str]) -> dict[str, list[str]]:
    """Return the nodes that lack some of `paths`, and which. Nodes that do not answer are skipped with a warning."""
    task = ray.remote(num_cpus=0, max_retries=0)(missing)
    answers = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), name="check storage"
        ).remote(paths, _APPEAR_SECONDS): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
    }
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    unseen: dict[str, list[str]] = {}
    silent = [answers[answer] for answer in late]
    for answer in ready:
        try:
            if lacking := ray.get(answer):
                unseen[answers[answer]] = lacking
        except RayError:  # the node was lost in the meantime
            silent.append(answers[answer])
    for answer in late:
        ray.cancel(answer, force=True)
    if silent:
        logger.warning("These nodes did not answer whether they see the storage: %s.", ", ".join(silent))
    return unseen


def missing(paths: Sequence[str], seconds: float) -> list[str]:
    """Return those of `paths` that do not exist on this machine after waiting up to `seconds`."""
    deadline = time.monotonic() + seconds
    while (absent := [path for path in paths if not os.path.exists(path)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return absent
