"""The processes of a simulation: none is forgotten, none is left, and those of others are left alone."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from pipelines.simulation import Family

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


def test_a_family_is_measured_and_ended_orphans_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.simulation._END_SECONDS", 1)
    stranger = start("input()")
    try:
        with Family() as family:
            parent = start(ORPHANS)
            assert parent.stdout is not None
            assert parent.stdout.readline() == "ready\n"
            [orphan] = psutil.Process(parent.pid).children()
            family.sample()
            assert {os.getpid(), parent.pid, orphan.pid} <= family.peak.keys()
            assert stranger.pid not in family.peak
            assert family.peak[orphan.pid] > MEGABYTES << 20
            parent.kill()
            parent.wait()
            assert orphan.is_running()
        deadline = time.monotonic() + 10
        while orphan.is_running() and orphan.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
