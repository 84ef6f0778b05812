import contextlib
import functools
import io
import json
import math
import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from panopticapi.evaluation import PQStat, pq_compute_single_core
from PIL import Image

from maskformer.panoptic_quality import PanopticQuality
from maskformer.segment_matching import PanopticMap
from maskformer.taxonomy import Category, Taxonomy

NUM_PAIRS = 500
TAXONOMY = Taxonomy.from_coco([{"id": 3 * k + 1, "name": f"class {k}", "isthing": int(k % 2 == 0)} for k in range(7)])
CATEGORIES = {category.id: {"isthing": int(category.isthing)} for category in TAXONOMY.categories}
NAMES = {category.id: category.name for category in TAXONOMY.categories}

# Class indices by name: 0..3 things, 4..6 stuff.
THING, OTHER_THING, STUFF = (TAXONOMY.category_id(k) for k in (0, 1, 4))


def random_segmentation(rng: np.random.Generator, like: PanopticMap | None) -> PanopticMap:
    """Blocks and noise with void, crowd and ids up to 2^24; a disturbed copy of `like` where given."""
    height, width = (int(rng.integers(6, 40)), int(rng.integers(6, 40))) if like is None else like[0].shape
    used_classes = rng.choice(TAXONOMY.num_classes - 1, size=int(rng.integers(1, 5)), replace=False)  # one never occurs
    if like is None or rng.random() < 0.15:
        cells = rng.integers(0, rng.integers(1, 12), size=(5, 5))
        rows, columns = np.sort(rng.integers(0, 5, height)), np.sort(rng.integers(0, 5, width))
        labels = cells[rows[:, None], columns]
        category_of = {k: TAXONOMY.category_id(int(rng.choice(used_classes))) for k in range(12)}
    else:
        ids, infos = like
        numbers = {0: 0} | {info["id"]: k for k, info in enumerate(infos, start=1)}
        labels = np.vectorize(numbers.get)(np.roll(ids, int(rng.integers(0, 3)), axis=int(rng.integers(0, 2))))
        category_of = {numbers[info["id"]]: info["category_id"] for info in infos}
        for k in category_of:
            if rng.random() < 0.2:
                category_of[k] = TAXONOMY.category_id(int(rng.choice(used_classes)))
    noise = rng.random(labels.shape) < rng.choice([0.0, 0.05, 0.4])
    labels = np.where(noise, rng.integers(0, 1 + max(category_of, default=0), labels.shape), labels)
    if rng.random() < 0.05:
        labels = np.zeros_like(labels)
    present = [k for k in np.unique(labels).tolist() if k > 0]
    new_ids = rng.choice(2**24 - 1, size=len(present), replace=False) + 1
    ids = np.zeros(labels.shape, dtype=("int32", "int64", "uint32")[rng.integers(3)])
    infos = []
    for k, new_id in zip(present, new_ids.tolist(), strict=True):
        ids[labels == k] = new_id
        category = category_of.get(k, THING)
        infos.append({"id": new_id, "category_id": category, "area": int((labels == k).sum())})
        if like is None:
            infos[-1]["iscrowd"] = int(rng.random() < 0.3)
    rng.shuffle(infos)
    return ids, infos


@pytest.fixture(scope="module")
def pairs() -> list[tuple[PanopticMap, PanopticMap]]:
    rng = np.random.default_rng(0)
    truths = [random_segmentation(rng, None) for _ in range(NUM_PAIRS)]
    return [(random_segmentation(rng, truth), truth) for truth in truths]


