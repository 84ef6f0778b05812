"""The one place that starts or joins Ray."""

import logging
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines import storage
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

_JOB_FOLDERS = "/runtime_resources/working_dir_files/"
"""Where Ray puts the working directories of submitted jobs, until it needs the room."""

_ANSWER_SECONDS = 60
"""How long to wait for a node's answer: it may have to start a process for it."""

_LOOK_SECONDS = 5
"""How long a node looks for a file: a network file system may show a new one a little later."""


def is_remote() -> bool:
    """Tell whether work goes to a cluster rather than to a Ray of this machine alone."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


@contextmanager
def session() -> Iterator[None]:
    """Join the Ray cluster named by $RAY_ADDRESS, or start one on this machine for as long as the block lasts.

    Inside another session this is that session.

    Raises:
        UserError: the cluster cannot be joined, or runs another version of Ray.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    options = {"logging_level": logging.WARNING, "log_to_driver": True}
    try:
        if not is_remote():
            logger.info("Starting Ray on this machine; set RAY_ADDRESS to use a cluster.")
            ray.init(address="local", include_dashboard=True, dashboard_port=0, **options)
        else:
            _knock(address)
            ray.init(address=address, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Ray cannot be used{f' at RAY_ADDRESS={address}' if address else ''}: {_first_lines(error)} "
            f"This program runs Ray {ray.__version__}: start the cluster with the same version of Ray and Python, "
            f"or unset RAY_ADDRESS to run on this machine."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Raise OSError if nobody listens at `address`; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():  # else it is `auto`, and Ray looks for the cluster itself
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def require(needed: dict[str, float], explanation: str) -> None:
    """Refuse a request that the cluster can never meet; Ray would wait for ever.

    Raises:
        UserError: with what is needed and what there is.
    """
    there = ray.cluster_resources()
    if any(there.get(kind, 0) + 1e-6 < amount for kind, amount in needed.items()):
        wanted = ", ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
        found = ", ".join(f"{there.get(kind, 0):g} {kind}" for kind in needed)
        raise UserError(f"The Ray cluster is too small: {wanted} needed, {found} there. {explanation}")


def require_lasting(places: Mapping[str, str]) -> None:
    """Refuse places in the folder that Ray makes for a submitted job and throws away.

    Args:
        places: by the flag that names it, an absolute path or URI.

    Raises:
        UserError: what would be written there would be lost.
    """
    for flag, place in places.items():
        if _JOB_FOLDERS in place:
            raise UserError(
                f"{flag} leads to {place}, into the folder that Ray made for this job and will throw away. For what a "
                f"submitted job writes, give s3:// or an absolute path, not one relative to the working directory."
            )


def require_shared(folder: str, files: Mapping[str, str]) -> None:
    """Refuse places on this node's disk that other nodes do not see. On a single node nothing is done.

    Args:
        folder: path or URI of --run.storage, where all nodes write.
        files: by the flag that names it, path or URI of a file that exists.

    Raises:
        UserError: with the nodes and what they do not see.
    """
    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    named = {path: f"{path} ({flag})" for flag, path in files.items() if not storage.is_remote(path)}
    # A folder of that name may stand on every node; only a new file in it tells whether it is the same one.
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
        places = sorted({named[path] for paths in unseen.values() for path in paths})
        nodes = sorted(unseen)
        more = f" and {len(nodes) - 5} more" if len(nodes) > 5 else ""
        raise UserError(
            f"The cluster has {len(others) + 1} nodes, and not all of them see what this one sees: "
            f"{', '.join(nodes[:5])}{more} lack {', '.join(places)}. Give s3:// places, or a file system that every "
            f"node mounts at the same path; for --tracking.uri an MLflow server."
        )


def _unseen(nodes: Sequence[dict[str, Any]], paths: list[str]) -> dict[str, list[str]]:
    """Ask `nodes` which of `paths` they lack; return those lacking some. One that does not answer is not waited for."""
    look = ray.remote(num_cpus=0, max_retries=0)(missing)
    answers = {
        look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False), name="see storage"
        ).remote(paths, _LOOK_SECONDS): f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
    }
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    unseen: dict[str, list[str]] = {}
    silent = [answers[answer] for answer in late]
    for answer in ready:
        try:
            if lacking := ray.get(answer):
                unseen[answers[answer]] = lacking
        except RayError:  # the node was lost meanwhile
            silent.append(answers[answer])
    for answer in late:
        ray.cancel(answer, force=True)
    if silent:
        logger.warning("These nodes did not say whether they see the storage: %s.", ", ".join(silent))
    return unseen


def missing(paths: Sequence[str], patience: float) -> list[str]:
    """Return those of `paths` that do not appear on this machine within `patience` seconds."""
    deadline = time.monotonic() + patience
    while (absent := [path for path in paths if not os.path.exists(path)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    return absent


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:400]} ..."
