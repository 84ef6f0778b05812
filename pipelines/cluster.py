"""The one place that starts or joins Ray."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipelines.errors import UserError

logger = logging.getLogger(__name__)


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


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else f"{text[:400]} ..."
