"""`--config FILE`: recipe < file < flags, for every job that trains, and user errors are explained with status 2."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines.demo.run
import pipelines.training
from jobs import plan, train_demo, train_r50
from jobs.shared.cli import run
from jobs.shared.training import flags_for
from pipelines.config.recipes import DEMO, R50_MMDET, R50_ORIGINAL
from pipelines.config.resolve import resolve
from pipelines.config.serialize import VERSION, to_dict
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.storage import locate

Train = Callable[..., TrainConfig]


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Train:
    """Return a function that runs train_r50.py and returns the configuration it would train."""
    started: list[TrainConfig] = []

    def fit(config: TrainConfig) -> None:
        started.append(config)
        raise UserError("Training starts here.")

    def job(*arguments: str) -> TrainConfig:
        monkeypatch.setattr(sys, "argv", ["train_r50.py", *arguments])
        with pytest.raises(UserError, match="Training starts here"):
            train_r50.main()
        return started.pop()

    monkeypatch.setattr(pipelines.training, "fit", fit)
    return job


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    """Return a function that writes a value as JSON and returns the file's name."""

    def write(value: Any) -> str:
        file = tmp_path / "settings.json"
        file.write_text(json.dumps(value))
        return str(file)

    return write


Write = Callable[[Any], str]


def test_flags_override_the_file_and_the_file_the_recipe(train: Train, write: Write) -> None:
    file = write({"optimizer": {"lr": 0.5, "weight_decay": 0.25}, "run": {"steps": 7}})
    config = train("--config", file, "--optimizer.lr", "0.125")
    optimizer = replace(R50_MMDET.optimizer, lr=0.125, weight_decay=0.25)
    assert config == replace(R50_MMDET, optimizer=optimizer, run=replace(R50_MMDET.run, steps=7))
    assert train(f"--config={file}").optimizer.lr == 0.5
    assert train() == R50_MMDET


def test_settings_are_nested_or_dotted(train: Train, write: Write) -> None:
    config = train("--config", write({"data.augment.short-sides": [3, 4], "data": {"augment": {"long_side": 5}}}))
    augment = replace(R50_MMDET.data.augment, short_sides=(3, 4), long_side=5)
    assert config == replace(R50_MMDET, data=replace(R50_MMDET.data, augment=augment))


def test_the_file_may_choose_the_recipe(train: Train, write: Write) -> None:
    file = write({"recipe": "r50_original", "run": {"steps": 7}})
    expected = replace(R50_ORIGINAL, run=replace(R50_ORIGINAL.run, steps=7))
    assert train("--config", file) == expected
    assert train("--config", file, "--recipe", "r50_original") == expected
    assert train("--config", write({"run.steps": 7}), "--recipe", "r50_original") == expected


def test_the_record_of_a_run_is_all_of_it_but_its_name(train: Train, write: Write, tmp_path: Path) -> None:
    ran = resolve(
        replace(
            R50_ORIGINAL,
            data=replace(R50_ORIGINAL.data, train="/packs/train"),
            run=replace(R50_ORIGINAL.run, name="first", storage=str(tmp_path), steps=9),
        )
    )
    record = {"version": VERSION, "config": to_dict(ran), "data_hash": "0", "total_steps": 9, "mlflow_run_id": "1"}
    assert train("--config", write(record)) == replace(ran, run=replace(ran.run, name=""))
    assert train("--config", write(record), "--run.name", "second").run.name == "second"
    assert train("--config", write(to_dict(ran))) == ran


@pytest.mark.parametrize(
    ("version", "saved", "precision"),
    [(2, "bfloat16", "auto"), (2, "float32", "float32"), (VERSION, "bfloat16", "bfloat16")],
)
def test_bfloat16_of_an_older_record_stays_for_gpus_only(
    train: Train, write: Write, version: int, saved: str, precision: str
) -> None:
    record = {"version": version, "config": {"recipe": "r50_original", "precision": saved}, "data_hash": "0"}
    assert train("--config", write(record)).precision == precision


def test_a_file_in_a_bucket(train: Train, bucket: str) -> None:
    (locate(bucket) / "settings.json").write_text('{"optimizer.lr": 0.5}')
    assert train("--config", f"{bucket}/settings.json").optimizer.lr == 0.5


def test_the_flags_for_a_file_make_it_usable(train: Train, bucket: str) -> None:
    storage = f"{bucket}/my runs"
    config = replace(R50_MMDET, run=replace(R50_MMDET.run, storage=storage), data=replace(R50_MMDET.data, train="/a b"))
    (locate(storage) / "best.json").write_text(json.dumps(to_dict(config)))
    given = flags_for(f"{storage}/best.json", config)
    assert given == f"--config '{storage}/best.json' --run.storage '{storage}'"
    assert train(*shlex.split(given)) == config


def test_the_demo_takes_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[TrainConfig] = []

    def run_demo(config: TrainConfig) -> None:
        started.append(config)
        raise UserError("The demonstration starts here.")

    monkeypatch.setattr(pipelines.demo.run, "run_demo", run_demo)
    monkeypatch.setattr(sys, "argv", ["job", "--config", write({"run.steps": 3}), "--run.seed", "4"])
    with pytest.raises(UserError, match="starts here"):
        train_demo.main()
    assert started == [replace(DEMO, run=replace(DEMO.run, steps=3, seed=4, storage="runs"))]


@pytest.mark.parametrize("main", [plan.main, train_r50.main])
def test_help_names_the_flag(
    main: Callable[[], int | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    assert "--config FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        ("", [], r"{file} is not JSON: .*Give --config a JSON object of settings, such as"),
        ('{"run": ', [], r"{file} is not JSON: "),
        (100_000 * "[", [], r"{file} is not JSON: its lists and objects are nested too deeply"),
        ("\udcff", [], r"{file} is not JSON: "),
        ("[1]", [], r"{file} holds a list\. Give --config a JSON object"),
        ('{"optimizer": {"momentum": 0.9}}', [], r"{file} cannot be used .* no setting 'optimizer\.momentum'"),
        ('{"config": 1}', [], r"{file} cannot be used .* no setting 'config'"),
        (
            '{"config": {}, "data_hash": "0"}',
            [],
            r"{file} was written by another version of maskformer-ray \(version 1",
        ),
        ('{"config": {"model": {"depth": 1}}}', [], r"{file} cannot be used .* no setting 'model\.depth'"),
        ('{"run": {"steps": "9"}}', [], r"{file} cannot be used .* run\.steps must be an integer"),
        ('{"run": {"steps": 0}}', [], r"{file} cannot be used .* A run needs at least one step"),
        (
            '{"recipe": "demo"}',
            [],
            r"no recipe 'demo' for this job, which {file} is for\. Use --recipe with one of: r50",
        ),
        ('{"recipe": ["demo"]}', [], r"no recipe \['demo'\] for this job, which {file} is for"),
        (
            '{"recipe": "r50_mmdet"}',
            ["--recipe", "r50_original"],
            r"--recipe r50_original contradicts {file}, .*r50_mmdet",
        ),
    ],
)
def test_a_file_that_cannot_be_used(
    content: str,
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "settings.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert_refused(["--config", str(file), *more], message.format(file=file), monkeypatch, capsys)


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_a_file_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / name)
    assert_refused(["--config", path], f"There is no file {path}. Give --config a JSON", monkeypatch, capsys)


def assert_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", *arguments])
    with pytest.raises(SystemExit) as end:
        run(train_r50.main)
    streams = capsys.readouterr()
    assert (end.value.code, streams.out) == (2, "")
    (paragraph,) = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, paragraph)
    assert streams.err.endswith(f"{paragraph}\n")
