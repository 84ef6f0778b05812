"""Every leaf is a flag of its own; what is saved is what runs; only what decides the result counts as a change."""

import json
import sys
import types
import typing
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import parse
from pipelines import recipes
from pipelines.config import STORAGE, TRAIN_DATA, VAL_DATA, TrainConfig, from_dict, resolve, to_dict
from pipelines.errors import UserError
from pipelines.leaves import differing_leaves, leaves, with_leaves
from tests.jobs.command_line import flag

RECIPES = {name: value for name, value in vars(recipes).items() if isinstance(value, TrainConfig)}


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (TRAIN_DATA, VAL_DATA, STORAGE, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def named(tmp_path: Path) -> TrainConfig:
    """Return a configuration with all that `resolve` asks for."""
    return with_leaf(with_leaf(recipes.DEMO, "data.train", "/packs/train"), "run.storage", str(tmp_path))


def hints_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the type of every leaf by its dotted name."""
    types_of = typing.get_type_hints(type(config))
    found: dict[str, Any] = {}
    for field in fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        found |= hints_of(value, f"{name}.") if is_dataclass(value) else {name: types_of[field.name]}
    return found


def leaf(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = getattr(config, part)
    return config


def with_leaf(config: Any, name: str, value: Any) -> Any:
    part, _, rest = name.partition(".")
    return replace(config, **{part: with_leaf(getattr(config, part), rest, value) if rest else value})


def another(hint: Any, value: Any) -> Any:
    """Return a valid value of this type that is not `value`."""
    if isinstance(hint, types.UnionType):  # X | None
        return another(hint.__args__[0], value) if value is not None else 3
    if typing.get_origin(hint) is typing.Literal:
        return next(choice for choice in typing.get_args(hint) if choice != value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        # Of one length and ascending, as the ranges are; halved, so that shares and betas stay below 1.
        return tuple(item(v / 2) for v in value)
    if hint is bool:
        return not value
    if hint is str:
        return f"{value}x"
    if hint is float:
        return value / 2 if value else 0.25
    return 2 * value if value else 3


@pytest.mark.parametrize("name", ["SWIN_L_ORIGINAL", "DEMO"])
def test_one_flag_changes_one_leaf(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[name]
    hints = hints_of(recipe)
    assert hints.keys() == leaves(to_dict(recipe)).keys()
    for dotted, hint in hints.items():
        value = another(hint, leaf(recipe, dotted))
        assert value != leaf(recipe, dotted), dotted
        monkeypatch.setattr(sys, "argv", ["job", *flag(dotted, value)])
        parsed = parse(TrainConfig, recipe)
        assert parsed == with_leaf(recipe, dotted, value), dotted
        assert type(leaf(parsed, dotted)) is type(value), dotted


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_saved(name: str) -> None:
    recipe = RECIPES[name]
    assert from_dict(TrainConfig, to_dict(recipe)) == recipe
    for dotted, hint in hints_of(recipe).items():
        changed = with_leaf(recipe, dotted, another(hint, leaf(recipe, dotted)))
        assert from_dict(TrainConfig, to_dict(changed)) == changed, dotted


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_flags_is_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job"])
    assert parse(TrainConfig, RECIPES[name]) == RECIPES[name]


def test_an_older_version_refuses_what_it_does_not_know() -> None:
    saved = to_dict(recipes.DEMO)
    saved["optimizer"]["momentum"] = 0.9
    with pytest.raises(UserError, match="saved OptimizerConfig has momentum, which this version does not know"):
        from_dict(TrainConfig, saved)


def test_a_missing_place_is_named_with_its_flag_and_variable() -> None:
    with pytest.raises(UserError) as error:
        resolve(recipes.R50_MMDET)
    for word in ("--data.train", TRAIN_DATA, "--run.storage", STORAGE, "jobs/prepare_data.py"):
        assert word in str(error.value)
    with pytest.raises(UserError) as error:
        resolve(with_leaf(recipes.R50_MMDET, "data.train", "/packs/train"))
    assert "--data.train" not in str(error.value)


def test_environment_stands_in_for_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for variable, value in ((TRAIN_DATA, "train"), (VAL_DATA, "s3://b/val/"), (STORAGE, "runs")):
        monkeypatch.setenv(variable, value)
    config = resolve(recipes.DEMO)
    assert config.data.train == str(tmp_path / "train")
    assert config.data.val == "s3://b/val"
    assert config.run.storage == str(tmp_path / "runs")
    assert config.tracking.uri == f"sqlite:///{tmp_path}/runs/mlflow.db"
    named = with_leaf(recipes.DEMO, "data.train", "/given")
    assert resolve(named).data.train == "/given"


def test_resolving_twice_changes_nothing(named: TrainConfig) -> None:
    resolved = resolve(with_leaf(named, "weights", "r50.pth"))
    assert resolved.weights == str(Path("r50.pth").absolute())
    assert resolve(resolved) == resolved


def test_a_new_run_is_named_by_recipe_and_time(named: TrainConfig) -> None:
    before = datetime.now().replace(microsecond=0)
    name = resolve(with_leaf(named, "run.name", "")).run.name
    assert before <= datetime.strptime(name, "demo-%Y%m%d-%H%M%S") <= datetime.now()


def test_remote_storage_needs_a_server_and_no_sample_log(named: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = with_leaf(named, "run.storage", "s3://b/runs")
    with pytest.raises(UserError, match=r"s3://b/runs cannot hold a SQLite file.*--tracking\.uri"):
        resolve(remote)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert resolve(remote).tracking.uri == "http://host:5000"
    with pytest.raises(UserError, match=r"--run\.sample-log"):
        resolve(with_leaf(remote, "run.sample_log", True))


def test_a_relative_database_is_made_absolute(named: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have another directory."""
    for uri, path in (("sqlite:///mlflow.db", Path("mlflow.db").absolute()), ("sqlite:////srv/m.db", "/srv/m.db")):
        assert resolve(with_leaf(named, "tracking.uri", uri)).tracking.uri == f"sqlite:///{path}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert resolve(named).tracking.uri == f"sqlite:///{path}"


def test_an_impossible_number_of_workers_is_refused_with_the_nearest(named: TrainConfig) -> None:
    with pytest.raises(UserError, match=r"Use --scaling\.workers 16 \(possible: 1, 2, 4, 8, 16\)"):
        resolve(replace(named, run=replace(named.run, global_batch=16, micro_batch=1), scaling=workers(named, 13)))


def workers(config: TrainConfig, number: int) -> Any:
    return replace(config.scaling, workers=number)


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_run_name_is_one_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"--run\.storage"):
        with_leaf(recipes.DEMO, "run.name", name)


