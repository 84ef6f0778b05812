"""An MLflow server on loopback for the tests, in a process of its own."""

import os
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

UNUSED = "http://127.0.0.1:9"
"""The discard port, on which no server listens."""


@contextmanager
def mlflow_server(folder: Path, port: int = 0, seconds: float = 180) -> Iterator[tuple[str, psutil.Process]]:
    """Run a server that keeps its database and artifacts in `folder`; yield its URI and process.

    Args:
        port: where it listens; 0 chooses a free port.
        seconds: for which it may start.
    """
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", f"{folder}/artifacts"]
    # Without job execution, which would start eight more processes.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("w") as log:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + seconds
        while not _answers(uri):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        yield uri, process
    finally:
        processes = [*process.children(recursive=True), process]
        for member in processes:
            member.kill()
        psutil.wait_procs(processes, timeout=30)


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False
