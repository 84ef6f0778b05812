"""The rehearsal at the command line: a node lost and replaced, the placement of 64 workers, Ctrl-C; nothing stays."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from jobs import plan
from jobs.shared.cli import run

ROOT = Path(__file__).parents[2]
SMALL = ["--scaling.workers", "4", "--scaling.data-cpus", "8", "--cluster.nodes", "1"]
PLACE_64 = """
from pipelines.config.recipes import SWIN_L_MMDET
from pipelines.planning.placement import place
from pipelines.cluster.simulated import Node
placement = place(SWIN_L_MMDET, [Node(32, 8)] * 8 + [Node(16)] * 8)
print(placement.workers, placement.data_cpus)
"""


def left_behind() -> set[Path]:
    return set(Path("/tmp").glob("rehearsal-*"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a rehearsal of 2 x 2 workers; it and all that it started are gone afterwards."""
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "jobs/plan.py", "--rehearse", *SMALL]
        job = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, start_new_session=True)
    yield job
    if job.poll() is None:
        for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
            process.kill()
        job.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_is_lost_and_no_sample(job: subprocess.Popen[str], tmp_path: Path) -> None:
    before = left_behind()
    status = job.wait(850)
    text = (tmp_path / "log").read_text()
    assert status == 0, text
    rows = dict(re.findall(r"^(.{18})rehearsed  (.*)$", text, re.MULTILINE))
    facts = {name.strip(): value for name, value in rows.items()}
    assert facts["placement"].startswith("4 workers, 4 by node; ")
    assert facts["run"] == "16 = 4 workers x 1 images x 4 accumulated, 2 + 2 by node, 20 steps"
    lost, resumed, redone = map(
        int, re.findall(r"after step (\d+); .* step (\d+) .* (\d+) steps", facts["node loss"])[0]
    )
    assert resumed % 5 == 0
    assert 0 < resumed < lost < 20
    assert redone == lost - resumed
    assert "with 2 + 2 by node" in facts["node loss"]
    # Which one, Ray may not know yet when another worker notices it.
    assert re.match(r"(worker \d: its (process or its )?|a worker or its )node was lost\b", facts["cause in ledger"])
    assert facts["samples"].startswith("320 positions, each used once")
    assert left_behind() <= before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_an_interrupted_rehearsal_leaves_nothing(job: subprocess.Popen[str], tmp_path: Path) -> None:
    before, family = left_behind(), set[psutil.Process]()
    deadline = time.monotonic() + 240
    while "Training on simulated nodes" not in (tmp_path / "log").read_text():
        assert job.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()
        family |= set(psutil.Process(job.pid).children(recursive=True))
        time.sleep(0.2)
    assert any(process.is_running() and process.name() == "raylet" for process in family)
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(90) == 130, (tmp_path / "log").read_text()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
    assert left_behind() <= before


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_64_workers_find_their_places_in_the_cluster_we_ship() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLACE_64], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(8, 8, 8, 8, 8, 8, 8, 8) 256.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cluster.nodes", "1"], "The recipe r50_mmdet needs 96 CPU, 16 GPU"),
        (["--live"], "leave --live out"),
    ],
    ids=["too small", "live"],
)
def test_refused_before_anything_starts(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.planning.rehearsal.rehearse", lambda *_: pytest.fail("a rehearsal was started"))
    monkeypatch.setattr(sys, "argv", ["plan.py", "--rehearse", *arguments])
    with pytest.raises(SystemExit) as end:
        run(plan.main)
    assert end.value.code == 2
    error = " ".join(re.sub("[│╭╮╯╰─]", " ", capsys.readouterr().err).split())
    assert message in error