FREE = (
    "scaling", "checkpoint", "evaluation", "tracking", "run.storage", "run.sample_log",
    "data.train", "data.val", "data.samples_per_task", "data.prefetch",
)  # fmt: skip


def test_a_change_counts_if_it_decides_the_result() -> None:
    recipe = recipes.DEMO
    for dotted, hint in hints_of(recipe).items():
        value = another(hint, leaf(recipe, dotted))
        found = differing_leaves(to_dict(recipe), to_dict(with_leaf(recipe, dotted, value)))
        if dotted in FREE or dotted.partition(".")[0] in FREE:
            assert found == [], dotted
        else:
            (line,) = found
            assert line.startswith(f"{dotted}: "), dotted
            assert " -> " in line


def test_a_leaf_that_one_side_lacks_is_a_difference() -> None:
    old, new = to_dict(recipes.DEMO), to_dict(recipes.DEMO)
    del old["model"]["num_queries"]
    assert differing_leaves(old, new) == ["model.num_queries: absent -> 16"]
    assert differing_leaves(new, old) == ["model.num_queries: 16 -> absent"]


@pytest.mark.parametrize("name", ["SWIN_L_ORIGINAL", "DEMO"])
def test_one_leaf_replaced_leaves_all_others_equal(name: str) -> None:
    recipe = RECIPES[name]
    for dotted, hint in hints_of(recipe).items():
        value = another(hint, leaf(recipe, dotted))
        changed = with_leaf(recipe, dotted, value)
        for given in (value, json.loads(json.dumps(value))):
            assert with_leaves(recipe, {dotted: given}) == changed, dotted
            replaced = leaf(with_leaves(recipe, {dotted.replace("_", "-"): given}), dotted)
            assert (replaced, type(replaced)) == (value, type(value)), dotted


