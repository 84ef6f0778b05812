"""Matching of segments. Scoring with it is compared with panopticapi in test_panoptic_quality.py."""

import numpy as np
import pytest

from maskformer.segment_matching import match_segments
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": 10 + k, "name": f"class {k}", "isthing": int(k < 2)} for k in range(4)])


@pytest.mark.parametrize("seed", range(40))
def test_overlaps_and_unions_are_those_of_masks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    maps, infos = [], []
    for _ in range(2):
        numbers = rng.integers(0, 6, (9, 11))
        ids = np.concatenate([[0], 1 + rng.choice(2**24 - 1, 5, replace=False)])[numbers]
        maps.append(ids)
        infos.append([{"id": i, "category_id": int(rng.integers(10, 14))} for i in np.unique(ids).tolist() if i])
        rng.shuffle(infos[-1])
    matching = match_segments((maps[0], infos[0]), (maps[1], infos[1]), TAXONOMY)
    void = maps[1] == 0
    for column, predicted in enumerate(matching.predicted.ids.tolist()):
        mask = maps[0] == predicted
        assert matching.predicted_area[column] == mask.sum()
        assert matching.overlap[0, column + 1] == (mask & void).sum()
        assert matching.ignored[column] == ((mask & void).sum() / mask.sum() > 0.5)
        for row, true in enumerate(matching.true.ids.tolist()):
            common = (mask & (maps[1] == true)).sum()
            assert matching.overlap[row + 1, column + 1] == common
            assert matching.iou[row, column] == common / (((mask & ~void) | (maps[1] == true)).sum())
    counted = {*matching.false.tolist(), *matching.matches[1].tolist()}
    assert counted | set(np.flatnonzero(matching.ignored).tolist()) == set(range(len(infos[0])))
    assert sorted([*matching.missed.tolist(), *matching.matches[0].tolist()]) == list(range(len(infos[1])))


def test_too_many_pairs_are_refused_before_they_are_counted() -> None:
    many = np.arange(1, 5001).reshape(50, 100), [{"id": i, "category_id": 10} for i in range(1, 5001)]
    few = np.ones((50, 100), np.int64), [{"id": 1, "category_id": 10}]
    assert match_segments(few, many, TAXONOMY, 7).overlap.shape == (5001, 2)
    with pytest.raises(ValueError, match="Image 7 has 5,000 segments in the ground truth and 5,000 in the prediction"):
        match_segments(many, many, TAXONOMY, 7)
