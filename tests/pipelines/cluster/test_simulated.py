"""The processes of a simulated cluster: all are measured and ended, and other processes are left alone."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.cluster.simulated import ProcessTree

MEGABYTES = 64
HOLDS_MEMORY = (
    f"import signal; held = bytearray(b'x' * ({MEGABYTES} << 20)); print('ready', flush=True); signal.pause()"
)
ORPHANS = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {HOLDS_MEMORY!r}], stdout=sys.stdout)
input()
"""


def start(program: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_process_tree_is_measured_and_ended_including_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cluster.simulated._END_SECONDS", 1)
    unrelated = start("input()")
    try:
        with ProcessTree() as processes:
            parent = start(ORPHANS)
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            [orphan] = psutil.Process(parent.pid).children()
            processes.sample()
            assert {os.getpid(), parent.pid, orphan.pid} <= processes.peak.keys()
            assert unrelated.pid not in processes.peak
            assert processes.peak[orphan.pid] > MEGABYTES << 20
            parent.kill()
            parent.wait()
            assert orphan.is_running()
        deadline = time.monotonic() + 10
        while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert unrelated.poll() is None
    finally:
        unrelated.kill()
        unrelated.wait()
