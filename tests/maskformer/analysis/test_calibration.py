import math
from dataclasses import astuple
from importlib.util import find_spec

import numpy as np
import pytest

from maskformer.analysis.calibration import calibration


def random_segments(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.uniform(0.1, 1, size=count)
    return scores, rng.random(count) < scores**2


@pytest.mark.parametrize("num_bins", [1, 7, 15])
def test_equals_the_definition(num_bins: int) -> None:
    scores, correct = random_segments(num_bins)
    scores[:3] = 0.0, 1.0, 2 / num_bins if num_bins > 1 else 0.5  # edges of bins
    found = calibration(scores, correct, num_bins)
    gaps, weighted = [], 0.0
    assert len(found.bins) == num_bins
    for k, item in enumerate(found.bins):
        assert (item.lower, item.upper) == (k / num_bins, (k + 1) / num_bins)
        last = k == num_bins - 1
        members = [n for n, s in enumerate(scores) if item.lower <= s and (s < item.upper or (last and s == 1))]
        assert item.count == len(members)
        if members:
            assert item.mean_score == pytest.approx(sum(scores[n] for n in members) / len(members), abs=1e-12)
            assert item.share_correct == sum(bool(correct[n]) for n in members) / len(members)
            gaps.append(abs(sum(scores[n] - correct[n] for n in members)) / len(members))
            weighted += abs(sum(scores[n] - correct[n] for n in members)) / len(scores)
        else:
            assert math.isnan(item.mean_score)
            assert math.isnan(item.share_correct)
    assert found.expected_error == pytest.approx(weighted, abs=1e-12)
    assert found.maximum_error == pytest.approx(max(gaps), abs=1e-12)
    assert sum(item.count for item in found.bins) == len(scores)


@pytest.mark.skipif(find_spec("hotcoco") is None, reason="hotcoco is not installed")
@pytest.mark.parametrize("seed", range(5))
def test_equals_hotcoco(seed: int) -> None:
    import hotcoco  # pyright: ignore[reportMissingImports]  # optional

    scores, correct = random_segments(seed)
    found = calibration(scores, correct)
    errors = hotcoco.metrics.calibration_error(scores, correct, n_bins=15)
    assert (found.expected_error, found.maximum_error) == pytest.approx(errors, abs=1e-12)
    for item, theirs in zip(found.bins, hotcoco.metrics.calibration_curve(scores, correct, n_bins=15), strict=True):
        assert item.count == theirs["count"]
        if item.count:
            expected = theirs["avg_confidence"], theirs["avg_accuracy"]
            assert (item.mean_score, item.share_correct) == pytest.approx(expected, abs=1e-12)


def test_by_hand() -> None:
    found = calibration(np.array([0.9, 0.9, 0.9, 0.9, 0.2]), np.array([True, False, True, False, False]), num_bins=2)
    assert astuple(found.bins[0]) == (0.0, 0.5, 1, 0.2, 0.0)
    assert astuple(found.bins[1]) == pytest.approx((0.5, 1.0, 4, 0.9, 0.5))
    assert found.expected_error == pytest.approx((0.2 + 4 * 0.4) / 5)
    assert found.maximum_error == pytest.approx(0.4)


def test_the_order_does_not_matter() -> None:
    scores, correct = random_segments(0)
    order = np.random.default_rng(1).permutation(len(scores))
    assert calibration(scores[order], correct[order]) == calibration(scores, correct)


def test_without_segments_there_is_no_error() -> None:
    found = calibration(np.zeros(0), np.zeros(0, dtype=bool))
    assert math.isnan(found.expected_error)
    assert math.isnan(found.maximum_error)
    assert [item.count for item in found.bins] == [0] * 15


@pytest.mark.parametrize(
    ("scores", "correct", "num_bins", "message"),
    [
        ([0.5, math.nan], [True, True], 15, "got 1 others of 2, for example nan"),
        ([1.5, -0.5], [True, True], 15, "got 2 others of 2, for example 1.5"),
        ([0.5], [True], 0, "at least 1 bin, got 0"),
    ],
)
def test_refuses_what_is_no_score(scores: list[float], correct: list[bool], num_bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration(np.array(scores), np.array(correct), num_bins)
