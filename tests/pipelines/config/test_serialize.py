"""A configuration survives being saved as JSON, and what does not belong in it is refused."""

from typing import Any

import pytest

from pipelines.config.publish import PublishConfig
from pipelines.config.recipes import DEMO, RECIPES
from pipelines.config.serialize import from_dict, to_dict
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from tests.pipelines.config.settings import another, field_types_of, setting, with_setting


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_being_saved(name: str) -> None:
    recipe = RECIPES[name]
    assert from_dict(TrainConfig, to_dict(recipe)) == recipe
    for dotted, hint in field_types_of(recipe).items():
        changed = with_setting(recipe, dotted, another(hint, setting(recipe, dotted)))
        assert from_dict(TrainConfig, to_dict(changed)) == changed, dotted


def test_unknown_settings_in_a_saved_configuration_are_refused() -> None:
    saved = to_dict(DEMO)
    saved["optimizer"]["momentum"] = 0.9
    with pytest.raises(
        UserError, match="saved OptimizerConfig has the settings momentum, which this version does not have"
    ):
        from_dict(TrainConfig, saved)


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("optimizer", "lr", "fast", r"saved OptimizerConfig has lr = 'fast', which should be a finite number\."),
        ("run", "steps", 2.5, r"saved RunConfig has steps = 2\.5, which should be an integer, or none\."),
        (None, "model", 3, r"saved TrainConfig has model = 3, which should be nested settings\."),
    ],
)
def test_saved_values_of_the_wrong_type_are_refused(part: str | None, name: str, value: Any, message: str) -> None:
    saved = to_dict(DEMO)
    (saved[part] if part else saved)[name] = value
    with pytest.raises(UserError, match=message):
        from_dict(TrainConfig, saved)


def test_other_configurations_are_saved_alike() -> None:
    config = PublishConfig(checkpoint="runs/a", data="val")
    assert from_dict(PublishConfig, to_dict(config)) == config
    assert setting(from_dict(PublishConfig, {"checkpoint": "c", "data": "d"}), "scaling.workers") == 1
