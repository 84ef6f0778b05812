"""Overrides by dotted name replace what they name, and only changes that affect the result are differences."""

import json
from typing import Any

import pytest

from pipelines.config.overrides import differing_settings, field_name, flatten, with_overrides
from pipelines.config.recipes import DEMO, RECIPES
from pipelines.config.serialize import to_dict
from pipelines.errors import UserError
from tests.pipelines.config.settings import another, field_types_of, setting, with_setting

RESUMABLE = (
    "scaling", "checkpoint", "evaluation", "tracking", "run.storage", "run.sample_log",
    "run.non_finite", "run.patience", "model.checkpoint_activations",
    "data.train", "data.val", "data.samples_per_task", "data.object_store_gb", "data.prefetch", "data.damaged",
)  # fmt: skip


def test_only_changes_that_affect_the_result_are_listed() -> None:
    recipe = DEMO
    for dotted, hint in field_types_of(recipe).items():
        value = another(hint, setting(recipe, dotted))
        found = differing_settings(to_dict(recipe), to_dict(with_setting(recipe, dotted, value)))
        if dotted in RESUMABLE or dotted.partition(".")[0] in RESUMABLE:
            assert found == [], dotted
        else:
            (line,) = found
            assert line.startswith(f"{dotted}: "), dotted
            assert " -> " in line


def test_a_setting_that_one_side_lacks_is_a_difference() -> None:
    old, new = to_dict(DEMO), to_dict(DEMO)
    del old["model"]["num_queries"]
    assert differing_settings(old, new) == ["model.num_queries: absent -> 16"]
    assert differing_settings(new, old) == ["model.num_queries: 16 -> absent"]


@pytest.mark.parametrize("name", ["swin_l_original", "demo"])
def test_one_override_keeps_all_other_settings(name: str) -> None:
    recipe = RECIPES[name]
    for dotted, hint in field_types_of(recipe).items():
        value = another(hint, setting(recipe, dotted))
        changed = with_setting(recipe, dotted, value)
        for given in (value, json.loads(json.dumps(value))):
            assert with_overrides(recipe, {dotted: given}) == changed, dotted
            replaced = setting(with_overrides(recipe, {dotted.replace("_", "-"): given}), dotted)
            assert (replaced, type(replaced)) == (value, type(value)), dotted


@pytest.mark.parametrize("name", RECIPES)
def test_overriding_all_settings_gives_the_other_recipe(name: str) -> None:
    assert with_overrides(DEMO, flatten(to_dict(RECIPES[name]))) == RECIPES[name]
    assert with_overrides(RECIPES[name], {}) == RECIPES[name]


def test_an_integer_becomes_a_float_where_one_is_expected() -> None:
    assert repr(with_overrides(DEMO, {"optimizer.lr": 1}).optimizer.lr) == "1.0"
    assert with_overrides(DEMO, {"optimizer.betas": [0, 0.5]}).optimizer.betas == (0.0, 0.5)
    assert with_overrides(DEMO, {"run.steps": None}).run.steps is None


def test_dependent_settings_are_overridden_together() -> None:
    with pytest.raises(
        UserError, match=r"^Invalid configuration with model\.num_heads = 5: model\.hidden_dim must be a multiple of"
    ):
        with_overrides(DEMO, {"model.num_heads": 5})
    model = with_overrides(DEMO, {"model.num_heads": 5, "model.hidden_dim": 60}).model
    assert (model.num_heads, model.hidden_dim) == (5, 60)


def test_field_names() -> None:
    for name in field_types_of(DEMO):
        assert field_name(name) == field_name(name.replace("_", "-")) == name
    with pytest.raises(UserError, match=r"no setting 'optim\.lr'\. Did you mean: .*optimizer\.lr"):
        field_name("optim.lr")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zzz": 1}, r"no setting 'zzz'\. --help-all of a training job lists them\."),
        ({"optimizer.weight_decy": 1}, r"no setting .* Did you mean: .*optimizer\.weight_decay"),
        ({"lr": 1}, r"no setting 'lr'\. Did you mean: optimizer\.lr\?"),
        ({"loss": 1}, r"no setting 'loss'\. Did you mean: loss\.classification_weight, "),
        ({"run.global-batch": 8, "run.global_batch": 8}, r"run\.global_batch is given twice"),
        ({"optimizer.lr": "fast"}, r"optimizer\.lr must be a finite number, got 'fast'\."),
        ({"optimizer.lr": True}, r"optimizer\.lr must be a finite number, got True\."),
        ({"optimizer.lr": None}, r"optimizer\.lr must be a finite number, got None\."),
        ({"run.epochs": float("nan")}, r"run\.epochs must be a finite number, got nan\."),
        ({"run.epochs": 10**400}, r"run\.epochs must be a finite number, got 10000"),
        ({"run.seed": 1.0}, r"run\.seed must be an integer, got 1\.0\."),
        ({"run.seed": True}, r"run\.seed must be an integer, got True\."),
        ({"run.steps": "many"}, r"run\.steps must be an integer, or none, got 'many'\."),
        ({"data.require_thing": 1}, r"data\.require_thing must be true or false, got 1\."),
        ({"weights": None}, r"weights must be a string, got None\."),
        ({"schedule.kind": "linear"}, r"schedule\.kind must be one of step, cosine, got 'linear'\."),
        ({"schedule.kind": []}, r"schedule\.kind must be one of step, cosine, got \[\]\."),
        ({"optimizer.betas": [0.9]}, r"optimizer\.betas must be a list of 2, each a finite number, got \[0\.9\]\."),
        ({"data.augment.short_sides": [1, "2"]}, r"short_sides must be a list, each an integer, got \[1, '2'\]\."),
        ({"data.augment.short_sides": 5}, r"short_sides must be a list, each an integer, got 5\."),
        (
            {"loss.dice_weight": -1},
            r"Invalid configuration with loss\.dice_weight = -1\.0: loss\.dice_weight must not be negative",
        ),
    ],
)
def test_an_invalid_override_is_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_overrides(DEMO, values)
