"""A configuration of any origin has limits, which are checked before anything is built."""

import math
import time
from dataclasses import fields
from typing import Any

import pytest

from maskformer import ModelConfig, PanopticConfig, build_model
from maskformer.config import DEMO, R50, SWIN_L
from maskformer.taxonomy import Category, Taxonomy
from pipelines.config.train import EvaluationConfig

ODD: list[Any] = [
    None,
    True,
    "6",
    [6],
    {},
    6.0,
    math.nan,
    math.inf,
    1e30,
    10**30,
    -1,
    2**62,
    -(2**62),
    "\x1b[2J",
    object(),
]


@pytest.mark.parametrize("name", [field.name for field in fields(ModelConfig)])
def test_every_field_refuses_what_it_cannot_be(name: str) -> None:
    for value in ODD:
        if name == "checkpoint_activations" and value is True:
            continue
        with pytest.raises(ValueError, match=rf"model\.{name} ") as error:
            ModelConfig(**{name: value})
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 400


@pytest.mark.parametrize("mean", [(1.0, 2.0), (1.0, 2.0, math.nan), (1.0, 2.0, True), [1.0, 2.0, 3.0], 1.0])
def test_means_and_deviations_are_three_numbers(mean: Any) -> None:
    for name in ("pixel_mean", "pixel_std"):
        with pytest.raises(ValueError, match=f"model.{name} must be"):
            ModelConfig(**{name: mean})
    with pytest.raises(ValueError, match=r"model\.pixel_std is out of range"):
        ModelConfig(pixel_std=(1.0, 0.0, 1.0))


def test_the_number_of_parameters_is_limited() -> None:
    with pytest.raises(ValueError, match="parameters besides its backbone, more than 1,000,000,000"):
        ModelConfig(hidden_dim=8192, decoder_layers=100)


@pytest.mark.parametrize("config", [R50, SWIN_L, DEMO])
def test_the_arithmetic_is_that_of_the_model(config: ModelConfig) -> None:
    import torch

    with torch.device("meta"):
        model = build_model(config)
    real = sum(each.numel() for name, each in model.named_parameters() if not name.startswith("backbone."))
    assert 0.9 * real < config._parameters() < real + 25_000 * config.hidden_dim


def test_limits_are_fast() -> None:
    start = time.perf_counter()
    for _ in range(100):
        ModelConfig()
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("value", [math.nan, True, "1", None, [1], 2, -1, math.inf])
def test_thresholds_are_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"panoptic\.score_threshold must"):
        PanopticConfig(score_threshold=value)


def test_sizes_are_limited() -> None:
    for name in ("short_side", "long_side"):
        with pytest.raises(ValueError, match=rf"evaluation\.{name} must be at most 10000 pixels, got 10001"):
            EvaluationConfig(**{name: 10_001})


@pytest.mark.parametrize(
    ("category", "message"),
    [
        (Category(-1, "a", True), "integer id"),
        (Category(2**31, "a", True), "integer id"),
        (Category(True, "a", True), "integer id"),
        (Category(1, "", True), "1 to 200 printable"),
        (Category(1, "a\nb", True), r"'a\\nb'"),
        (Category(1, "\x1b[2J", True), "printable"),
        (Category(1, "\ud800", True), "printable"),
        (Category(1, "x" * 201, True), "printable"),
    ],
)
def test_categories_are_limited(category: Category, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Taxonomy((category,))
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("categories", [5, "text", {"id": 1}, [1], [None], [[]], [{"id": 1, "name": 2, "isthing": 1}]])
def test_categories_of_a_file_are_a_list_of_objects(categories: Any) -> None:
    with pytest.raises(ValueError, match=r"[Cc]ategor"):
        Taxonomy.from_coco(categories)
    with pytest.raises(ValueError, match="at most 50,000"):
        Taxonomy.from_coco([{"id": number, "name": str(number), "isthing": 1} for number in range(50_001)])
