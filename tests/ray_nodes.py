"""Ray nodes as processes of this machine, started by `ray start`."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

PROGRAMS = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Return unused ports."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass(frozen=True, kw_only=True)
class Head:
    """The head node of a cluster."""

    address: str
    """The value of $RAY_ADDRESS for drivers."""
    dashboard: str
    """The value of $RAY_API_SERVER_ADDRESS for submitting jobs."""
    folder: Path
    """Logs, and the working directories of jobs."""


@contextmanager
def head(environment: dict[str, str], cpus: int = 2) -> Iterator[Head]:
    """Start a head node for the duration of the block."""
    port, dashboard, agent = free_ports(3)
    # Not the folder of pytest: paths of sockets in it must stay below 107 characters.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    arguments = [
        "--head", f"--num-cpus={cpus}", f"--port={port}", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    try:
        with _node(arguments, environment, listening=(port, dashboard, agent)):
            yield Head(address=f"127.0.0.1:{port}", dashboard=f"http://127.0.0.1:{dashboard}", folder=Path(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def node(head: Head, environment: dict[str, str], before: Sequence[str] = ()) -> Iterator[None]:
    """Add a node with one CPU to a cluster for the duration of the block.

    Args:
        before: a command that runs its arguments, such as `env`; it runs `ray start`.
    """
    [agent] = free_ports(1)
    arguments = [
        f"--address={head.address}", "--num-cpus=1", "--node-ip-address=127.0.0.1",
        f"--dashboard-agent-listen-port={agent}",
    ]  # fmt: skip
    with _node(arguments, environment, listening=(agent,), before=before):
        yield


@contextmanager
def _node(
    arguments: list[str], environment: dict[str, str], listening: tuple[int, ...], before: Sequence[str] = ()
) -> Iterator[None]:
    # With --block the node ends with this process. `ray stop` would also stop the nodes of others.
    command = [*before, str(PROGRAMS / "ray"), "start", "--block", "--object-store-memory=100000000", *arguments]
    process = subprocess.Popen(
        command,
        env={
            "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
            "HOME": os.environ["HOME"],
            "RAY_USAGE_STATS_ENABLED": "0",
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 240
        for port in listening:
            while not _answers(port):
                assert process.poll() is None, f"{' '.join(command)} ended with status {process.returncode}"
                assert time.monotonic() < deadline, f"nothing listens at port {port} of {' '.join(command)}"
                time.sleep(0.1)
        yield
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # it ends its children
        process.wait(120)
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
