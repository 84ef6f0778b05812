"""Help: one screen, within a second, without the libraries that take seconds to import."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
JOBS = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "jobs").glob("*.py") if file.stem != "__init__")
BENCHES = sorted(file.relative_to(ROOT).as_posix() for file in (ROOT / "jobs/bench").glob("*.py"))
HEAVY = ("ray", "mlflow", "torch", "torchvision", "scipy", "pyarrow", "pandas", "matplotlib", "transformers")

REPORT = """
import json, resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps([end.code, sorted(sys.modules), usage.ru_utime + usage.ru_stime]), file=sys.stderr)
"""


def ask(job: str, flag: str) -> tuple[str, set[str], float]:
    """Return a job's help, the modules that it imported, and its CPU seconds."""
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "PATH": ""}
    command = [sys.executable, "-c", REPORT, job, flag]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    code, modules, seconds = json.loads(result.stderr.splitlines()[-1])
    assert code == 0, result.stderr
    return result.stdout, set(modules), seconds


@pytest.mark.parametrize("job", JOBS)
def test_help_is_one_screen_and_answers_at_once(job: str) -> None:
    answer, modules, seconds = ask(job, "--help")
    assert not modules.intersection(HEAVY)
    assert seconds < 1
    lines = answer.splitlines()
    assert len(lines) <= 44
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith(f"usage: python {job} ")
    assert len(re.findall(r"^  --[\w.-]+", answer, re.MULTILINE)) >= 4
    assert not re.search(r"^  --\S+(?: \S+)?\s*(\[.*\])?$(?!\n {10})", answer, re.MULTILINE)  # none without a text


@pytest.mark.parametrize("job", BENCHES)
def test_help_of_a_benchmark_runs_nothing(job: str) -> None:
    answer, modules, _ = ask(job, "--help")
    assert answer.startswith(f"usage: python {job} ")
    assert "ray" not in modules


@pytest.mark.parametrize("job", ["jobs/train_r50.py", "jobs/plan.py", "jobs/sweep.py"])
def test_help_all_shows_every_setting_with_a_text(job: str) -> None:
    short, everything = ask(job, "--help")[0], ask(job, "--help-all")[0]
    flags = set(re.findall(r"--[a-z][\w.-]*", everything))
    assert len(flags) >= 80
    shown = set(re.findall(r"^  (--[\w.-]+)", short, re.MULTILINE))
    assert shown - {"--help"} <= flags


def test_a_setting_has_the_same_flag_in_every_job() -> None:
    flags = {job: set(re.findall(r"^  (--[\w.-]+)", ask(job, "--help")[0], re.MULTILINE)) for job in JOBS}
    evaluate, train = flags["jobs/evaluate.py"], flags["jobs/train_r50.py"]
    assert {"--tracking.uri", "--scaling.device", "--scaling.workers", "--scaling.cpus-per-worker"} <= evaluate & train
    for mine in flags.values():
        assert not mine & {"--tracking-uri", "--device", "--workers", "--predictors", "--cpus"}
