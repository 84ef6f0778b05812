"""What an image contributes: plain numbers that survive JSON, and pixels counted from masks."""

import json
from typing import Any

import numpy as np
import pytest

from maskformer.analysis.image import ImageAnalysis, analyze_image
from maskformer.panoptic_quality import PanopticQuality
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": 7 * k + 1, "name": f"class {k}", "isthing": int(k < 3)} for k in range(5)])
Side = tuple[np.ndarray, list[dict[str, Any]]]


def side(rng: np.random.Generator, *, scores: bool) -> Side:
    ids = np.kron(rng.integers(0, 7, (4, 5)), np.ones((9, 8), int))
    segments = [
        {"id": i, "category_id": 7 * int(rng.integers(0, 5)) + 1, "score" if scores else "iscrowd": rng.integers(0, 2)}
        for i in np.unique(ids).tolist()
        if i
    ]
    return ids, [
        {**s, "score": float(rng.random())} if scores else {**s, "iscrowd": int(s["iscrowd"])} for s in segments
    ]


def semantic(side: Side) -> np.ndarray:
    """Return the category id of each pixel, 0 for void."""
    of = {segment["id"]: segment["category_id"] for segment in side[1]}
    return np.vectorize(lambda i: of.get(i, 0))(side[0])


@pytest.mark.parametrize("seed", range(25))
def test_an_image_equals_the_definitions_and_survives_json(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prediction, truth = side(rng, scores=True), side(rng, scores=False)
    analysis = analyze_image(prediction, truth, TAXONOMY, seed)
    again = ImageAnalysis.from_json(json.loads(json.dumps(analysis.to_json())))
    assert again.losses.keys() == analysis.losses.keys()
    assert all(np.array_equal(again.losses[key], loss) for key, loss in analysis.losses.items())
    assert {**vars(again), "losses": None} == {**vars(analysis), "losses": None}

    assert analysis.quality == PanopticQuality(TAXONOMY).update(prediction, truth, seed)
    predicted, true = semantic(prediction), semantic(truth)
    for category in TAXONOMY.categories:
        counts = analysis.pixels.get(category.id, (0, 0, 0))
        counted = (true != 0) & ~np.isin(truth[0], [segment["id"] for segment in truth[1] if segment["iscrowd"]])
        assert counts[0] == ((predicted == category.id) & (true == category.id) & counted).sum()
        assert counts[1] == ((true == category.id) & counted).sum()
        assert counts[2] == ((predicted == category.id) & counted).sum()
    right = sum(quality.tp for quality in analysis.quality.values())
    wrong = sum(quality.fp for quality in analysis.quality.values())
    assert sum(segment.correct for segment in analysis.scored) == right
    assert len(analysis.scored) == right + wrong
    scores = {segment["score"] for segment in prediction[1]}
    assert {segment.score for segment in analysis.scored} <= scores