def official(pairs: list[tuple[PanopticMap, PanopticMap]], folder: Path) -> list[PQStat]:
    """Score each pair with panopticapi on PNG files."""
    statistics: list[PQStat] = []
    for number, pair in enumerate(pairs):
        annotations = []
        for side, (ids, infos) in zip(("prediction", "truth"), pair, strict=True):
            values = ids.astype(np.int64)
            rgb = np.stack([values % 256, values // 256 % 256, values // 65536], axis=-1).astype(np.uint8)
            Image.fromarray(rgb).save(folder / f"{side}_{number}.png")
            segments = [{"iscrowd": 0, **info} for info in infos]
            annotations.append({"image_id": number, "file_name": f"{side}_{number}.png", "segments_info": segments})
        with contextlib.redirect_stdout(io.StringIO()):
            statistics.append(pq_compute_single_core(0, [(annotations[1], annotations[0])], folder, folder, CATEGORIES))
    return statistics


def assert_equal_to_official(quality: PanopticQuality, statistics: PQStat) -> None:
    result = quality.result()
    for average, isthing in ((result.all, None), (result.things, True), (result.stuff, False)):
        try:
            expected, per_class = statistics.pq_average(CATEGORIES, isthing)
        except ZeroDivisionError:
            assert math.isnan(average.pq)
            assert math.isnan(average.sq)
            assert math.isnan(average.rq)
            continue
        assert average.num_classes == expected["n"]
        for name in ("pq", "sq", "rq"):
            assert abs(getattr(average, name) - expected[name]) <= 1e-12
        for category_id, values in per_class.items():
            ours = result.per_class[NAMES[category_id]]
            theirs = statistics.pq_per_cat[category_id]
            assert ours.category_id == category_id
            assert (ours.tp, ours.fp, ours.fn) == (theirs.tp, theirs.fp, theirs.fn)
            assert abs(ours.iou - theirs.iou) <= 1e-12
            for name in ("pq", "sq", "rq"):
                assert abs(getattr(ours, name) - values[name]) <= 1e-12
    assert (result.pq, result.sq, result.rq) == pytest.approx(result.all[:3], abs=0, nan_ok=True)


def test_equals_panopticapi_on_random_pairs(pairs: list[tuple[PanopticMap, PanopticMap]], tmp_path: Path):
    together, official_together = PanopticQuality(TAXONOMY), PQStat()
    for number, statistics in enumerate(official(pairs, tmp_path)):
        alone = PanopticQuality(TAXONOMY)
        contribution = alone.update(*pairs[number], image_id=number)
        assert_equal_to_official(alone, statistics)
        assert together.update(*pairs[number], image_id=number) == contribution
        for category_id, quality in contribution.items():
            assert quality == alone.result().per_class[NAMES[category_id]]
        official_together += statistics
    assert_equal_to_official(together, official_together)
    result = together.result()
    # The random pairs cover all cases.
    assert result.num_images == NUM_PAIRS
    assert all(average.num_classes > 1 for average in (result.things, result.stuff))
    assert all(
        sum(getattr(quality, what) for quality in result.per_class.values()) > 100 for what in ("tp", "fp", "fn")
    )
    assert any(not infos for (_, infos), _ in pairs)
    assert any(not infos for _, (_, infos) in pairs)
    crowds = [[info["category_id"] for info in infos if info["iscrowd"]] for _, (_, infos) in pairs]
    assert any(len(set(categories)) < len(categories) for categories in crowds)


def test_the_order_of_updates_and_merges_does_not_matter(pairs: list[tuple[PanopticMap, PanopticMap]]):
    in_order = PanopticQuality(TAXONOMY)
    for number, pair in enumerate(pairs):
        in_order.update(*pair, image_id=number)
    for seed in range(3):
        numbers = random.Random(seed).sample(range(NUM_PAIRS), NUM_PAIRS)
        workers = [PanopticQuality(TAXONOMY) for _ in range(4)]
        for position, number in enumerate(numbers):
            workers[position % 4].update(*pairs[number], image_id=number)
        merged = functools.reduce(PanopticQuality.merge, pickle.loads(pickle.dumps(workers)))
        assert merged.result() == in_order.result()


def info(segment_id: int, category_id: int, iscrowd: int = 0) -> dict[str, int]:
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd}


def score(prediction: list[int], predicted: list[dict[str, int]], truth: list[int], true: list[dict[str, int]]):
    quality = PanopticQuality(TAXONOMY)
    contribution = quality.update((np.array([prediction]), predicted), (np.array([truth]), true), image_id="a")
    return {category_id: tuple(values)[1:] for category_id, values in contribution.items()}


@pytest.mark.parametrize(
    ("prediction", "predicted", "truth", "true", "expected"),
    [
        pytest.param(
            [1, 1, 1, 2], [info(1, THING), info(2, STUFF)], [5, 5, 5, 9], [info(9, STUFF), info(5, THING)],
            {THING: (1.0, 1, 0, 0), STUFF: (1.0, 1, 0, 0)}, id="perfect",
        ),
        pytest.param(
            [1, 1, 0, 0], [info(1, THING)], [1, 1, 1, 1], [info(1, THING)],
            {THING: (0.0, 0, 1, 1)}, id="an overlap of exactly one half is no match",
        ),
        pytest.param(
            [1, 1, 1, 0], [info(1, THING)], [1, 1, 0, 0], [info(1, THING)],
            {THING: (1.0, 1, 0, 0)}, id="void pixels leave the union",
        ),
        pytest.param(
            [1, 1, 1, 2], [info(1, THING), info(2, THING)], [0, 0, 3, 3], [info(3, THING)],
            {THING: (0.0, 0, 1, 1)}, id="more than half of it void is ignored",
        ),
        pytest.param(
            [1, 1, 0, 0], [info(1, THING)], [0, 3, 3, 3], [info(3, STUFF)],
            {THING: (0.0, 0, 1, 0), STUFF: (0.0, 0, 0, 1)}, id="exactly half of it void is not",
        ),
        pytest.param(
            [1, 1, 1, 2], [info(1, THING), info(2, OTHER_THING)], [3, 3, 3, 3], [info(3, THING, iscrowd=1)],
            {OTHER_THING: (0.0, 0, 1, 0)}, id="crowd excuses predictions of its class only and is never missed",
        ),
        pytest.param(
            [1, 1, 2, 2], [info(1, THING), info(2, THING)], [3, 3, 4, 4], [info(3, THING, 1), info(4, THING, 1)],
            {THING: (0.0, 0, 1, 0)}, id="of several crowds of a class the last listed counts",
        ),
        pytest.param([0, 0], [], [0, 0], [], {}, id="nothing at all"),
        pytest.param([0, 0], [], [7, 7], [info(7, STUFF)], {STUFF: (0.0, 0, 0, 1)}, id="an empty prediction"),
    ],
)  # fmt: skip
def test_cases_counted_by_hand(prediction, predicted, truth, true, expected):
    assert score(prediction, predicted, truth, true) == expected


def test_is_nan_where_no_class_counts():
    quality = PanopticQuality(TAXONOMY)
    assert math.isnan(quality.result().pq)
    quality.update((np.array([[1]]), [info(1, THING)]), (np.array([[1]]), [info(1, THING)]), image_id=1)
    result = quality.result()
    assert (result.pq, result.things.pq) == (1.0, 1.0)
    assert math.isnan(result.stuff.pq)
    assert result.per_class["class 1"].pq == 0.0


GOOD = (np.array([[0, 1], [1, 2]]), [info(1, THING), info(2, STUFF)])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((np.array([[0, 1], [1, 4]]), GOOD[1]), r"\[4\].*not in the segments_info"),
        ((np.array([[0, 1], [1, -2]]), GOOD[1][:1]), r"\[-2\].*not in the segments_info"),
        ((np.array([[0, 1], [1, 1]]), GOOD[1]), r"\[2\] have no pixel"),
        ((GOOD[0], [info(1, THING), info(2, 2)]), "unknown category_id 2"),
        ((GOOD[0], [info(1, THING), info(2, STUFF), info(2, STUFF)]), "positive and differ"),
        ((GOOD[0], [info(0, THING), info(1, THING), info(2, STUFF)]), "positive and differ"),
        ((GOOD[0], [info(1, THING), {"id": 2}]), "category_id"),
        ((np.zeros((2, 3), np.int32), []), "differ in size"),
        ((np.zeros((0, 2), np.int32), []), "non-empty integer array"),
    ],
)
def test_refuses_inconsistent_input_naming_the_image(bad: PanopticMap, message: str):
    quality = PanopticQuality(TAXONOMY)
    with pytest.raises(ValueError, match=rf"(?s)(image 77.*{message}|{message}.*image 77)"):
        quality.update(bad, GOOD, image_id=77)
    with pytest.raises(ValueError, match=rf"(?s)(image 77.*{message}|{message}.*image 77)"):
        quality.update(GOOD, bad, image_id=77)
    assert quality.result().num_images == 0


