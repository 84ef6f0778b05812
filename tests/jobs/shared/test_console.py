"""The console: our lines reach the person, everything else the log file, and the cause of a failure names that file."""

import contextlib
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

from jobs.shared.console import Console

ROOT = Path(__file__).parents[3]

JOB = """
import logging, os, subprocess, sys
from jobs.shared.cli import run
from jobs.shared.console import quiet
from pipelines.errors import RunFailedError

def main():
    logging.getLogger("pipelines.training").info("step 1 of 2")
    with quiet("--verbose" in sys.argv):
        print("a library prints")
        print("a library complains", file=sys.stderr)
        os.write(2, b"the raylet writes\\n")
        subprocess.run(["echo", "a child writes"])
        logging.getLogger("ray.data").warning("Ray Data warns")
        logging.getLogger("pipelines.training").info("step 2 of 2")
        if "fail" in sys.argv:
            raise RunFailedError("Run r failed: worker 1 died.")
        if "bug" in sys.argv:
            raise ZeroDivisionError
    print("the result")

run(main)
"""
NOISE = ("a library prints", "a library complains", "the raylet writes", "a child writes", "Ray Data warns")


def job(tmp_path: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the job; return its exit status and what it wrote to stdout and stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", JOB, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    return result.returncode, result.stdout, result.stderr


def logged(tmp_path: Path) -> str:
    (file,) = tmp_path.rglob("*.log")
    assert file.stat().st_mode & 0o77 == 0  # for this user only
    return file.read_text()


def test_a_person_sees_our_lines_and_the_file_has_all_others(tmp_path: Path) -> None:
    status, stdout, stderr = job(tmp_path)
    assert (status, stdout) == (0, "the result\n")
    first, announcement, second = stderr.splitlines()  # announced before the first line inside
    assert re.search(r"INFO step 1 of 2$", first)
    assert re.search(r"INFO step 2 of 2$", second)
    log = logged(tmp_path)
    assert re.search(r"Output of Ray and MLflow goes to (\S+)", announcement)[1] in str(*tmp_path.rglob("*.log"))  # pyright: ignore[reportOptionalSubscript]
    for line in (*NOISE, "step 2 of 2"):
        assert log.count(line) == 1


def test_a_console_that_is_gone_does_not_end_the_job() -> None:
    stream = io.StringIO()
    stream.close()
    record = logging.LogRecord("pipelines", logging.INFO, "", 0, "a line", None, None)
    with contextlib.redirect_stderr(io.StringIO()):  # logging's own complaint
        Console(stream).handle(record)


def test_verbose_shows_everything(tmp_path: Path) -> None:
    status, stdout, stderr = job(tmp_path, "--verbose")
    assert status == 0
    for line in NOISE:
        assert line in stdout + stderr
    assert not list(tmp_path.rglob("*.log"))


def test_a_failure_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    status, stdout, stderr = job(tmp_path, "fail")
    assert (status, stdout) == (1, "")
    (file,) = tmp_path.rglob("*.log")
    last = stderr.splitlines()[-1]
    assert last == f"error: Run r failed: worker 1 died. The output of Ray is in {file}."
    assert "Traceback" not in stderr


def test_a_bug_still_shows_its_traceback(tmp_path: Path) -> None:
    status, _, stderr = job(tmp_path, "bug")
    assert status == 1
    assert f"The output of Ray is in {next(tmp_path.rglob('*.log'))}." in stderr
    assert stderr.endswith("ZeroDivisionError\n")
