"""The README against the repository: its files exist, its flags are accepted, and its figures stand in the code."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from pipelines import recipes
from pipelines.config import TrainConfig
from pipelines.data.order import total_steps

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^python (jobs/\w+\.py)((?:.*\\\n)*.*)$", README, re.M)


def test_every_file_in_the_tree_exists() -> None:
    tree = README.split("## Where things are")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names, _, _ = line.partition("   ")
        if not line.startswith(" "):
            folder = names.split()[0]
            assert (ROOT / folder).is_dir(), folder
        else:
            for name in re.findall(r"[\w/]+\.py|\w+/", line):
                found = list((ROOT / folder).rglob(name.rstrip("/")))
                assert found, f"{folder}{name}"


def test_every_job_is_listed_and_every_listed_job_exists() -> None:
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.M))
    there = {path.name for path in (ROOT / "jobs").glob("*.py") if "__main__" in path.read_text()}
    assert listed == there


@pytest.mark.parametrize("job", sorted({job for job, _ in COMMANDS}))
def test_every_flag_is_known(job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(ROOT / job), run_name="__main__")
    shown = capsys.readouterr().out
    for name, rest in COMMANDS:
        if name == job:
            for flag in re.findall(r"--[\w.-]+", rest):
                assert flag in shown, f"{job} {flag}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w[\w-]*)", README, re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_figures_of_the_recipes() -> None:
    for published in (recipes.R50_MMDET, recipes.SWIN_L_MMDET):
        assert isinstance(published, TrainConfig)
        assert f"{published.scaling.workers} x {published.run.micro_batch} | {published.run.epochs:g} epochs" in README
        assert total_steps(published.run.epochs, 118_287, published.run.global_batch) // 1000 == 554
    for recipe, published in recipes.PUBLISHED.items():
        pq = published.removeprefix("PQ ")[:4]
        assert re.search(rf"^\| `{recipe}` \|.*\| {pq} ", README, re.M), recipe
    assert f"{recipes.DEMO.scaling.workers} CPU processes x {recipes.DEMO.run.micro_batch}" in README
    assert f"{recipes.DEMO.run.steps} steps" in README
