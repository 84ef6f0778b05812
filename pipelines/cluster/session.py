"""Starting or joining Ray."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from pipelines.credentials import refuse_credentials
from pipelines.errors import UserError

logger = logging.getLogger(__name__)


def is_remote() -> bool:
    """Return whether $RAY_ADDRESS names a cluster; otherwise Ray is started on this machine."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


@contextmanager
def session() -> Iterator[None]:
    """Join the Ray cluster at $RAY_ADDRESS, or start one on this machine, for the duration of the block.

    A nested session reuses the outer one.

    Raises:
        UserError: the cluster cannot be joined, or runs another version of Ray, or its address has a password in it.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    refuse_credentials(address, "The address $RAY_ADDRESS,")
    options = {"logging_level": logging.WARNING, "log_to_driver": True}
    try:
        if not is_remote():
            logger.info("Starting Ray on this machine; set RAY_ADDRESS to use a cluster.")
            context = ray.init(address="local", include_dashboard=True, dashboard_port=0, **options)
        else:
            _require_listener(address)
            context = ray.init(address=address, **options)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(
            f"Ray cannot be used{f' at RAY_ADDRESS={address}' if address else ''}: {_first_lines(error)} "
            f"This program runs Ray {ray.__version__}: start the cluster with the same version of Ray and Python, "
            f"or unset RAY_ADDRESS to run on this machine."
        ) from error
    try:
        if context.dashboard_url:  # a cluster may have none
            logger.info("Ray's dashboard: http://%s", context.dashboard_url)
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise OSError if nothing listens at `address`; Ray itself would retry for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():  # otherwise it is `auto`, and Ray finds the cluster itself
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text.rstrip('.')}." if len(text) < 400 else f"{text[:400]} ..."
