"""The pinned versions: complete, of one mind, and those that run here."""

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from importlib.metadata import requires as requirements
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = "maskformer-ray"
BUILD_OF_TORCH = re.compile(r"nvidia-|cuda-|triton$")
"""What torch needs on a GPU. Its build for CPUs comes without."""

FIXED = {
    "pillow": "13.0.0",  # CVE-2026-112403: buffer overflow in the JPEG decoder
    "pyarrow": "14.0.1",  # CVE-2023-47248: code execution by reading Parquet
    "mlflow": "3.17.2",  # CVE-2026-53995, and a known password for the administrator before 3.16.1
    "ray": "2.56.0",  # CVE-2026-41486 and CVE-2026-57516: code execution by reading Parquet and tar
    "torch": "2.11.0",  # CVE-2025-32434, CVE-2026-24747 and CVE-2026-4538: code execution by loading a file
    "tqdm": "4.66.3",  # CVE-2024-34062
    "pyyaml": "5.4",  # CVE-2020-14343
    "onnx": "1.21.0",  # CVE-2026-27489: reads files outside of the model's folder
    "transformers": "5.0.0",  # PYSEC-2025-217
    "pytest": "9.0.3",  # CVE-2025-71176
}
"""The first release without the holes that are known to concern a direct dependency."""

REINSTALL = "rm -f .venv/installed && make test"
"""What the hint of a failed test says."""


def pins(name: str) -> dict[str, str]:
    found = {}
    for line in (ROOT / name).read_text().splitlines()[1:]:
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
        assert match, f"{name}: {line!r} is more or less than a name and a version"
        found[canonicalize_name(match[1])] = match[2]
    return found


DIRECT, ALL = pins("constraints.txt"), pins("constraints-all.txt")


def needed(
    name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, frozenset[str]]] | None = None
) -> set[str]:
    """Return every distribution that `name` needs here, itself included."""
    seen = set() if seen is None else seen
    if (name, extras) in seen:
        return set()
    seen.add((name, extras))
    found = {name}
    for text in requirements(name) or []:
        requirement = Requirement(text)
        if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            found |= needed(canonicalize_name(requirement.name), frozenset(requirement.extras), seen)
    return found


def test_both_files_agree() -> None:
    assert DIRECT.items() <= ALL.items()


def test_everything_that_is_needed_here_is_pinned() -> None:
    missing = needed(PROJECT, frozenset({"dev"})) - ALL.keys() - {PROJECT, "setuptools", "pip", "wheel"}
    assert not missing, f"{sorted(missing)} have no pin. Call `make constraints`, then run the tests again."


def test_the_pins_are_what_runs_here() -> None:
    different = {}
    for name, pinned in ALL.items():
        try:
            installed = Version(version(name)).public
        except PackageNotFoundError:
            installed = "missing"
            if BUILD_OF_TORCH.match(name):
                continue
        if installed != pinned:
            different[name] = f"{installed} instead of {pinned}"
    assert not different, (
        f"{different}: `{REINSTALL}` installs the pinned versions; "
        "if the installed ones are wanted, `make constraints && make test`."
    )


def test_lower_bounds_admit_no_release_with_a_known_hole() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + [each for extra in project["optional-dependencies"].values() for each in extra]
    bounds = {}
    for requirement in map(Requirement, listed):
        name = canonicalize_name(requirement.name)
        if name == PROJECT:
            continue
        [bound] = [each.version for each in requirement.specifier if each.operator == ">="]
        bounds[name] = Version(bound)
        assert requirement.specifier.contains(ALL[name]), f"{requirement} excludes the tested {ALL[name]}"
        assert Version(bound) <= Version(ALL[name])
    for name, fixed in FIXED.items():
        assert bounds[name] >= Version(fixed), f"{name}>={bounds[name]} admits releases before {fixed}"


@pytest.mark.parametrize("file", ["Makefile", "cluster/Dockerfile"])
def test_installations_use_every_pin(file: str) -> None:
    lines = [line for line in (ROOT / file).read_text().splitlines() if "pip install" in line]
    assert lines
    for line in lines:
        assert "-c constraints-all.txt" in line or "--no-deps" in line, line


FROZEN = "mlflow==3.99.0\nnvidia-cublas==13.1.1.3\ntorch==9.9.9+cu130\npanopticapi @ file:///somewhere\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the Makefile, in which `python -m pip` prints `frozen` or writes its call to `installs`."""
    for name in ("Makefile", "pyproject.toml", "constraints-all.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nif [ "$3" = freeze ]; then cat frozen; else echo "$*" >> installs; fi\n')
    python.chmod(0o755)
    (tmp_path / ".venv" / "installed").touch()
    (tmp_path / "frozen").write_text(FROZEN)
    return tmp_path


def make(checkout: Path, target: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "PYTHON=false", target], cwd=checkout, capture_output=True, text=True, timeout=60, check=False
    )


def age(file: Path) -> None:
    """Make a file older than every other."""
    os.utime(file, (1, 1))


def test_make_constraints_writes_what_is_installed_and_installs_nothing(checkout: Path) -> None:
    age(checkout / ".venv" / "installed")  # the project's files have changed
    result = make(checkout, "constraints")
    assert result.returncode == 0, result.stderr
    assert not (checkout / "installs").exists()
    written = (checkout / "constraints-all.txt").read_text().splitlines()
    assert written[0] == (ROOT / "constraints-all.txt").read_text().splitlines()[0]
    assert written[1:] == ["mlflow==3.99.0", "nvidia-cublas==13.1.1.3", "torch==9.9.9"]


@pytest.mark.parametrize(
    "frozen", [FROZEN.replace("nvidia-cublas==13.1.1.3\n", "").replace("cu130", "cpu"), None], ids=["cpu", "failed"]
)
def test_make_constraints_refuses_a_build_for_cpus_and_a_pip_that_fails(checkout: Path, frozen: str | None) -> None:
    if frozen is None:
        (checkout / "frozen").unlink()
    else:
        (checkout / "frozen").write_text(frozen)
    result = make(checkout, "constraints")
    assert result.returncode
    assert ("build for CPUs" in result.stderr) == (frozen is not None)
    assert (checkout / "constraints-all.txt").read_text() == (ROOT / "constraints-all.txt").read_text()


def test_make_constraints_needs_an_environment(checkout: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    result = make(checkout, "constraints")
    assert result.returncode
    assert "Call `make test` first." in result.stderr
    assert not (checkout / ".venv").exists()


def test_the_pinned_versions_come_back_as_the_hint_says(checkout: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints-all.txt"):
        age(checkout / name)
    make(checkout, ".venv/installed")
    assert not (checkout / "installs").exists()
    subprocess.run(REINSTALL, shell=True, cwd=checkout, capture_output=True, timeout=60, check=True)
    assert "-c constraints-all.txt" in (checkout / "installs").read_text()


def test_a_version_is_moved_before_the_tests_compare_it() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert '-c constraints.txt -e ".[dev]" && make constraints && make test\n' in page
