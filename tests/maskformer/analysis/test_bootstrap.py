import math
import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from maskformer.analysis import bootstrap
from maskformer.analysis.bootstrap import Counts, pq_difference, pq_intervals, resamples
from maskformer.panoptic_quality import ClassQuality, PanopticQuality
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": 2 * k + 1, "name": f"class {k}", "isthing": int(k < 3)} for k in range(5)])
Images = dict[int | str, Counts]


def random_images(seed: int, num_images: int, run: int = 0, skill: float = 0.6) -> Images:
    """Results of a run on images with up to four classes each; the seed alone decides on the ground truth."""
    truth, hits = np.random.default_rng(seed), np.random.default_rng([seed, run])
    images: Images = {}
    for number in range(num_images):
        counts: dict[int, ClassQuality] = {}
        for category_id in (TAXONOMY.category_id(k) for k in range(4)):
            present = int(truth.integers(0, 3))
            tp, fp = int(hits.binomial(present, skill)), int(hits.binomial(2, 0.2))
            if present or fp:
                iou = float(hits.uniform(0.5, 1, size=tp).sum())
                counts[category_id] = ClassQuality(category_id, iou, tp, fp, fn=present - tp)
        images[number if number % 2 else f"image {number}"] = counts
    return images


def in_order(images: Mapping[int | str, Counts]) -> list[Counts]:
    """Return the contributions by ascending id, numbers before text."""
    numbers = sorted(image_id for image_id in images if isinstance(image_id, int))
    texts = sorted(image_id for image_id in images if isinstance(image_id, str))
    return [images[image_id] for image_id in (*numbers, *texts)]


def slow_pq(images: Sequence[Counts], times: Sequence[int], category_ids: Sequence[int]) -> float:
    """Average the PQ of every class of some images, each counted so many times; nan without a class."""
    classes: list[float] = []
    for category_id in category_ids:
        taken = [
            images[n][category_id] for n, time in enumerate(times) for _ in range(time) if category_id in images[n]
        ]
        if taken:
            tp, fp, fn = (sum(getattr(quality, name) for quality in taken) for name in ("tp", "fp", "fn"))
            classes.append(ClassQuality(category_id, sum(quality.iou for quality in taken), tp, fp, fn).pq)
    return sum(classes) / len(classes) if classes else math.nan


def times_of_draws(num_images: int, draws: int, seed: int) -> list[list[int]]:
    return np.concatenate(list(resamples(num_images, draws, seed))).astype(int).tolist()


GROUPS = {"all": [1, 3, 5, 7, 9], "things": [1, 3, 5], "stuff": [7, 9]}


@pytest.mark.parametrize("num_images", [1, 3, 40])
def test_intervals_equal_a_slow_bootstrap(num_images: int) -> None:
    images = random_images(0, num_images)
    ordered, times = in_order(images), times_of_draws(num_images, draws=300, seed=5)
    intervals = pq_intervals(images, TAXONOMY, confidence=0.8, draws=300, seed=5)
    for name, category_ids in GROUPS.items():
        value = slow_pq(ordered, [1] * num_images, category_ids)
        assert (name in intervals) == (not math.isnan(value))
        if name in intervals:
            pqs = [slow_pq(ordered, draw, category_ids) for draw in times]
            low, high = np.quantile([pq for pq in pqs if not math.isnan(pq)], [0.1, 0.9])
            assert tuple(intervals[name]) == pytest.approx((value, low, high, 0.8), abs=1e-6)


def test_the_difference_equals_a_slow_bootstrap() -> None:
    first, second = random_images(1, 30, run=0), random_images(1, 30, run=1)
    times = times_of_draws(30, draws=400, seed=2)
    pairs = [[slow_pq(in_order(images), draw, GROUPS["all"]) for images in (first, second)] for draw in times]
    differences = [after - before for before, after in pairs]
    low, high = np.quantile(differences, [0.025, 0.975])
    below, above = sum(d <= 0 for d in differences), sum(d >= 0 for d in differences)
    assert 0 < min(below, above) < 150  # so that the p-value is not a special case
    once = [slow_pq(in_order(images), [1] * 30, GROUPS["all"]) for images in (first, second)]

    found = pq_difference(first, second, TAXONOMY, draws=400, seed=2)
    assert found[:3] == pytest.approx((once[1] - once[0], low, high), abs=1e-6)
    assert found.p_value == pytest.approx(2 * (1 + min(below, above)) / 401)
    assert (found.confidence, found.images) == (0.95, 30)


def test_the_value_is_that_of_panoptic_quality() -> None:
    rng = np.random.default_rng(0)
    quality, images = PanopticQuality(TAXONOMY), {}
    infos = [{"id": k + 1, "category_id": TAXONOMY.category_id(k)} for k in range(4)]
    for number in range(10):
        truth = np.repeat(np.arange(5), 30).reshape(10, 15)
        prediction = np.where(rng.random(truth.shape) < 0.2, rng.integers(0, 5, truth.shape), truth)
        images[number] = quality.update((prediction, infos), (truth, infos), number)
    result, intervals = quality.result(), pq_intervals(images, TAXONOMY, draws=10)
    assert 0.1 < result.pq < 0.9
    for name, interval in intervals.items():
        assert interval.value == pytest.approx(getattr(result, name).pq, abs=1e-12)


