"""Ray nodes as processes of this machine, started as people start them: by `ray start`."""

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
    """Return ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for place in sockets:
            place.bind(("127.0.0.1", 0))
        return [place.getsockname()[1] for place in sockets]


@dataclass(frozen=True, kw_only=True)
class Head:
    """A cluster's head node."""

    address: str
    """For drivers: $RAY_ADDRESS."""
    dashboard: str
    """For those who submit: $RAY_API_SERVER_ADDRESS."""
    folder: Path
    """Its files: logs, and the working directories of jobs."""


@contextmanager
def head(environment: dict[str, str], cpus: int = 2) -> Iterator[Head]:
    """Start a head node, for as long as the block lasts."""
    port, dashboard, agent = free_ports(3)
    # Not pytest's folder: the names of sockets in it must stay below 107 characters.
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
    """Add a node with one CPU to a cluster; `before` is a command that runs its arguments, such as `env`."""
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
    # With --block the node lives and dies with this one process; `ray stop` would stop those of others too.
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
                assert time.monotonic() < deadline, f"nobody listens at port {port} of {' '.join(command)}"
                time.sleep(0.1)
        yield
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()  # and it ends its own
        process.wait(120)
        for child in family:
            with suppress(psutil.NoSuchProcess):
                child.kill()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
