"""Resolving: paths become absolute, defaults come from the environment, and what is missing is reported."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from pipelines.config.recipes import DEMO, R50_MMDET
from pipelines.config.resolve import resolve
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from tests.pipelines.config.settings import with_setting


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MASKFORMER_TRAIN_DATA", "MASKFORMER_VAL_DATA", "MASKFORMER_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def named(tmp_path: Path) -> TrainConfig:
    """Return a configuration with everything that `resolve` requires."""
    return with_setting(with_setting(DEMO, "data.train", "/packs/train"), "run.storage", str(tmp_path))


def test_a_missing_location_is_reported_with_flag_and_variable() -> None:
    with pytest.raises(UserError) as error:
        resolve(R50_MMDET)
    for word in (
        "--data.train",
        "MASKFORMER_TRAIN_DATA",
        "--run.storage",
        "MASKFORMER_STORAGE",
        "jobs/prepare_data.py",
    ):
        assert word in str(error.value)
    with pytest.raises(UserError) as error:
        resolve(with_setting(R50_MMDET, "data.train", "/packs/train"))
    assert "--data.train" not in str(error.value)


def test_environment_variables_are_used_for_empty_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in (
        ("MASKFORMER_TRAIN_DATA", "train"),
        ("MASKFORMER_VAL_DATA", "s3://b/val/"),
        ("MASKFORMER_STORAGE", "runs"),
    ):
        monkeypatch.setenv(variable, value)
    config = resolve(DEMO)
    assert config.data.train == str(tmp_path / "train")
    assert config.data.val == "s3://b/val"
    assert config.run.storage == str(tmp_path / "runs")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    named = with_setting(DEMO, "data.train", "/given")
    assert resolve(named).data.train == "/given"


def test_resolving_twice_changes_nothing(named: TrainConfig) -> None:
    resolved = resolve(with_setting(named, "weights", "r50.pth"))
    assert resolved.weights == str(Path("r50.pth").absolute())
    assert resolve(resolved) == resolved


def test_a_new_run_is_named_by_recipe_and_time(named: TrainConfig) -> None:
    before = datetime.now().replace(microsecond=0)
    name = resolve(with_setting(named, "run.name", "")).run.name
    assert before <= datetime.strptime(name, "demo-%Y%m%d-%H%M%S") <= datetime.now()


def test_remote_storage_needs_a_server_and_no_files_that_grow(
    named: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = with_setting(named, "run.storage", "s3://b/runs")
    with pytest.raises(UserError, match=r"s3://b/runs cannot hold a SQLite file.*--tracking\.uri"):
        resolve(remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve(remote).tracking.uri == "http://host:5000"
    with pytest.raises(UserError, match=r"--run\.sample-log"):
        resolve(with_setting(remote, "run.sample_log", True))
    with pytest.raises(UserError, match=r"--tracking\.tensorboard .*s3://b/runs.* MLflow has the same curves"):
        resolve(with_setting(remote, "tracking.tensorboard", True))


def test_a_relative_database_is_made_absolute(named: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have a different working directory."""
    for uri, path in (("sqlite:///mlflow.db", Path("mlflow.db").absolute()), ("sqlite:////srv/m.db", "/srv/m.db")):
        assert resolve(with_setting(named, "tracking.uri", uri)).tracking.uri == f"sqlite:///{path}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert resolve(named).tracking.uri == f"sqlite:///{path}"


def test_an_impossible_number_of_workers_is_refused_with_the_nearest(named: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"Use --scaling\.workers 16 \(possible: 1, 2, 4, 8, 16\)"):
        resolve(
            replace(
                named,
                run=replace(named.run, global_batch=16, micro_batch=1),
                scaling=replace(named.scaling, workers=13),
            )
        )