def test_neither_the_order_of_images_nor_the_size_of_blocks_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = random_images(3, 25, run=0), random_images(3, 25, run=1)
    intervals, difference = pq_intervals(first, TAXONOMY, draws=50), pq_difference(first, second, TAXONOMY, draws=50)
    shuffled = [dict(random.Random(k).sample(list(images.items()), 25)) for k, images in enumerate((first, second))]
    assert list(shuffled[0]) != list(first)
    assert pq_intervals(shuffled[0], TAXONOMY, draws=50) == intervals
    assert pq_difference(shuffled[0], shuffled[1], TAXONOMY, draws=50) == difference
    assert pq_intervals(first, TAXONOMY, draws=50, seed=1) != intervals
    monkeypatch.setattr(bootstrap, "_BLOCK", 25 * 7)
    assert [len(block) for block in resamples(25, 50, 0)] == [7] * 7 + [1]
    for name, interval in pq_intervals(first, TAXONOMY, draws=50).items():
        assert tuple(interval) == pytest.approx(tuple(intervals[name]), abs=1e-6)


def test_every_draw_takes_as_many_images_as_there_are() -> None:
    counts = np.concatenate(list(resamples(20, 3000, seed=0)))
    assert (counts.sum(axis=1) == 20).all()
    # Of a multinomial distribution with 20 equal shares: mean 1, variance 0.95, covariance -0.05.
    covariance = np.cov(counts.T)
    assert np.abs(counts.mean(axis=0) - 1).max() < 0.08
    assert np.abs(covariance - (np.eye(20) - 0.05)).max() < 0.12


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    # The expected contribution of an image of `random_images`: 1 segment, 0.6 of it found, with a mean IoU of 0.75.
    truth = 0.6 * 0.75 / (0.6 + 0.5 * 0.4 + 0.5 * 0.4)
    covered = 0
    for seed in range(200):
        interval = pq_intervals(random_images(seed, 80), TAXONOMY, draws=400, seed=seed)["all"]
        covered += interval.low <= truth <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_equal_methods_seem_different_about_as_often_as_the_p_value_says() -> None:
    p_values = [
        pq_difference(random_images(seed, 60, run=0), random_images(seed, 60, run=1), TAXONOMY, draws=300).p_value
        for seed in range(200)
    ]
    assert 0.01 <= np.mean(np.array(p_values) < 0.05) <= 0.10
    assert 0.35 <= np.mean(np.array(p_values) < 0.5) <= 0.65


def test_a_clear_difference_has_the_smallest_p_value() -> None:
    worse, better = random_images(4, 50, skill=0.2), random_images(4, 50, skill=0.9)
    up, down = (pq_difference(*sides, TAXONOMY, draws=999) for sides in ((worse, better), (better, worse)))
    assert up.p_value == down.p_value == 2 / 1000
    assert 0 < up.low < up.value < up.high
    assert (down.value, down.low, down.high) == pytest.approx((-up.value, -up.high, -up.low), abs=1e-6)


def test_the_same_images_are_drawn_for_both() -> None:
    """Two runs that differ by the same amount on very different images have a narrow interval."""
    easy, hard = ClassQuality(1, 0.95, 1, 0, 0), ClassQuality(1, 0.55, 1, 0, 0)
    first = {number: {1: easy if number % 2 else hard} for number in range(40)}
    second = {number: {1: counts[1]._replace(iou=counts[1].iou + 0.01)} for number, counts in first.items()}
    found = pq_difference(first, second, TAXONOMY, draws=200)
    assert (found.value, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01), abs=1e-6)
    alone = pq_intervals(first, TAXONOMY, draws=200)["all"]
    assert alone.high - alone.low > 0.1


def test_groups_and_draws_without_classes_are_left_out() -> None:
    perfect = {1: ClassQuality(1, 1.0, 1, 0, 0)}
    assert pq_intervals({}, TAXONOMY) == {}
    assert pq_intervals({1: {}, 2: {}}, TAXONOMY) == {}
    # A quarter of the draws takes only the empty image.
    found = pq_intervals({1: perfect, 2: {}}, TAXONOMY, draws=200)
    assert found == {name: (1.0, 1.0, 1.0, 0.95) for name in ("all", "things")}
    assert pq_difference({1: perfect, 2: {}}, {1: perfect, 2: {}}, TAXONOMY, draws=200) == (0, 0, 0, 1.0, 0.95, 2)


@pytest.mark.parametrize(
    ("first", "second", "settings", "message"),
    [
        ({1: {}, 2: {}}, {2: {}, 5: {}, "a": {}}, {}, "got 2 and 3, of which 3 .* for example 1;"),
        ({1: {}}, {1: {}}, {}, "no class is present or predicted in the 1 images"),
        ({}, {}, {}, "no class is present or predicted in the 0 images"),
        ({}, {}, {"confidence": 95}, "between 0 and 1, got 95"),
        ({}, {}, {"draws": 0}, "at least 1 draw, got 0"),
        ({1: {4: ClassQuality(4, 1.0, 1, 0, 0)}}, {1: {}}, {}, "Unknown category id 4"),
    ],
)
def test_refuses_what_cannot_be_compared(first: Images, second: Images, settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        pq_difference(first, second, TAXONOMY, **settings)  # pyright: ignore[reportArgumentType]  # the point of the test
