from typing import Any

import numpy as np
import pytest
from scipy.ndimage import binary_erosion

from maskformer.analysis.boundary import boundaries, boundary_quality, boundary_width
from maskformer.panoptic_quality import ClassQuality, PanopticQuality
from maskformer.segment_matching import PanopticMap, match_segments
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": 3 * k + 1, "name": f"class {k}", "isthing": int(k < 2)} for k in range(4)])
THING, OTHER_THING, STUFF = (TAXONOMY.category_id(k) for k in (0, 1, 2))


def score(prediction: PanopticMap, truth: PanopticMap) -> dict[int, ClassQuality]:
    return boundary_quality(match_segments(prediction, truth, TAXONOMY), TAXONOMY)


def info(segment_id: int, category_id: int, iscrowd: int = 0) -> dict[str, int]:
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd}


def slow_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """Return a mask without its erosion by a square; outside the image is outside the mask."""
    return mask & np.logical_not(binary_erosion(mask, np.ones((3, 3)), iterations=width, border_value=0))


def slow_quality(prediction: PanopticMap, truth: PanopticMap) -> dict[int, list[float]]:
    """Count pair by pair and mask by mask; return the sum of IoU, tp, fp and fn by category id."""
    (predicted_ids, predicted), (true_ids, true) = prediction, truth
    width = max(1, round(0.02 * float(np.hypot(*true_ids.shape))))
    counts: dict[int, list[float]] = {}
    void = true_ids == 0
    matched: set[tuple[str, int]] = set()
    for t in true:
        for p in predicted:
            if t["category_id"] != p["category_id"] or t.get("iscrowd"):
                continue
            ious = []
            for cut in (lambda mask: mask, lambda mask: slow_boundary(mask, width)):
                of_truth, of_prediction = cut(true_ids == t["id"]), cut(predicted_ids == p["id"]) & ~void
                ious.append((of_truth & of_prediction).sum() / (of_truth | of_prediction).sum())
            if min(ious) > 0.5:
                matched |= {("true", t["id"]), ("predicted", p["id"])}
                entry = counts.setdefault(t["category_id"], [0.0, 0, 0, 0])
                entry[0] += min(ious)
                entry[1] += 1
    for t in true:
        if ("true", t["id"]) not in matched and not t.get("iscrowd"):
            counts.setdefault(t["category_id"], [0.0, 0, 0, 0])[3] += 1
    for p in predicted:
        mask = predicted_ids == p["id"]
        excused = void.copy()
        crowds = [t["id"] for t in true if t.get("iscrowd") and t["category_id"] == p["category_id"]]
        if crowds:
            excused |= true_ids == crowds[-1]
        if ("predicted", p["id"]) not in matched and (mask & excused).sum() / mask.sum() <= 0.5:
            counts.setdefault(p["category_id"], [0.0, 0, 0, 0])[2] += 1
    return counts


def rectangles(rng: np.random.Generator, height: int, width: int, like: PanopticMap | None = None) -> PanopticMap:
    """Rectangles over each other on void; slightly moved copies of `like` where given."""
    ids = np.zeros((height, width), dtype=np.int32)
    infos: list[dict[str, Any]] = []
    if like is None:
        for number in range(1, 9):
            (top, bottom), (left, right) = (np.sort(rng.integers(0, size + 1, 2)) for size in (height, width))
            ids[top:bottom, left:right] = 7 * number
            crowd = int(rng.random() < 0.2)
            infos.append(info(7 * number, TAXONOMY.category_id(int(rng.integers(0, 3))), crowd))
    else:
        shift = tuple(int(n) for n in rng.integers(-2, 3, size=2))
        ids = np.roll(like[0], shift, axis=(0, 1))
        noise = rng.random(ids.shape) < rng.choice([0, 0.001, 0.05])
        ids[noise] = rng.choice(like[0].ravel(), size=int(noise.sum()))
        infos = [dict(segment) for segment in like[1]]
        for segment in infos:
            segment.pop("iscrowd")
            if rng.random() < 0.1:
                segment["category_id"] = STUFF
    return ids, [segment for segment in infos if (ids == segment["id"]).any()]


