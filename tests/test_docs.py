"""The documentation against the repository: real jobs parse its commands, and its files, names and figures exist."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.shared import cli, training
from jobs.shared.main import main
from pipelines import recipes
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.order import total_steps
from pipelines.data.synthetic import SyntheticConfig, draw_and_pack

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    ROOT / "cluster" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text("utf-8") for page in PAGES}
README = TEXTS["README.md"]
JOBS = sorted(file.stem for file in (ROOT / "jobs").glob("*.py") if "__main__" in file.read_text("utf-8"))

CALL = re.compile(r"python\s+(?:/app/)?(?:jobs|docs)/[a-z]|maskformer-ray\s+[a-z]")
FOREIGN_FLAGS = {"--working-dir", "--runtime-env-json"}  # of `ray job submit`


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def spans(text: str) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def lines(text: str) -> list[str]:
    """Return the command lines of a page: those of its shell blocks, and inline code."""
    blocks = [line for block in fenced(text, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [*blocks, *spans(text)]


def calls(line: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each job that a line starts, with its arguments: `submit.py -- python jobs/train_r50.py` starts two."""
    if not CALL.search(line):
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = list(lexer)
    for number, (word, following) in enumerate(pairwise(words)):
        script = re.fullmatch(r"(?:/app/)?((?:jobs|docs)/[a-z][\w/]*)\.py", following)
        arguments = list(takewhile(lambda each: not set(each) <= set(";&|<>()"), words[number + 2 :]))
        if Path(word).name == "python" and script:
            yield script[1], arguments
        elif word == "maskformer-ray" and re.fullmatch(r"[a-z][\w-]*", following):
            yield f"jobs/{following.replace('-', '_')}", arguments


COMMANDS = [
    (page, job, arguments) for page, text in TEXTS.items() for line in lines(text) for job, arguments in calls(line)
]


class ParsedError(Exception):
    """Ends a job when its flags have been parsed."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, list[str]], None]:
    """Return a function that has a job parse arguments, without running it. It fails if the job refuses them."""
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"optimizer.lr": 0.0002}))

    def stop(*args: Any, **options: Any) -> None:
        cli.parse(*args, **options)
        raise ParsedError

    def parsed(job: str, arguments: list[str]) -> None:
        # The value of --config is the only one that parsing reads: a placeholder is replaced by a real file.
        given = [str(file) if flag == "--config" else value for flag, value in pairwise(["", *arguments])]
        module = load(job)
        if not hasattr(module, "parse") and not hasattr(module, "train"):
            assert not given, f"{job} takes no arguments"
            return
        for user in (module, training):
            if hasattr(user, "parse"):
                monkeypatch.setattr(user, "parse", stop)
        monkeypatch.setattr(sys, "argv", [f"{job}.py", *given])
        with pytest.raises((ParsedError, SystemExit)) as end:
            module.main()
        # 0 is the status of --help.
        assert not isinstance(end.value, SystemExit) or end.value.code == 0, f"{job} refuses {shlex.join(arguments)}"

    return parsed


def load(script: str) -> Any:
    """Import a script by its path without suffix."""
    if script.startswith("jobs/"):
        return importlib.import_module(script.replace("/", "."))
    spec = importlib.util.spec_from_file_location(Path(script).name, ROOT / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None, script
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- commands


@pytest.mark.parametrize(
    ("job", "arguments"),
    [pytest.param(job, arguments, id=f"{page}: {job} {shlex.join(arguments)}") for page, job, arguments in COMMANDS],
)
def test_every_command_is_accepted(job: str, arguments: list[str], parse: Callable[[str, list[str]], None]) -> None:
    parse(job, arguments)


@pytest.mark.parametrize(
    ("job", "arguments"),
    [
        ("jobs/train_r50", ["--run.label", "r50"]),
        ("jobs/evaluate", ["--checkpoint", "runs/demo", "--data", "val", "--predictors", "8"]),
        ("jobs/bench/padding", ["--rounds", "2"]),
        ("jobs/sweep", ["--config", "best.json", "--sweep.trials", "few"]),
    ],
)
def test_a_wrong_command_is_noticed(job: str, arguments: list[str], parse: Callable[[str, list[str]], None]) -> None:
    with pytest.raises(AssertionError):
        parse(job, arguments)


def test_commands_are_found_in_every_form() -> None:
    page = """Run `python jobs/evaluate.py --data val`.
