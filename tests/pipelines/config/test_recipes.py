"""Recipes against the published rules, written by hand instead of computed by the code under test."""

import re
from collections import Counter

import pytest
import torch

from maskformer import build_model
from maskformer.optim import parameter_groups
from pipelines import recipes
from pipelines.config.recipes import (
    COCO_TRAIN_IMAGES,
    PUBLISHED,
    R50_MMDET,
    R50_ORIGINAL,
    RECIPES,
    SWIN_L_MMDET,
    SWIN_L_ORIGINAL,
)
from pipelines.config.train import TrainConfig
from pipelines.data.order import total_steps
from pipelines.planning.describe import describe

HEAD_NORMS = (
    r"pixel_decoder\.(top|laterals\.\d|outputs\.\d)\.1\.|pixel_decoder\.encoder\.\d\.\w+_norm\."
    r"|transformer_decoder\.(layers\.\d\.\w+_)?norm\."
)
SWIN_NORMS = r"backbone\.(norms\.\d|features\.0\.2|features\.[246]\.norm|features\.[1357]\.\d+\.norm[12])\."

# (names, learning rate, weight decay); the first line that matches holds.
RULES = {
    "r50_mmdet": [
        (r"backbone\.", 1e-5, 1e-4),
        (HEAD_NORMS + r"|query_embedding\.", 1e-4, 0.0),
        (r"", 1e-4, 1e-4),
    ],
    "r50_original": [
        (r"backbone\.", 1e-5, 1e-4),
        (HEAD_NORMS + r"|query_embedding\.", 1e-4, 0.0),
        (r"", 1e-4, 1e-4),
    ],
    # mmdetection tries the longest key first: relative_position_bias_table, query_embed, backbone, norm.
    "swin_l_mmdet": [
        (r".*relative_position_bias_table$", 6e-5, 0.0),
        (r"query_embedding\.", 6e-5, 0.0),
        (r"backbone\.", 6e-6, 0.01),
        (HEAD_NORMS, 6e-5, 0.0),
        (r"", 6e-5, 0.01),
    ],
    "swin_l_original": [
        (r".*relative_position_bias_table$|query_embedding\.", 6e-5, 0.0),
        (SWIN_NORMS + "|" + HEAD_NORMS, 6e-5, 0.0),
        (r"", 6e-5, 0.01),
    ],
}

TENSORS = {
    "r50_mmdet": {(1e-5, 1e-4): 53, (1e-4, 1e-4): 139, (1e-4, 0.0): 77},
    "r50_original": {(1e-5, 1e-4): 53, (1e-4, 1e-4): 139, (1e-4, 0.0): 77},
    "swin_l_mmdet": {(6e-6, 0.01): 309, (6e-5, 0.01): 91, (6e-5, 0.0): 77},
    "swin_l_original": {(6e-5, 0.01): 197 + 91, (6e-5, 0.0): 112 + 77},
}


def test_recipes_are_mapped_by_their_name() -> None:
    defined = {value.recipe: value for value in vars(recipes).values() if isinstance(value, TrainConfig)}
    assert defined == RECIPES
    assert all(name == recipe.recipe for name, recipe in RECIPES.items())
    assert PUBLISHED.keys() == RECIPES.keys() - {"demo"}


@pytest.mark.parametrize("recipe", [R50_MMDET, R50_ORIGINAL, SWIN_L_MMDET, SWIN_L_ORIGINAL], ids=lambda r: r.recipe)
def test_every_parameter_has_the_published_rate_and_decay(recipe: TrainConfig) -> None:
    with torch.device("meta"):
        model = build_model(recipe.model)
    given = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, recipe.optimizer)
        for parameter in group["params"]
    }
    tensors: Counter[tuple[float, float]] = Counter()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in given
            continue
        rule = next((lr, decay) for names, lr, decay in RULES[recipe.recipe] if re.match(names, name))
        assert given[id(parameter)] == pytest.approx(rule, rel=1e-12), name
        tensors[rule] += 1
    assert tensors == TENSORS[recipe.recipe]


@pytest.mark.parametrize(
    ("recipe", "images", "batch", "steps", "drops_at", "warmup"),
    [
        # mmdetection's epochs, before its filter of images; every step is full, so up to a batch more is used.
        ("r50_mmdet", 8_871_525, 16, 554_471, 50 / 75, 0),
        ("swin_l_mmdet", 35_486_100, 64, 554_471, 250 / 300, 1500),
        *((f"r{depth}_original", 554_400 * 64, 64, 554_400, 2 / 3, 0) for depth in (50, 101)),
        *((f"swin_{size}_original", 554_400 * 64, 64, 554_400, 2 / 3, 1500) for size in "tsbl"),
    ],
)
def test_length_and_schedule(recipe: str, images: int, batch: int, steps: int, drops_at: float, warmup: int) -> None:
    config = RECIPES[recipe]
    assert (config.run.global_batch, config.run.micro_batch, config.scaling.workers) == (batch, 1, batch)
    length = config.run.steps or total_steps(config.run.epochs, COCO_TRAIN_IMAGES, batch)
    assert length == steps
    assert images <= length * batch < images + batch
    (epoch,) = config.schedule.milestone_epochs
    assert epoch * COCO_TRAIN_IMAGES / batch / steps == pytest.approx(drops_at, abs=2e-6)
    assert config.schedule.warmup_steps == warmup
    assert config.schedule.kind == "step"


def test_the_original_learning_rate_drops_at_step_369600_exactly() -> None:
    assert "x0.1 from step 369,600 " in describe(R50_ORIGINAL, COCO_TRAIN_IMAGES, "of COCO")


def test_other_differences_of_the_sources() -> None:
    for name, config in RECIPES.items():
        if name == "demo":
            continue
        original, swin = name.endswith("original"), name.startswith("swin")
        augment = config.data.augment
        assert config.model.dropout == 0.1
        assert config.model.decoder_feedforward_dropout == (0.1 if original else 0.0)
        assert config.model.drop_path == (0.3 if swin else 0.0)
        assert config.model.encoder_layers == (0 if swin else 6)
        assert config.model.initialization == ("original" if original else "mmdetection")
        assert config.data.require_thing == (not original)
        assert augment.interpolation == ("bilinear-antialias" if original else "bilinear")
        assert augment.crop_long_side == (None if original else 1333)
        assert augment.long_side == (1000 if name == "swin_l_original" else 1333)
        assert augment.keep_empty == original
        assert config.optimizer.clip_norm == 0.01
        assert config.precision == "float32"
        assert (config.optimizer.betas, config.optimizer.eps) == ((0.9, 0.999), 1e-8)
        assert name in PUBLISHED


def test_a_description_names_every_group_and_counts_every_parameter() -> None:
    text = describe(SWIN_L_MMDET, 1000, "of a pack")
    groups = re.findall(r"^(\S[\w, ]*?) +(\d+) +([\d,]+) +(\S+) +(\S+)$", text, re.MULTILINE)
    assert sum(int(tensors) for _, tensors, *_ in groups) == 477
    assert sum(int(count.replace(",", "")) for _, _, count, *_ in groups) == 211_571_258
    assert ("backbone, backbone norms", "309", "194,902,848", "6e-06", "0.01") in groups
    assert re.search(r"^images +1,000 of a pack$", text, re.MULTILINE)
    assert "4,688 steps = 300.03 epochs: 300,032 images" in text