@pytest.mark.parametrize("width", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 1), (2, 9), (7, 3), (13, 13), (40, 31)])
def test_boundaries_are_masks_without_their_erosion(width: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(width)
    for _ in range(20):
        cells = rng.integers(0, 3, size=(3, 3))
        rows, columns = (np.sort(rng.integers(0, 3, length)) for length in size)
        ids = cells[rows[:, None], columns]
        expected = np.zeros(size, dtype=bool)
        for value in np.unique(ids):
            expected |= slow_boundary(ids == value, width)
        assert (boundaries(ids, width) == expected).all()


def test_a_pixel_in_the_middle_has_a_square_around_it() -> None:
    ids = np.zeros((9, 9), dtype=int)
    ids[4, 4] = 1
    expected = np.ones((9, 9), dtype=bool)
    expected[2:7, 2:7] = True
    assert (boundaries(np.zeros((9, 9), dtype=int), 2) == ~np.pad(np.ones((5, 5), dtype=bool), 2)).all()
    assert boundaries(ids, 2).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(480, 640, 16), (640, 480, 16), (1, 1, 1), (15, 20, 1), (45, 60, 2), (75, 100, 2)]
)
def test_the_width_is_a_share_of_the_diagonal(height: int, width: int, expected: int) -> None:
    # 15x20: 0.5 would round to 0. 45x60: 1.5 rounds to 2; 75x100: 2.5 rounds to the even 2, as in the authors' code.
    assert boundary_width(height, width) == expected


@pytest.mark.parametrize("size", [(12, 17), (60, 45), (90, 130)])
def test_equals_a_slow_definition(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(size[0])
    totals = np.zeros(3)
    smaller = 0
    for number in range(40):
        truth = rectangles(rng, *size)
        prediction = rectangles(rng, *size, like=truth)
        found, expected = score(prediction, truth), slow_quality(prediction, truth)
        assert found.keys() == expected.keys()
        for category_id, quality in found.items():
            assert quality.category_id == category_id
            assert quality[1:] == pytest.approx(expected[category_id], abs=1e-12)
            totals += quality[2:]
        usual = PanopticQuality(TAXONOMY).update(prediction, truth, number)
        smaller += sum(quality.iou for quality in found.values()) < sum(quality.iou for quality in usual.values())
    assert (totals > 10).all()  # the random pairs cover all cases
    assert smaller > 10


def test_a_coarse_contour_of_a_large_segment_costs_more_than_in_panoptic_quality() -> None:
    truth, prediction = np.zeros((2, 200, 200), dtype=int)  # the width is 6
    truth[20:180, 20:180] = 1
    prediction[24:176, 24:176] = 1  # 4 pixels too small on each side
    pair = (prediction, [info(1, THING)]), (truth, [info(1, THING)])
    void = (prediction, [info(1, THING)]), (np.where(truth, 1, 2), [info(1, THING), info(2, STUFF)])
    mask_iou = 152**2 / 160**2
    boundary = 160**2 - 148**2, 152**2 - 140**2, 152**2 - 148**2
    boundary_iou = boundary[2] / (boundary[0] + boundary[1] - boundary[2])
    assert PanopticQuality(TAXONOMY).update(*pair, 1)[THING].iou == mask_iou
    assert boundary_iou < 0.5 < mask_iou
    for case in (pair, void):
        assert score(*case)[THING] == ClassQuality(THING, 0.0, 0, 1, 1)


def test_a_hole_costs_at_least_its_area() -> None:
    truth, prediction = np.zeros((2, 400, 400), dtype=int)  # the width is 11
    truth[50:350, 50:350] = 1
    prediction[50:350, 50:350] = 1
    prediction[100:300, 100:300] = 0
    outline, around_hole = 300**2 - 278**2, 222**2 - 200**2
    mask_iou, boundary_iou = (300**2 - 200**2) / 300**2, outline / (outline + around_hole)
    assert 0.5 < mask_iou < boundary_iou
    found = score((prediction, [info(1, THING)]), (truth, [info(1, THING)]))
    assert found == {THING: (THING, mask_iou, 1, 0, 0)}


def test_void_at_the_boundary_leaves_the_union() -> None:
    truth = np.ones((200, 200), dtype=int)  # the width is 6
    prediction = truth.copy()
    truth[:, 150:] = 0
    segments = [info(1, THING)]
    # The prediction's right boundary is void. What is left: 6 columns and rows on three sides.
    of_prediction = 200 * 150 - 188 * 144
    of_truth = 200 * 150 - 188 * 138
    found = score((prediction, segments), (truth, segments))
    assert found == {THING: (THING, pytest.approx(of_prediction / of_truth), 1, 0, 0)}


def test_perfect_and_empty() -> None:
    ids = np.repeat(np.arange(4), 25).reshape(10, 10)
    segments = [info(1, THING), info(2, THING), info(3, STUFF)]
    found = score((ids, segments), (ids, segments))
    assert found == {THING: (THING, 2.0, 2, 0, 0), STUFF: (STUFF, 1.0, 1, 0, 0)}
    nothing = np.zeros((10, 10), dtype=int), []
    assert score(nothing, nothing) == {}
    assert score(nothing, (ids, segments))[THING] == (THING, 0.0, 0, 0, 2)
    assert score((ids, segments), nothing) == {}  # all void
