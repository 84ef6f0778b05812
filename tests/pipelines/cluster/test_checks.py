"""Checks of locations and capacity, on real nodes that do and do not share a disk."""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.cluster import checks
from pipelines.config.recipes import R50_MMDET
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.training import fit
from tests import ray_nodes
from tests.jobs.command_line import flags

ROOT = Path(__file__).parents[3]
LOCAL = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def test_files_that_appear_after_a_delay_are_not_missing(tmp_path: Path) -> None:
    present, later, absent = (str(tmp_path / name) for name in ("present", "later", "absent"))
    Path(present).touch()
    timer = threading.Timer(0.3, Path(later).touch)
    timer.start()
    start = time.monotonic()
    assert checks.missing([present, later], seconds=60) == []
    assert 0.2 < time.monotonic() - start < 30
    assert checks.missing([present, absent], seconds=0) == [absent]
    timer.join()


def test_locations_that_are_deleted_with_a_job_are_refused() -> None:
    folder = "/tmp/ray/session_2026/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    checks.require_permanent({"--run.storage": "/data/runs", "--tracking.uri": "http://mlflow:5000"})
    with pytest.raises(UserError, match=rf"^--run\.storage is {folder}/runs, .* s3:// or an absolute path"):
        checks.require_permanent({"--run.storage": f"{folder}/runs"})
    with pytest.raises(UserError, match=rf"^--tracking\.uri is sqlite:///{folder}/mlflow\.db, "):
        checks.require_permanent({"--tracking.uri": f"sqlite:///{folder}/mlflow.db"})


@pytest.mark.ray
def test_a_single_node_is_not_asked(ray_session: str, tmp_path: Path) -> None:
    checks.require_shared(str(tmp_path / "runs"), {"--data.train": "/nowhere/manifest.json"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_missing_gpus_are_reported(ray_session: str, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    start = time.monotonic()
    config = replace(tiny, scaling=replace(tiny.scaling, device="cuda"))
    with pytest.raises(
        UserError, match=r"^The run needs .*\b2 GPU: 2 workers with .* The cluster has .*\b0 GPU, with room for 0"
    ):
        fit(config)
    assert time.monotonic() - start < 30


def mount_empty(folder: Path) -> list[str]:
    """Return a command that runs its arguments where another, empty file system hides `folder`."""
    script = f'mount -t tmpfs none "{folder}" && exec "$@"'
    for privilege in ([], ["--user", "--map-root-user"]):
        command = ["unshare", *privilege, "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
        if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    pytest.skip("this machine does not allow mounting a file system for one process")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_do_not_share_a_disk(tiny: TrainConfig, tmp_path: Path) -> None:
    storage, pack = tmp_path / "runs", tmp_path / "pack"
    for folder in (storage, pack):
        folder.mkdir()
    (pack / "manifest.json").touch()
    hide_storage = mount_empty(storage)
    check = (
        f"from pipelines.cluster import checks, session\nwith session.session():\n"
        f"    checks.require_shared({str(storage)!r}, {{'--data.train': {str(pack / 'manifest.json')!r}}})\n"
    )

    def run(head: ray_nodes.Head, *command: str) -> tuple[int, str]:
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], "RAY_ADDRESS": head.address, **LOCAL}
        end = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
        )
        return end.returncode, end.stderr

    with ray_nodes.head(LOCAL) as head, ray_nodes.node(head, LOCAL):
        assert run(head, "-c", check) == (0, "")
        assert list(storage.iterdir()) == []

        config = replace(tiny, run=replace(tiny.run, storage=str(storage)))
        with ray_nodes.node(head, LOCAL, before=hide_storage):
            status, stderr = run(head, "jobs/train_r50.py", *flags(config, R50_MMDET))
        assert status == 2, stderr
        message = stderr.splitlines()[-1]
        assert message.startswith("error: The cluster has 3 nodes, and not all of them see the same files: ")
        # The pack is not below the empty file system.
        assert f"lack {storage} (--run.storage), {storage}/mlflow.db (--tracking.uri). Use s3://" in message
        assert [path.name for path in storage.iterdir()] == ["mlflow.db"]