```bash
python jobs/submit.py -- \\
    python jobs/train_r50.py --run.name a    # python jobs/plan.py
ray job submit -- python /app/jobs/sweep.py; maskformer-ray train-demo > log
```
"""
    assert [call for line in lines(page) for call in calls(line)] == [
        ("jobs/submit", ["--", "python", "jobs/train_r50.py", "--run.name", "a"]),
        ("jobs/train_r50", ["--run.name", "a"]),
        ("jobs/sweep", []),
        ("jobs/train_demo", []),
        ("jobs/evaluate", ["--data", "val"]),
    ]
    assert {job for _, job, _ in COMMANDS} >= {f"jobs/{name}" for name in JOBS}


def test_every_flag_in_the_text_exists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    known = set(FOREIGN_FLAGS)
    for job in [*JOBS, *(f"bench/{path.stem}" for path in (ROOT / "jobs/bench").glob("[a-z]*.py"))]:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", "--help-all"])
        with pytest.raises(SystemExit, match=r"^0$"):
            load(f"jobs/{job}").main()
        known |= set(re.findall(r"--[a-z][\w.-]*\w", capsys.readouterr().out))
    known |= {"--help-all"}
    # A row of the changelog ends with the present name of a flag, after its former one.
    texts = {**TEXTS, "CHANGELOG.md": re.sub(r"^(\|.*?\|).*?\|", r"\1", TEXTS["CHANGELOG.md"], flags=re.M)}
    for page, text in texts.items():
        mentioned = {flag for span in spans(text) for flag in re.findall(r"(?<!\S)--[a-z][\w.-]*\w", span)}
        assert mentioned <= known, page


def test_the_installed_command_starts_the_same_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = f'maskformer-ray = "{main.__module__}:{main.__name__}"'
    assert entry in (ROOT / "pyproject.toml").read_text().split("[project.scripts]")[1]
    monkeypatch.setattr(sys, "argv", ["maskformer-ray", "evaluate", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    mentioned = {
        target for text in TEXTS.values() for line in lines(text) for target in re.findall(r"^make (\w[\w-]*)", line)
    }
    assert mentioned >= {"demo", "test", "check", "numerics"}
    for target in mentioned:
        assert re.search(rf"^{target}:.*  ## ", makefile, re.M), target


def test_pre_commit_runs_the_commands_of_make_check() -> None:
    recipe = (ROOT / "Makefile").read_text().split("\ncheck:")[1].split("\n\n")[0]
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    [repository] = config["repos"]
    assert repository["repo"] == "local"
    hooks = [hook["entry"].replace(".venv/bin", "$(BIN)") for hook in repository["hooks"]]
    assert hooks == [line.strip() for line in recipe.splitlines()[1:]]


# ---- names


def test_a_release_in_the_changelog_has_each_heading_once() -> None:
    for release in re.split(r"^## ", TEXTS["CHANGELOG.md"], flags=re.M)[1:]:
        headings = re.findall(r"^### .*", release, re.M)
        assert len(headings) == len(set(headings)), headings


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if link.startswith("https://"):
                continue
            file, _, heading = link.partition("#")
            target = (ROOT / page).parent / file if file else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if heading:
                headings = re.findall(r"^#+ (.+)$", target.read_text("utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", name.lower()).replace(" ", "-") for name in headings}
                assert heading in slugs, f"{page}: {link}"


def test_every_path_in_the_text_exists() -> None:
    for page, text in TEXTS.items():
        for span in spans(text):
            if re.fullmatch(r"(?:maskformer|pipelines|jobs|cluster|docs|tests)/[\w./-]*", span) and "X" not in span:
                assert (ROOT / span).exists(), f"{page}: {span}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\((\S+\.md)", README))
    assert linked == set(TEXTS) - {"README.md"}


def test_the_layout_lists_every_room() -> None:
    layout = README.split("## Layout")[1].split("```")[1]
    listed = [line.split()[0].rstrip("/") for line in layout.strip().splitlines()]
    packages = [*ROOT.glob("pipelines/*/__init__.py"), *ROOT.glob("maskformer/*/__init__.py")]
    rooms = {str(file.parent.relative_to(ROOT)) for file in packages}
    rooms |= {"maskformer", "pipelines", "jobs", "jobs/shared", "jobs/bench", "cluster", "docs", "tests"}
    assert sorted(listed) == sorted(rooms)
    assert all((ROOT / name).is_dir() for name in listed)


def test_every_job_is_listed_and_every_listed_job_exists() -> None:
    listed = re.findall(r"^\| `(\w+)\.py` \|", README, re.M)
    assert sorted(listed) == JOBS


def test_python_snippets_compile_and_their_names_exist() -> None:
    snippets = [(page, code) for page, text in TEXTS.items() for code in fenced(text, "python")]
    assert snippets
    for page, code in snippets:
        tree = ast.parse(code, page)
        modules = {
            alias.asname or alias.name: importlib.import_module(alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                name, *attributes = ast.unparse(node).split(".")
                value: Any = modules.get(name)
                for attribute in attributes if value is not None and name.isidentifier() else ():
                    value = getattr(value, attribute.split("(")[0])


# ---- figures


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 150
    assert len(README.split()) <= 1200


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
    assert set(re.findall(r"^\| `(\w+)` \|", README, re.M)) == set(recipes.RECIPES)


# ---- the picture


def test_the_picture_is_small() -> None:
    file = ROOT / "docs" / "demo.png"
    assert file.stat().st_size < 100_000
    with Image.open(file) as picture:
        assert picture.width <= 1600


def test_the_picture_shows_image_ground_truth_and_prediction(tmp_path: Path) -> None:
    picture = load("docs/make_picture")
    pack = draw_and_pack(tmp_path / "demo-data", SyntheticConfig(split="val", num_images=4, max_side=64))
    samples = open_pack(pack)
    folder = tmp_path / "demo" / "evaluation" / "00000080-val"
    (folder / "predictions").mkdir(parents=True)
    # Predict the ground truth itself, and for the last image nothing.
    coco = tmp_path / "demo-data" / "coco"
    truth = json.loads((coco / "annotations" / "panoptic_val.json").read_text())
    for entry in truth["annotations"]:
        png = (coco / "annotations" / "panoptic_val" / entry["file_name"]).read_bytes()
        (folder / "predictions" / entry["file_name"]).write_bytes(png)
    truth["annotations"][-1]["segments_info"] = []
    (folder / "predictions.json").write_text(json.dumps(truth))

    assert picture.newest_predictions(folder.parent) == folder
    predicted = np.empty(0)
    for position in range(4):
        image, expected, predicted = (np.asarray(panel) for panel in picture.example(samples, position, folder))
        assert image.shape == expected.shape
        assert np.array_equal(expected, predicted) == (position < 3)
        drawn = np.asarray(Image.open(coco / "val" / truth["images"][position]["file_name"]))
        assert np.array_equal(image[:: picture.SCALE, :: picture.SCALE], drawn)
    assert {tuple(color) for color in predicted.reshape(-1, 3)} <= {picture.VOID, picture.OUTLINE}


def test_images_of_the_picture_are_evenly_spaced() -> None:
    positions = load("docs/make_picture").positions
    assert positions(200, 4) == [25, 75, 125, 175]
    assert positions(6, 6) == [0, 1, 2, 3, 4, 5]