@pytest.mark.parametrize("name", RECIPES)
def test_all_leaves_replaced_are_another_recipe(name: str) -> None:
    assert with_leaves(recipes.DEMO, leaves(to_dict(RECIPES[name]))) == RECIPES[name]
    assert with_leaves(RECIPES[name], {}) == RECIPES[name]


def test_a_whole_number_becomes_a_float_where_one_is_wanted() -> None:
    assert repr(with_leaves(recipes.DEMO, {"optimizer.lr": 1}).optimizer.lr) == "1.0"
    assert with_leaves(recipes.DEMO, {"optimizer.betas": [0, 0.5]}).optimizer.betas == (0.0, 0.5)
    assert with_leaves(recipes.DEMO, {"run.steps": None}).run.steps is None


def test_leaves_that_need_each_other_are_replaced_together() -> None:
    with pytest.raises(UserError, match=r"refuses model\.num_heads = 5: model\.hidden_dim must be a multiple of"):
        with_leaves(recipes.DEMO, {"model.num_heads": 5})
    model = with_leaves(recipes.DEMO, {"model.num_heads": 5, "model.hidden_dim": 60}).model
    assert (model.num_heads, model.hidden_dim) == (5, 60)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zzz": 1}, r"no leaf 'zzz'\. --help of a training job lists all of them\."),
        ({"optimiser.weight_decy": 1}, r"no leaf .* Is it one of: .*optimizer\.weight_decay"),
        ({"lr": 1}, r"no leaf 'lr'\. Is it one of: optimizer\.lr\?"),
        ({"loss": 1}, r"no leaf 'loss'\. Is it one of: loss\.classification_weight, "),
        ({"run.global-batch": 8, "run.global_batch": 8}, r"run\.global_batch is given twice"),
        ({"optimizer.lr": "fast"}, r"optimizer\.lr is a finite number, got 'fast'\."),
        ({"optimizer.lr": True}, r"optimizer\.lr is a finite number, got True\."),
        ({"optimizer.lr": None}, r"optimizer\.lr is a finite number, got None\."),
        ({"run.epochs": float("nan")}, r"run\.epochs is a finite number, got nan\."),
        ({"run.epochs": 10**400}, r"run\.epochs is a finite number, got 10000"),
        ({"run.seed": 1.0}, r"run\.seed is a whole number, got 1\.0\."),
        ({"run.seed": True}, r"run\.seed is a whole number, got True\."),
        ({"run.steps": "many"}, r"run\.steps is a whole number, or none, got 'many'\."),
        ({"data.require_thing": 1}, r"data\.require_thing is true or false, got 1\."),
        ({"weights": None}, r"weights is a string, got None\."),
        ({"schedule.kind": "linear"}, r"schedule\.kind is one of step, cosine, got 'linear'\."),
        ({"schedule.kind": []}, r"schedule\.kind is one of step, cosine, got \[\]\."),
        ({"optimizer.betas": [0.9]}, r"optimizer\.betas is a list of 2, each a finite number, got \[0\.9\]\."),
        ({"data.augment.short_sides": [1, "2"]}, r"short_sides is a list, each a whole number, got \[1, '2'\]\."),
        ({"data.augment.short_sides": 5}, r"short_sides is a list, each a whole number, got 5\."),
        ({"loss.dice_weight": -1}, r"refuses loss\.dice_weight = -1\.0: loss\.dice_weight must not be negative"),
    ],
)
def test_a_leaf_that_cannot_be_replaced_is_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_leaves(recipes.DEMO, values)
