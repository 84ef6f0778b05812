"""Every setting is a flag of its own, and impossible settings are refused."""

import sys
from dataclasses import replace
from typing import Literal

import pytest

from jobs.shared.cli import parse
from pipelines.config.overrides import flatten
from pipelines.config.recipes import DEMO, RECIPES
from pipelines.config.serialize import to_dict
from pipelines.config.train import TrainConfig
from tests.jobs.command_line import flag
from tests.pipelines.config.settings import another, field_types_of, setting, with_setting


@pytest.mark.parametrize("name", ["swin_l_original", "demo"])
def test_one_flag_changes_one_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = RECIPES[name]
    hints = field_types_of(recipe)
    assert hints.keys() == flatten(to_dict(recipe)).keys()
    for dotted, hint in hints.items():
        value = another(hint, setting(recipe, dotted))
        assert value != setting(recipe, dotted), dotted
        monkeypatch.setattr(sys, "argv", ["job", *flag(dotted, value)])
        parsed = parse(TrainConfig, recipe)
        assert parsed == with_setting(recipe, dotted, value), dotted
        assert type(setting(parsed, dotted)) is type(value), dotted


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_flags_is_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job"])
    assert parse(TrainConfig, RECIPES[name]) == RECIPES[name]


@pytest.mark.parametrize("name", ["a/b", ".hidden"])
def test_a_run_name_is_one_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"--run\.storage"):
        with_setting(DEMO, "run.name", name)


@pytest.mark.parametrize(
    ("precision", "on_gpus", "on_cpus"),
    [("auto", "bfloat16", "float32"), ("bfloat16", "bfloat16", "bfloat16"), ("float32", "float32", "float32")],
)
def test_the_precision_of_the_network(
    precision: Literal["auto", "bfloat16", "float32"], on_gpus: str, on_cpus: str
) -> None:
    config = replace(DEMO, precision=precision)
    assert (config.network_precision("cuda"), config.network_precision("cpu")) == (on_gpus, on_cpus)
