"""Places that a job's nodes must share, looked at on real nodes that do and do not share them."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines import cluster
from pipelines.config import TrainConfig
from pipelines.errors import UserError
from pipelines.recipes import R50_MMDET
from pipelines.training import fit
from tests import ray_nodes
from tests.jobs.command_line import flags

ROOT = Path(__file__).parents[2]
LOCAL = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def test_what_is_absent_is_missing_and_what_comes_a_little_later_is_not(tmp_path: Path) -> None:
    there, later, absent = (str(tmp_path / name) for name in ("there", "later", "absent"))
    Path(there).touch()
    timer = threading.Timer(0.3, Path(later).touch)
    timer.start()
    start = time.monotonic()
    assert cluster.missing([there, later], patience=60) == []
    assert 0.2 < time.monotonic() - start < 30
    assert cluster.missing([there, absent], patience=0) == [absent]
    timer.join()


def test_what_is_thrown_away_with_a_job_is_refused() -> None:
    folder = "/tmp/ray/session_2026/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    cluster.require_lasting({"--run.storage": "/data/runs", "--tracking.uri": "http://mlflow:5000"})
    with pytest.raises(UserError, match=rf"^--run\.storage leads to {folder}/runs, .* s3:// or an absolute path"):
        cluster.require_lasting({"--run.storage": f"{folder}/runs"})
    with pytest.raises(UserError, match=rf"^--tracking\.uri leads to sqlite:///{folder}/mlflow\.db, "):
        cluster.require_lasting({"--tracking.uri": f"sqlite:///{folder}/mlflow.db"})


@pytest.mark.ray
def test_a_single_node_is_not_asked(ray_session: str, tmp_path: Path) -> None:
    cluster.require_shared(str(tmp_path / "runs"), {"--data.train": "/nowhere/manifest.json"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_gpus_that_a_cluster_lacks_are_counted(
    ray_session: str, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    start = time.monotonic()
    config = replace(tiny, scaling=replace(tiny.scaling, device="cuda"))
    with pytest.raises(UserError, match=r"cluster is too small: .*\b2 GPU needed, .*\b0 GPU there\. 2 workers take"):
        fit(config)
    assert time.monotonic() - start < 30


def mount_empty(folder: Path) -> list[str]:
    """Return a command that runs its arguments where another, empty file system hides `folder`."""
    script = f'mount -t tmpfs none "{folder}" && exec "$@"'
    for privilege in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *privilege, "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("this machine lets nobody mount a file system for one process")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_do_not_share_a_disk(tiny: TrainConfig, tmp_path: Path) -> None:
    storage, pack = tmp_path / "runs", tmp_path / "pack"
    for folder in (storage, pack):
        folder.mkdir()
    (pack / "manifest.json").touch()
    blind = mount_empty(storage)
    look = (
        f"from pipelines import cluster\nwith cluster.session():\n"
        f"    cluster.require_shared({str(storage)!r}, {{'--data.train': {str(pack / 'manifest.json')!r}}})\n"
    )

    def run(head: ray_nodes.Head, *command: str) -> tuple[int, str]:
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "RAY_ADDRESS": head.address, **LOCAL}
        end = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        return end.returncode, end.stderr

    with ray_nodes.head(LOCAL) as head, ray_nodes.node(head, LOCAL):
        assert run(head, "-c", look) == (0, "")
        assert list(storage.iterdir()) == []

        config = replace(tiny, run=replace(tiny.run, storage=str(storage)))
        with ray_nodes.node(head, LOCAL, before=blind):
            status, said = run(head, "jobs/train_r50.py", *flags(config, R50_MMDET))
        assert status == 2, said
        complaint = said.splitlines()[-1]
        assert complaint.startswith("error: The cluster has 3 nodes, and not all of them see what this one sees: ")
        # The pack is not below the empty file system.
        places = f"lack {storage} (--run.storage), {storage}/mlflow.db (--tracking.uri). Give s3://"
        assert places in complaint
        assert [path.name for path in storage.iterdir()] == ["mlflow.db"]