def test_counts_no_image_twice():
    quality, other = PanopticQuality(TAXONOMY), PanopticQuality(TAXONOMY)
    quality.update(GOOD, GOOD, image_id=1)
    with pytest.raises(ValueError, match="Image 1 was counted before"):
        quality.update(GOOD, GOOD, image_id=1)
    other.update(GOOD, GOOD, image_id=1)
    other.update(GOOD, GOOD, image_id=2)
    with pytest.raises(ValueError, match="image 1;"):
        quality.merge(other)
    assert quality.result().num_images == 1


def test_refuses_to_merge_another_taxonomy():
    other = PanopticQuality(Taxonomy((Category(1, "kite", isthing=True),)))
    with pytest.raises(ValueError, match="different taxonomies"):
        PanopticQuality(TAXONOMY).merge(other)


@pytest.mark.skipif("COCO_PANOPTIC_SAMPLE" not in os.environ, reason="COCO_PANOPTIC_SAMPLE names no folder")
def test_real_truth_scored_against_itself_is_perfect():
    folder = Path(os.environ["COCO_PANOPTIC_SAMPLE"])
    annotations = json.loads((folder / "annotations" / "panoptic_val2017.json").read_text())
    quality = PanopticQuality(Taxonomy.from_coco(annotations["categories"]))
    for annotation in annotations["annotations"]:
        rgb = np.asarray(Image.open(folder / "panoptic_val2017" / annotation["file_name"])).astype(np.int32)
        truth = (rgb @ np.array([1, 256, 65536], np.int32), annotation["segments_info"])
        quality.update(truth, truth, image_id=annotation["image_id"])
    assert quality.result().all == (1.0, 1.0, 1.0, 8)
