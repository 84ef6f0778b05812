import contextlib
import io
import json
import math
import random
from collections.abc import Mapping
from dataclasses import astuple
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskformer.analysis.mask_ap import MaskAP, encode_things, mask_ap
from maskformer.segment_matching import PanopticMap
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco([{"id": 3 * k + 1, "name": f"class {k}", "isthing": int(k < 3)} for k in range(5)])
THING, OTHER_THING, STUFF = (TAXONOMY.category_id(k) for k in (0, 1, 3))

Encoded = dict[int | str, list[dict[str, Any]]]
Sizes = dict[int | str, tuple[int, int]]


def info(segment_id: int, category_id: int, **others: float) -> dict[str, Any]:
    return {"id": segment_id, "category_id": category_id, **others}


def ap_of(prediction: PanopticMap, truth: PanopticMap) -> MaskAP:
    predicted, true = (encode_things(*side, TAXONOMY) for side in (prediction, truth))
    return mask_ap({5: predicted}, {5: true}, {5: truth[0].shape}, TAXONOMY)


def random_pair(rng: np.random.Generator) -> tuple[PanopticMap, PanopticMap]:
    """Circles of every size on stuff, and a disturbed copy with scores."""
    height, width = (int(n) for n in rng.integers(100, 300, size=2))
    rows, columns = np.mgrid[:height, :width]
    true_ids = np.where(rows < 20, 0, 1)
    true, predicted = [info(1, STUFF, iscrowd=0)], [info(1, STUFF, score=0.9)]
    predicted_ids = true_ids.copy()
    for number in range(2, 12):
        row, column, radius = rng.uniform(0, height), rng.uniform(0, width), rng.choice([5, 12, 30, 70])
        category_id = TAXONOMY.category_id(int(rng.integers(0, 2)))
        true_ids[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = number
        true.append(info(number, category_id, iscrowd=int(rng.random() < 0.2)))
        if rng.random() < 0.8:
            row, column, radius = (value + rng.normal(0, 0.08 * radius) for value in (row, column, radius))
            predicted_ids[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = number
            category_id = category_id if rng.random() < 0.8 else OTHER_THING
            predicted.append(info(number, category_id, score=float(rng.random())))
    return (
        (predicted_ids, [segment for segment in predicted if (predicted_ids == segment["id"]).any()]),
        (true_ids, [segment for segment in true if (true_ids == segment["id"]).any()]),
    )


@pytest.fixture(scope="module")
def images() -> tuple[Encoded, Encoded, Sizes]:
    rng = np.random.default_rng(0)
    pairs = {100 - number: random_pair(rng) for number in range(20)}
    return (
        {number: encode_things(*pair[0], TAXONOMY) for number, pair in pairs.items()},
        {number: encode_things(*pair[1], TAXONOMY) for number, pair in pairs.items()},
        {number: pair[1][0].shape for number, pair in pairs.items()},
    )


@pytest.mark.parametrize("seed", range(5))
def test_encoded_masks_are_the_pixels_of_the_segments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 5, size=(int(rng.integers(1, 9)), int(rng.integers(1, 9)))).astype(np.int32) * 1000
    categories = {1000: THING, 2000: STUFF, 3000: OTHER_THING, 4000: THING}
    segments = [info(k, categories[k], score=k / 8000) for k in np.unique(ids).tolist()[::-1] if k]
    found = encode_things(ids, segments, TAXONOMY)
    expected = [segment for segment in segments if segment["category_id"] != STUFF]
    assert len(found) == len(expected)
    for instance, segment in zip(json.loads(json.dumps(found)), expected, strict=True):
        mask = ids == segment["id"]
        assert (coco_mask.decode(instance["segmentation"]) == mask).all()
        again: Any = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        assert instance["segmentation"] == {"size": list(mask.shape), "counts": again["counts"].decode()}
        assert instance["area"] == mask.sum()
        assert (instance["category_id"], instance["score"]) == (segment["category_id"], segment["score"])
        assert "iscrowd" not in instance


def test_a_perfect_prediction_has_ap_1() -> None:
    ids = np.zeros((120, 200), dtype=np.int32)
    ids[:20, :20], ids[30:80, 30:80], ids[:100, 90:] = 1, 2, 3
    segments = [info(1, THING), info(2, THING), info(3, OTHER_THING)]
    found = ap_of((ids, segments), (ids, segments))  # without scores
    assert astuple(found)[:-1] == pytest.approx((1.0,) * 6)
    assert found.per_class == pytest.approx({"class 0": 1.0, "class 1": 1.0, "class 2": math.nan}, nan_ok=True)


def test_one_of_two_objects_found() -> None:
    ids = np.zeros((50, 50), dtype=np.int32)
    ids[:20, :20], ids[30:, 30:] = 1, 2
    segments = [info(1, THING), info(2, THING)]
    found = ap_of((np.where(ids == 2, 0, ids), segments[:1]), (ids, segments))
    # Precision 1 at the recalls 0.00, 0.01, ..., 0.50 of the 101.
    assert (found.ap, found.ap50, found.ap75, found.small) == pytest.approx((51 / 101,) * 4)
    assert math.isnan(found.medium)
    assert math.isnan(found.large)


def test_thresholds_of_iou() -> None:
    ids = np.zeros((50, 50), dtype=np.int32)
    ids[:10, :10] = 1
    found = ap_of((np.where(np.arange(50) < 7, ids, 0), [info(1, THING)]), (ids, [info(1, THING)]))
    # An IoU of 0.7 passes 0.50, 0.55, 0.60, 0.65 and 0.70 of the ten.
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((0.5, 1.0, 0.0))


def test_a_detection_of_a_crowd_is_neither_right_nor_wrong() -> None:
    ids = np.zeros((50, 50), dtype=np.int32)
    ids[:20, :20], ids[30:, :] = 1, 2
    prediction = np.where((ids == 2) & (np.arange(50) > 10), 0, ids)  # a part of the crowd
    predicted = [info(1, THING, score=0.5), info(2, THING, score=0.9)]
    crowd = ap_of((prediction, predicted), (ids, [info(1, THING), info(2, THING, iscrowd=1)]))
    other = ap_of((prediction, predicted), (ids, [info(1, THING), info(2, OTHER_THING, iscrowd=1)]))
    object_ = ap_of((prediction, predicted), (ids, [info(1, THING), info(2, THING, iscrowd=0)]))
    assert (crowd.ap, other.ap) == pytest.approx((1.0, 0.5))  # of another class, the detection is a false alarm
    assert object_.ap == pytest.approx(0.5 * 51 / 101)


def test_a_segment_without_score_comes_first() -> None:
    ids = np.zeros((50, 50), dtype=np.int32)
    ids[:20, :20] = 1
    prediction = ids.copy()
    prediction[30:, 30:] = 2
    truth = ids, [info(1, THING)]
    found = ap_of((prediction, [info(1, THING), info(2, THING, score=0.9)]), truth)
    assert found.ap == pytest.approx(1.0)  # the false alarm comes after all that there is to find
    assert ap_of((prediction, [info(1, THING, score=0.9), info(2, THING)]), truth).ap == pytest.approx(0.5)


def plain(classes: tuple[Any, Any], images: tuple[Encoded, Encoded, Sizes], folder: Path) -> Any:
    """Call COCOeval as its manual says: files of annotations and of results."""
    predicted, true, sizes = images
    annotations = [{"image_id": number, **instance} for number, side in true.items() for instance in side]
    results = [{"image_id": number, **instance} for number, side in predicted.items() for instance in side]
    dataset = {
        "images": [{"id": number, "height": height, "width": width} for number, (height, width) in sizes.items()],
        "categories": [{"id": c.id, "name": c.name} for c in TAXONOMY.categories if c.isthing],
        "annotations": [{"id": k, **annotation} for k, annotation in enumerate(annotations, start=1)],
    }
    (folder / "truth.json").write_text(json.dumps(dataset))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = classes[0](str(folder / "truth.json"))
        evaluation = classes[1](coco, coco.loadRes(str(folder / "results.json")), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def test_equals_cocoeval_on_files(images: tuple[Encoded, Encoded, Sizes], tmp_path: Path) -> None:
    found = mask_ap(*images, TAXONOMY)
    stats = plain((COCO, COCOeval), images, tmp_path)
    assert all(0.02 < value < 0.98 for value in stats[:6])
    assert astuple(found)[:-1] == pytest.approx(stats[:6], abs=1e-12)
    of_classes = [value for value in found.per_class.values() if not math.isnan(value)]
    assert len(of_classes) == 2
    assert found.ap == pytest.approx(np.mean(of_classes))


@pytest.mark.skipif(find_spec("hotcoco") is None, reason="hotcoco is not installed")
def test_equals_hotcoco(images: tuple[Encoded, Encoded, Sizes], tmp_path: Path) -> None:
    import hotcoco  # pyright: ignore[reportMissingImports]  # optional

    stats = plain((hotcoco.COCO, hotcoco.COCOeval), images, tmp_path)
    assert astuple(mask_ap(*images, TAXONOMY))[:-1] == pytest.approx(stats[:6], abs=1e-9)


def test_the_order_of_images_and_segments_does_not_matter(images: tuple[Encoded, Encoded, Sizes]) -> None:
    predicted, true, sizes = images
    # Equal scores, so that only their order decides.
    predicted = {number: [{**instance, "score": 0.5} for instance in side] for number, side in predicted.items()}
    expected = mask_ap(predicted, true, sizes, TAXONOMY)
    for seed in range(3):
        shuffle = random.Random(seed)
        shuffled, shuffled_true = (
            {
                number: shuffle.sample(side[number], len(side[number]))
                for number in shuffle.sample(list(side), len(side))
            }
            for side in (predicted, true)
        )
        assert str(mask_ap(shuffled, shuffled_true, sizes, TAXONOMY)) == str(expected)  # as text, nan equals nan


def with_text_ids(side: Mapping[int | str, Any]) -> dict[int | str, Any]:
    """Rename the images, in the order of their numbers."""
    return {f"image {number:03}": value for number, value in side.items()}


def test_image_ids_may_be_text(images: tuple[Encoded, Encoded, Sizes]) -> None:
    predicted, true, sizes = map(with_text_ids, images)
    assert str(mask_ap(predicted, true, sizes, TAXONOMY)) == str(mask_ap(*images, TAXONOMY))


def test_prints_nothing_and_changes_nothing(
    images: tuple[Encoded, Encoded, Sizes], capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.dumps(images[:2])
    mask_ap(*images, TAXONOMY)
    assert capsys.readouterr() == ("", "")
    assert json.dumps(images[:2]) == before


def test_without_objects_there_is_no_ap() -> None:
    thing = encode_things(np.array([[1, 0]]), [info(1, THING, score=1.0)], TAXONOMY)
    stuff = Taxonomy.from_coco([{"id": 1, "name": "sky", "isthing": 0}])
    for found in (
        mask_ap({}, {}, {}, TAXONOMY),
        mask_ap({1: []}, {1: []}, {1: (1, 2)}, TAXONOMY),
        mask_ap({1: thing}, {1: []}, {1: (1, 2)}, TAXONOMY),
        mask_ap({1: []}, {1: []}, {1: (1, 2)}, stuff),
    ):
        assert all(map(math.isnan, [*astuple(found)[:-1], *found.per_class.values()]))
    assert mask_ap({1: []}, {1: thing}, {1: (1, 2)}, TAXONOMY).ap == 0.0


@pytest.mark.parametrize(
    ("predicted", "sizes", "message"),
    [
        ([], {}, "sizes of exactly the images of the ground truth, got 0 for 1, of which 1 .* example 'a'"),
        ([], {"a": (1, 2), 7: (1, 2)}, "sizes of exactly .* got 2 for 1, of which 1 .* example 7"),
        ([{"category_id": STUFF}], {"a": (1, 2)}, f"defined for things, got category_id {STUFF} in image a"),
        ([{"category_id": THING}], {"a": (1, 2)}, r"image a has the size \(2, 1\) and the image \(1, 2\)"),
    ],
)
def test_refuses_inconsistent_input(predicted: list[dict[str, Any]], sizes: Sizes, message: str) -> None:
    mask = {"segmentation": {"size": [2, 1], "counts": "02"}, "area": 2}
    with pytest.raises(ValueError, match=message):
        mask_ap({"a": [{**mask, **instance} for instance in predicted]}, {"a": []}, sizes, TAXONOMY)


def test_refuses_missing_predictions() -> None:
    with pytest.raises(ValueError, match=r"predictions of exactly the images .* got 1 for 2, .* example 2;"):
        mask_ap({1: []}, {1: [], 2: []}, {1: (1, 1), 2: (1, 1)}, TAXONOMY)


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        ([[1, 2]], [info(1, THING)], r"\[2\].*not in the segments_info"),
        ([[1, 0]], [info(1, THING), info(2, THING)], r"\[2\] have no pixel"),
        ([[1, 1]], [info(1, 2)], "unknown category_id 2"),
    ],
)
def test_refuses_to_encode_inconsistent_maps(ids: list[list[int]], segments: list[dict[str, Any]], message: str):
    with pytest.raises(ValueError, match=message):
        encode_things(np.array(ids), segments, TAXONOMY)
