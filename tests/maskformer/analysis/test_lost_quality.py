"""Lost quality. It must add up to 1 - PQ; the causes of planted mistakes are known."""

import numpy as np
import pytest

from maskformer.analysis.lost_quality import CAUSES, SIZES, Losses, losses, lost_quality
from maskformer.panoptic_quality import count_segments, panoptic_result
from maskformer.segment_matching import PanopticMap, match_segments
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": k + 1, "name": f"class {k}", "isthing": int(k < 3)} for k in range(5)])


def noisy(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """Return a map with blocks of other segments in it."""
    changed = ids.copy()
    for _ in range(rng.integers(0, 6)):
        y, x = rng.integers(0, ids.shape[0]), rng.integers(0, ids.shape[1])
        changed[y : y + rng.integers(4, 60), x : x + rng.integers(4, 60)] = rng.integers(0, 9)
    return changed


def segmentation(rng: np.random.Generator, ids: np.ndarray, crowds: bool) -> PanopticMap:
    segments = [
        {"id": i, "category_id": int(rng.integers(1, 5)), "iscrowd": int(crowds and rng.random() < 0.2)}
        for i in np.unique(ids).tolist()
        if i
    ]
    return ids, segments


def test_adds_up_to_what_pq_is_short_of_one() -> None:
    rng = np.random.default_rng(0)
    images: list[Losses] = []
    qualities = []
    for _ in range(300):
        blocks = rng.integers(0, 8, (rng.integers(2, 5), rng.integers(2, 5)))
        true = noisy(rng, np.kron(blocks, np.ones((30, 30), int)))
        truth = segmentation(rng, true, crowds=True)
        ids, infos = segmentation(rng, noisy(rng, true), crowds=False)
        segments = [dict(info) for info in infos]
        kept = {info["id"]: info["category_id"] for info in truth[1]}
        segments = [
            {**info, "category_id": kept.get(info["id"], 1)} if rng.random() < 0.8 else info for info in segments
        ]
        matching = match_segments((ids, segments), truth, TAXONOMY)
        images.append(losses(matching, TAXONOMY))
        qualities.append(count_segments(matching, TAXONOMY))
    result = panoptic_result(qualities, TAXONOMY)
    lost = lost_quality(images, result.per_class, TAXONOMY)
    for part, quality in ((lost.all, result.all), (lost.things, result.things), (lost.stuff, result.stuff)):
        assert part.sum() == pytest.approx(1 - quality.pq, abs=1e-9)
        assert (part >= 0).all()
    for name, part in lost.per_class.items():
        assert part.sum() == pytest.approx(1 - result.per_class[name].pq, abs=1e-9)
    assert (lost.all.sum(axis=1) > 0).all(), "the random images have every cause"
    assert (lost.all.sum(axis=0)[:2] > 0).all()
    assert lost.per_class.keys() == {f"class {k}" for k in range(4)}


def planted(true: list[list[int]], predicted: list[list[int]], true_classes: str, predicted_classes: str) -> set:
    """Return (class, cause, loss) of what is lost, from maps of ids 1, 2, ... with these classes."""

    def read(rows: list[list[int]], classes: str) -> PanopticMap:
        return np.array(rows), [{"id": i, "category_id": int(c) + 1} for i, c in enumerate(classes, 1)]

    matching = match_segments(read(predicted, predicted_classes), read(true, true_classes), TAXONOMY)
    return {
        (category_id - 1, CAUSES[cause], round(float(loss[cause].sum()), 6))
        for category_id, loss in losses(matching, TAXONOMY).items()
        for cause in np.flatnonzero(loss.sum(axis=1))
    }


def test_causes_of_planted_mistakes() -> None:
    row = [1, 1, 1, 1, 1, 1, 2, 2, 2, 2]
    assert planted([row], [row], "03", "03") == set()
    assert planted([row], [row], "03", "13") == {(0, "wrong_class", 0.5), (1, "wrong_class", 0.5)}
    assert planted([row], [[1, 1, 1, 3, 3, 3, 2, 2, 2, 2]], "03", "030") == {(0, "split", 1.5)}
    assert planted([[1, 1, 1, 2, 2, 2]], [[1, 1, 1, 1, 1, 1]], "00", "0") == {(0, "merged", 1.5)}
    assert planted([row], [[1, 1, 0, 0, 0, 0, 2, 2, 2, 2]], "03", "03") == {(0, "boundary", 1.0)}
    assert planted([row], [[1, 1, 1, 1, 1, 0, 2, 2, 2, 2]], "03", "03") == {(0, "boundary", round(1 / 6, 6))}
    assert planted([row], [[0, 0, 0, 0, 0, 0, 1, 1, 1, 1]], "03", "3") == {(0, "missed", 0.5)}
    found = planted([[1] * 10], [[2, 2] + [1] * 8], "3", "30")
    assert found == {(0, "false_alarm", 0.5), (3, "boundary", 0.2)}


def test_sizes_are_those_of_coco() -> None:
    ids = np.zeros((200, 200), int)
    for number, side in enumerate((31, 32, 95, 96), 1):
        ids[:side, :side] = np.where(ids[:side, :side] == 0, number, ids[:side, :side])
    areas = [int((ids == number).sum()) for number in range(1, 5)]
    matching = match_segments(
        (np.zeros_like(ids), []), (ids, [{"id": n, "category_id": 1} for n in range(1, 5)]), TAXONOMY
    )
    (loss,) = losses(matching, TAXONOMY).values()
    expected = [sum(a < 32**2 for a in areas), sum(32**2 <= a < 96**2 for a in areas), sum(a >= 96**2 for a in areas)]
    assert loss[CAUSES.index("missed")].tolist() == [0.5 * count for count in expected]
    assert len(expected) == len(SIZES)
