"""The combinations of a sweep by definition (strata, equal ratios, no duplicates), and refused search spaces."""

import itertools
import json
import math
from typing import Any

import pytest

from pipelines.config.overrides import with_overrides
from pipelines.config.recipes import DEMO, SWIN_L_ORIGINAL
from pipelines.errors import UserError
from pipelines.sweep.search_space import Choices, Range, combinations, parse, sample


def test_values_have_the_type_of_their_setting() -> None:
    texts = {
        "loss.dice-weight=1,2.5": Choices("loss.dice_weight", (1.0, 2.5)),
        "model.backbone=small, resnet50": Choices("model.backbone", ("small", "resnet50")),
        "data.require_thing=true,false": Choices("data.require_thing", (True, False)),
        "data.augment.crop_long_side=none,500": Choices("data.augment.crop_long_side", (None, 500)),
        "weights=../a,none": Choices("weights", ("../a", "none")),
        "optimizer.lr=1e-5..1e-3:log": Range("optimizer.lr", 1e-5, 1e-3, log=True),
        "model.drop_path=0..0.4": Range("model.drop_path", 0.0, 0.4),
        "model.num_queries=10 .. 20": Range("model.num_queries", 10, 20),
    }
    axes = parse(list(texts), DEMO)
    assert axes == tuple(texts.values())
    assert list(map(repr, axes)) == list(map(repr, texts.values()))  # 1.0 == 1 == True


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"The sweep varies nothing\. Use --sweep\.space SETTING=a,b,c"),
        (["optimizer.lr"], r"'optimizer\.lr' is not of the form SETTING=VALUES\. Use --sweep\.space SETTING=a,b,c"),
        (["optimizer.lr="], r"is not of the form SETTING=VALUES"),
        (["=1,2"], r"is not of the form SETTING=VALUES"),
        (["optimizer.learning-rate=1,2"], r"no setting 'optimizer\.learning-rate'"),
        (["loss.dice=1,2"], r"no setting 'loss\.dice'\. Did you mean: .*loss\.dice_weight"),
        (["loss.dice_weight=1,2", "loss.dice-weight=3..4"], r"has loss\.dice_weight twice"),
        (["loss.dice_weight=1,2,1.0"], r"has loss\.dice_weight=1\.0 twice"),
        (["loss.dice_weight=3"], r"has a single value\. .* --loss\.dice-weight"),
        (["weights=none,"], r"has an empty choice"),
        (["loss.dice_weight=1,two"], r"loss\.dice_weight must be a finite number, got 'two'"),
        (["loss.dice_weight=1,two"], r"^--sweep\.space loss\.dice_weight=1,two: "),
        (["model.num_queries=1.5,2"], r"model\.num_queries must be an integer, got '1\.5'"),
        (["optimizer.lr=none,1"], r"optimizer\.lr must be a finite number, got 'none'"),
        (["data.require_thing=yes,no"], r"data\.require_thing must be true or false, got 'yes'"),
        (["schedule.kind=step..cosine"], r"has a single value"),
        (["schedule.kind=step,linear"], r"schedule\.kind must be one of step, cosine, got 'linear'"),
        (["optimizer.lr=1e-5..fast"], r"is not a range of numbers"),
        (["optimizer.lr=1e-5..1e-3:ln"], r"is not a range of numbers"),
        (["optimizer.lr=1e-5..1e-3:"], r"is not a range of numbers"),
        (["model.num_queries=1..2.5"], r"is not a range of integers"),
        (["optimizer.lr=1e-3..1e-5"], r"is an empty range\. Put the lower bound first"),
        (["optimizer.lr=1e-3..1e-3"], r"is an empty range"),
        (["optimizer.lr=1..nan"], r"is an empty range"),
        (["optimizer.lr=1..inf"], r"optimizer\.lr must be a finite number, got inf"),
        (["optimizer.weight_decay=0..1:log"], r"cannot be logarithmic: its bounds must be positive"),
        (["loss.dice_weight=-1..1"], r"Invalid configuration with loss\.dice_weight = -1\.0: .* must not be negative"),
        (["model.drop_path=0..1"], r"Invalid configuration with model\.drop_path = 1\.0: .* must lie in \[0, 1\)"),
        (["model.num_heads=4,5"], r"Invalid configuration with model\.num_heads = 5: "),
        (["data.augment.short_sides=50,60"], r"short_sides is a list, which a sweep cannot vary"),
    ],
)
def test_a_space_that_cannot_be_swept(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(texts, DEMO)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        *((setting, "does not affect the result") for setting in (
            "recipe", "run.name", "run.storage", "run.sample_log", "data.prefetch", "data.samples_per_task",
            "scaling.workers", "scaling.device", "checkpoint.every", "tracking.uri",
        )),
        *((setting, "cannot be compared") for setting in (
            "data.train", "data.val", "evaluation.short_side", "run.steps", "run.epochs",
        )),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_vary(setting: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^A sweep cannot vary {setting}: .*{reason}"):
        parse([f"{setting}=1,2"], DEMO)


def distinct(trials: list[dict[str, Any]]) -> set[str]:
    found = {json.dumps(trial) for trial in trials}
    assert len(found) == len(trials)
    return found


GRID = ["loss.dice_weight=1,2,5", "model.backbone=small,resnet50", "data.require_thing=true,false"]


@pytest.mark.parametrize("count", [12, 13, 1000])
def test_a_small_grid_is_tried_completely(count: int) -> None:
    trials = sample(parse(GRID, DEMO), count, seed=0)
    expected = [
        {"loss.dice_weight": weight, "model.backbone": backbone, "data.require_thing": thing}
        for weight, backbone, thing in itertools.product((1.0, 2.0, 5.0), ("small", "resnet50"), (True, False))
    ]
    assert trials == expected


def test_a_larger_grid_is_sampled_without_repetition() -> None:
    axes = parse(GRID, DEMO)
    complete = distinct(sample(axes, 12, seed=0))
    for seed in range(20):
        trials = sample(axes, 11, seed)
        assert len(trials) == 11
        assert distinct(trials) < complete
    assert len({frozenset(distinct(sample(axes, 2, seed))) for seed in range(20)}) > 10
    assert combinations(axes) == 12
    assert combinations([*axes, Range("optimizer.lr", 1e-5, 1e-3, log=True)]) == math.inf
    huge = [Choices(f"setting{number}", tuple(range(100))) for number in range(9)]  # 10^18
    assert len(distinct(sample(huge, 50, seed=0))) == 50


MIXED = ["optimizer.lr=1e-5..1e-1:log", "model.dropout=0.1..0.5", "loss.dice_weight=1,2,5"]


@pytest.mark.parametrize("count", [1, 6, 33])
def test_each_part_of_each_range_is_tried_once(count: int) -> None:
    trials = sample(parse(MIXED, DEMO), count, seed=3)
    assert len(distinct(trials)) == count
    parts = {
        "optimizer.lr": [count * (math.log10(trial["optimizer.lr"]) + 5) / 4 for trial in trials],
        "model.dropout": [count * (trial["model.dropout"] - 0.1) / 0.4 for trial in trials],
    }
    for setting, values in parts.items():
        assert sorted(map(math.floor, values)) == list(range(count)), setting
    weights = [trial["loss.dice_weight"] for trial in trials]
    assert max(map(weights.count, (1.0, 2.0, 5.0))) - min(map(weights.count, (1.0, 2.0, 5.0))) <= 1


def test_every_combination_is_a_valid_configuration() -> None:
    axes = parse([*MIXED, "model.num_queries=1..9", "data.augment.crop_long_side=none,600"], SWIN_L_ORIGINAL)
    for trial in sample(axes, 20, seed=0):
        assert json.loads(json.dumps(trial)) == trial  # plain numbers, as trials.json needs
        config = with_overrides(SWIN_L_ORIGINAL, trial)
        assert config.optimizer.lr == trial["optimizer.lr"]
        assert config.data.augment.crop_long_side == trial["data.augment.crop_long_side"]


def test_integers_are_equally_likely_including_both_ends_and_never_tried_twice() -> None:
    (axis,) = parse(["model.num_queries=3..7"], DEMO)
    values = [axis.at(k / 1000) for k in range(1000)]
    assert {value: values.count(value) for value in values} == dict.fromkeys(range(3, 8), 200)
    assert {type(value) for value in values} == {int}
    assert sorted(trial["model.num_queries"] for trial in sample([axis], 40, seed=0)) == [3, 4, 5, 6, 7]


def test_integers_on_a_logarithmic_range_have_equal_ratios() -> None:
    (axis,) = parse(["model.num_queries=1..8:log"], DEMO)
    values = [axis.at(k / 90_000) for k in range(90_000)]
    for value in range(1, 9):
        assert values.count(value) / 90_000 == pytest.approx(math.log((value + 1) / value, 9), abs=1e-4)


@pytest.mark.parametrize("text", ["optimizer.lr=1e-7..0.3:log", "optimizer.lr=1e-7..0.3", "run.seed=0..3"])
def test_rounding_stays_inside_the_range(text: str) -> None:
    (axis,) = parse([text], DEMO)
    assert isinstance(axis, Range)
    for share in (0.0, 1e-300, math.nextafter(1, 0)):
        assert axis.low <= axis.at(share) <= axis.high


@pytest.mark.parametrize("texts", [GRID, MIXED])
def test_the_seed_determines_the_sample(texts: list[str]) -> None:
    axes = parse(texts, DEMO)
    assert sample(axes, 5, seed=1) == sample(parse(texts, DEMO), 5, seed=1)
    assert sample(axes, 5, seed=1) != sample(axes, 5, seed=2)
