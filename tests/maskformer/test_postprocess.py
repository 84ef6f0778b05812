import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import PanopticConfig
from maskformer.panoptic_quality import PanopticQuality
from maskformer.postprocess import (
    Size,
    _Resizer,  # pyright: ignore[reportPrivateUsage]
    instances,
    keep_queries,
    panoptic,
    semantic,
)
from maskformer.taxonomy import Taxonomy

TAXONOMY = Taxonomy.from_coco(
    [
        {"id": 11, "name": "dog", "isthing": 1},
        {"id": 12, "name": "cat", "isthing": 1},
        {"id": 21, "name": "sky", "isthing": 0},
        {"id": 22, "name": "sea", "isthing": 0},
    ]
)
DOG, CAT, SKY, SEA, NOTHING = range(5)
CONFIG = PanopticConfig()


def class_logits_of(classes: list[int], scores: list[float]) -> Tensor:
    """Logits whose softmax gives the class the score and spreads the rest evenly."""
    probabilities = torch.full((len(classes), 5), 0.0, dtype=torch.float64)
    for query, (class_index, score) in enumerate(zip(classes, scores, strict=True)):
        probabilities[query] = (1 - score) / 4
        probabilities[query, class_index] = score
    return probabilities.log().float()


def slow_panoptic(class_logits: Tensor, mask_logits: Tensor, size, config: PanopticConfig):
    """The definition, with the masks of all queries in one stack: (class, set of pixels) of each segment."""
    padded, valid, original = size
    probabilities = class_logits.softmax(-1)
    stack = F.interpolate(mask_logits[None], padded, mode="bilinear", align_corners=False)
    stack = stack[..., : valid[0], : valid[1]]
    stack = F.interpolate(stack, original, mode="bilinear", align_corners=False)[0].sigmoid()
    kept = [
        query
        for query in range(len(class_logits))
        if probabilities[query].argmax() != NOTHING and probabilities[query].max() > config.score_threshold
    ]
    pixels_of: dict[object, set[tuple[int, int]]] = {}
    class_of: dict[object, int] = {}
    if kept:
        weighted = torch.stack([probabilities[query].max() * stack[query] for query in kept])
        owner = weighted.argmax(0)
        for position, query in enumerate(kept):
            owned = set(map(tuple, torch.nonzero(owner == position).tolist()))
            full = int((stack[query] >= 0.5).sum())
            if not owned or not full or len(owned) / full < config.overlap_threshold:
                continue
            class_index = int(probabilities[query].argmax())
            key = ("stuff", class_index) if class_index in (SKY, SEA) else ("thing", query)
            pixels_of.setdefault(key, set()).update(owned)
            class_of[key] = class_index
    return [(class_of[key], pixels_of[key]) for key in pixels_of]


def random_case(seed: int):
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(12, 5, generator=generator) * 3
    coarse = torch.randn(12, 3, 3, generator=generator) * 4
    mask_logits = F.interpolate(coarse[None], (8, 10), mode="bilinear")[0]
    size = ((32, 40), (29, 37), (45, 50)) if seed % 2 else ((32, 40), (32, 40), (20, 27))
    return class_logits, mask_logits, size


@pytest.mark.parametrize("seed", range(30))
def test_equals_the_slow_definition(seed: int):
    class_logits, mask_logits, size = random_case(seed)
    config = PanopticConfig(score_threshold=0.4, overlap_threshold=0.3 if seed % 3 else 0.8)
    ids, segments = panoptic(class_logits, mask_logits, size, config, TAXONOMY)

    assert ids.dtype == np.int32
    assert ids.shape == size[2]
    ours = [
        (TAXONOMY.class_index(segment["category_id"]), set(map(tuple, np.argwhere(ids == segment["id"]).tolist())))
        for segment in segments
    ]
    assert ours == slow_panoptic(class_logits, mask_logits, size, config)
    assert [segment["id"] for segment in segments] == list(range(1, len(segments) + 1))
    assert all(segment["area"] == int((ids == segment["id"]).sum()) for segment in segments)
    # The metric accepts the result.
    quality = PanopticQuality(TAXONOMY)
    quality.update((ids, segments), (ids, segments), image_id=seed)
    assert not segments or quality.result().pq == 1.0


@pytest.mark.parametrize("seed", range(30))
def test_kept_queries_alone_give_the_same_result(seed: int):
    class_logits, mask_logits, size = random_case(seed)
    config = PanopticConfig(score_threshold=(0.4, 0.9, 1.0)[seed % 3], overlap_threshold=0.3)
    kept = keep_queries(class_logits, mask_logits, config, TAXONOMY)
    assert len(kept[0]) == len(kept[1]) <= len(class_logits)
    ids, segments = panoptic(*kept, size, config, TAXONOMY)
    expected_ids, expected = panoptic(class_logits, mask_logits, size, config, TAXONOMY)
    assert np.array_equal(ids, expected_ids)
    assert segments == expected


def test_the_random_cases_drop_and_merge_segments():
    dropped = merged = 0
    for seed in range(30):
        class_logits, mask_logits, size = random_case(seed)
        scores, classes = class_logits.softmax(-1).max(-1)
        num_kept = int(((scores > 0.4) & (classes != NOTHING)).sum())
        everything = slow_panoptic(
            class_logits, mask_logits, size, PanopticConfig(score_threshold=0.4, overlap_threshold=0.0)
        )
        some = slow_panoptic(
            class_logits, mask_logits, size, PanopticConfig(score_threshold=0.4, overlap_threshold=0.3)
        )
        dropped += len(some) < len(everything)
        merged += len(everything) < num_kept
    assert dropped > 5
    assert merged > 5


def direct_resize(mask: Tensor, size) -> Tensor:
    """Resize one map [h, w] in two steps as the published implementations do."""
    padded, valid, original = size
    mask = F.interpolate(mask[None, None], padded, mode="bilinear", align_corners=False)
    mask = mask[..., : valid[0], : valid[1]]
    return F.interpolate(mask, original, mode="bilinear", align_corners=False)[0, 0]


def slow_running_maximum(class_logits: Tensor, mask_logits: Tensor, size, config: PanopticConfig) -> np.ndarray:
    """The owner of each pixel, -1 for void, without merged stuff; every map is a new tensor."""
    scores, classes = class_logits.softmax(-1).max(-1)
    owner = torch.full(size[2], -1)
    highest = torch.full(size[2], -1.0)
    full_areas = {}
    for query in range(len(scores)):
        if classes[query] != NOTHING and scores[query] > config.score_threshold:
            probability = direct_resize(mask_logits[query], size).sigmoid()
            better = scores[query] * probability > highest
            owner = torch.where(better, query, owner)
            highest = torch.where(better, scores[query] * probability, highest)
            full_areas[query] = int((probability >= 0.5).sum())
    for query, full_area in full_areas.items():
        owned = owner == query
        if not full_area or not owned.any() or int(owned.sum()) / full_area < config.overlap_threshold:
            owner = torch.where(owned, -1, owner)
    return owner.numpy()


# The map of the mask logits; padded input, its valid part, original image.
SIZES: dict[str, tuple[Size, tuple[Size, Size, Size]]] = {
    "no padding": ((50, 76), ((200, 304), (200, 304), (120, 160))),
    "padding": ((50, 76), ((200, 304), (183, 251), (131, 180))),
    "padding, enlarged": ((20, 31), ((77, 121), (70, 90), (210, 270))),
    "not a multiple of four": ((37, 43), ((146, 169), (146, 169), (97, 111))),
    "small": ((16, 16), ((64, 64), (61, 64), (64, 67))),
    "above small": ((17, 16), ((65, 64), (65, 60), (64, 67))),
    "narrow": ((60, 2), ((240, 8), (238, 3), (111, 5))),
    "one pixel valid": ((33, 40), ((130, 160), (1, 1), (9, 7))),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", SIZES)
def test_every_pixel_equals_that_of_the_slow_running_maximum(case: str, seed: int):
    coarse, size = SIZES[case]
    generator = torch.Generator().manual_seed(seed)
    class_logits = class_logits_of([DOG, CAT] * 10, torch.linspace(0.75, 0.99, 20).tolist())
    class_logits[4:8] = torch.eye(5)[DOG] * 200  # four scores of exactly 1
    mask_logits = torch.randn(20, 4, 5, generator=generator) * 6
    mask_logits = F.interpolate(mask_logits[None], coarse, mode="bilinear")[0]
    mask_logits[4:7] = mask_logits[4:7] * 20 + 20  # saturated: they tie wherever two of them are inside
    mask_logits[9] = mask_logits[8]
    class_logits[9] = class_logits[8]
    config = PanopticConfig(overlap_threshold=0.1 * seed)
    ids, segments = panoptic(class_logits, mask_logits, size, config, TAXONOMY)

    owner = slow_running_maximum(class_logits, mask_logits, size, config)
    queries = [query for query in range(20) if (owner == query).any()]
    assert len(segments) == len(queries) > 0
    for number, query in enumerate(queries, 1):
        assert ((ids == number) == (owner == query)).all()
    assert 9 not in queries  # the same as query 8


@pytest.mark.parametrize("case", SIZES)
def test_resized_maps_equal_those_of_the_published_steps_bit_for_bit(case: str):
    coarse, size = SIZES[case]
    mask_logits = torch.randn(3, *coarse, generator=torch.Generator().manual_seed(0)) * 5
    resizer = _Resizer(mask_logits, *size)
    for mask in mask_logits:
        assert torch.equal(resizer(mask), direct_resize(mask, size))


def rows_of_pixels(*rows: str) -> Tensor:
    """Return mask logits: `#` is inside (probability 1), `+` just inside (0.6), `.` outside."""
    logit = {"#": 50.0, "+": float(torch.tensor(0.6).logit()), ".": -50.0}
    return torch.tensor([[[logit[pixel] for pixel in row]] for row in rows])


def same(size: tuple[int, int]):
    return size, size, size


def test_a_score_exactly_at_the_threshold_is_not_kept():
    class_logits = torch.tensor([[0.0, 0.0, -100.0, -100.0, -100.0]])  # two classes of probability 1/2
    mask_logits = rows_of_pixels("##")
    for threshold, kept in ((0.5, False), (0.499, True)):
        config = PanopticConfig(score_threshold=threshold)
        ids, segments = panoptic(class_logits, mask_logits, same((1, 2)), config, TAXONOMY)
        assert bool(segments) == kept
        assert ids.tolist() == [[int(kept)] * 2]


def test_a_share_exactly_at_the_overlap_threshold_is_kept():
    class_logits = class_logits_of([DOG, CAT], [0.85, 0.95])
    ids, segments = panoptic(class_logits, rows_of_pixels("#####", "#...."), same((1, 5)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[2, 1, 1, 1, 1]]  # the dog keeps 4 of 5
    assert [segment["category_id"] for segment in segments] == [11, 12]
    ids, _ = panoptic(class_logits, rows_of_pixels("####", "#..."), same((1, 4)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[1, 0, 0, 0]]  # 3 of 4


def test_a_query_left_with_too_little_of_its_mask_becomes_void():
    class_logits = class_logits_of([DOG, CAT], [0.85, 0.95])
    mask_logits = rows_of_pixels("####....", "##..####")  # the dog keeps 2 of 4
    ids, segments = panoptic(class_logits, mask_logits, same((1, 8)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[1, 1, 0, 0, 1, 1, 1, 1]]
    assert [(segment["category_id"], segment["area"]) for segment in segments] == [(12, 6)]


def test_the_own_area_is_not_weighted_by_the_score():
    class_logits = class_logits_of([DOG], [0.81])  # 0.81 * 0.6 is below one half
    ids, _ = panoptic(class_logits, rows_of_pixels("++"), same((1, 2)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[1, 1]]


def test_stuff_of_a_class_is_one_segment_and_things_are_not():
    class_logits = class_logits_of([SKY, DOG, SKY, DOG, SEA], [0.85, 0.9, 0.95, 0.9, 0.9])
    mask_logits = rows_of_pixels("#....", ".#...", "..#..", "...#.", "....#")
    ids, segments = panoptic(class_logits, mask_logits, same((1, 5)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[1, 2, 1, 3, 4]]
    assert [{**segment, "score": round(segment["score"], 4)} for segment in segments] == [
        {"id": 1, "category_id": 21, "isthing": False, "area": 2, "score": 0.95},
        {"id": 2, "category_id": 11, "isthing": True, "area": 1, "score": 0.9},
        {"id": 3, "category_id": 11, "isthing": True, "area": 1, "score": 0.9},
        {"id": 4, "category_id": 22, "isthing": False, "area": 1, "score": 0.9},
    ]


def test_a_tie_goes_to_the_lower_query():
    class_logits = class_logits_of([DOG, CAT], [0.9, 0.9])
    ids, segments = panoptic(class_logits, rows_of_pixels("##", "##"), same((1, 2)), CONFIG, TAXONOMY)
    assert ids.tolist() == [[1, 1]]
    assert [segment["category_id"] for segment in segments] == [11]


@pytest.mark.parametrize(
    ("classes", "scores", "mask"),
    [([NOTHING], [0.99], "##"), ([DOG], [0.7], "##"), ([DOG], [0.99], "..")],
    ids=["no object", "low score", "no pixel of its own"],
)
def test_all_void(classes: list[int], scores: list[float], mask: str):
    ids, segments = panoptic(class_logits_of(classes, scores), rows_of_pixels(mask), same((1, 2)), CONFIG, TAXONOMY)
    assert segments == []
    assert ids.dtype == np.int32
    assert ids.tolist() == [[0, 0]]


def test_low_precision_logits_are_fused_in_float32():
    class_logits = class_logits_of([DOG, SEA], [0.9, 0.9]).bfloat16()
    mask_logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    size = ((16, 16), (16, 16), (9, 13))
    low = panoptic(class_logits, mask_logits, size, CONFIG, TAXONOMY)
    full = panoptic(class_logits.float(), mask_logits.float(), size, CONFIG, TAXONOMY)
    assert (low[0] == full[0]).all()
    assert low[1] == full[1]


def test_refuses_the_wrong_taxonomy_and_sizes_in_the_wrong_order():
    mask_logits = rows_of_pixels("##")
    with pytest.raises(ValueError, match="got 4 columns"):
        panoptic(torch.zeros(1, 4), mask_logits, same((1, 2)), CONFIG, TAXONOMY)
    with pytest.raises(ValueError, match="order padded, valid, original"):
        panoptic(torch.zeros(1, 5), mask_logits, ((4, 8), (4, 9), (4, 8)), CONFIG, TAXONOMY)


def slow_resize(plane: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear by definition: pixel centers at one half, the border repeated."""
    for axis, (old, new) in enumerate(zip(plane.shape, shape, strict=True)):
        centers = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        below = np.floor(centers).astype(int)
        above = np.minimum(below + 1, old - 1)
        share = np.expand_dims(centers - below, 1 - axis)
        plane = (1 - share) * plane.take(below, axis) + share * plane.take(above, axis)
    return plane


def slow_masks(mask_logits: Tensor, size) -> np.ndarray:
    """The logits of all queries at the size of the original image, in float64: [Q, H, W]."""
    padded, valid, original = size
    planes = [slow_resize(plane, padded)[: valid[0], : valid[1]] for plane in mask_logits.double().numpy()]
    return np.stack([slow_resize(plane, original) for plane in planes])


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def semantic_case(seed: int):
    """A random case in which no class wins everywhere."""
    class_logits, mask_logits, size = random_case(seed)
    return class_logits + 12 * F.one_hot(torch.arange(12) % 5, 5), mask_logits, size


@pytest.mark.parametrize("strip_pixels", [1, 300, 1 << 16])
@pytest.mark.parametrize("seed", range(6))
def test_semantic_equals_the_slow_definition(seed: int, strip_pixels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("maskformer.postprocess.STRIP_PIXELS", strip_pixels)  # one row, a few rows, all rows
    class_logits, mask_logits, size = semantic_case(seed)
    ours = semantic(class_logits, mask_logits, size)
    assert ours.dtype == np.int32
    assert ours.shape == size[2]

    votes = np.einsum(
        "qk,qhw->khw", class_logits.double().softmax(-1)[:, :-1].numpy(), sigmoid(slow_masks(mask_logits, size))
    )
    second, first = np.sort(votes, axis=0)[-2:]
    clear = first - second > 1e-5
    assert clear.mean() > 0.99
    assert (ours == votes.argmax(0))[clear].all()
    assert len(np.unique(ours)) > 1


def test_semantic_sums_the_queries_and_takes_no_object_out_after_the_softmax():
    probabilities = torch.tensor(
        [[0.10, 0.00, 0.00, 0.00, 0.90], [0.00, 0.00, 0.30, 0.40, 0.30], [0.00, 0.00, 0.30, 0.00, 0.70]]
    )
    # dog 0.1, sky 0.6, sea 0.4; without no-object in the softmax dog 1, sky 1.43, sea 0.57. The most confident query
    # votes for sea.
    everywhere = rows_of_pixels("##", "##", "#.")
    ids = semantic(probabilities.log().clamp(min=-100), everywhere, same((1, 2)))
    assert ids.tolist() == [[SKY, SEA]]
    # Masked by a uncertain mask, the vote of a class shrinks: dog 0.6 * 0.7 < cat 0.5
    class_logits = torch.tensor([[0.7, 0.0, 0.0, 0.0, 0.3], [0.0, 0.5, 0.0, 0.0, 0.5]]).log().clamp(min=-100)
    assert semantic(class_logits, rows_of_pixels("#+", "##"), same((1, 2))).tolist() == [[DOG, CAT]]


def test_semantic_is_float32_for_bfloat16_logits_and_under_autocast():
    class_logits, mask_logits, size = semantic_case(1)
    class_logits, mask_logits = class_logits.bfloat16(), mask_logits.bfloat16()
    full = semantic(class_logits.float(), mask_logits.float(), size)
    with torch.autocast("cpu", torch.bfloat16):
        assert (semantic(class_logits, mask_logits, size) == full).all()


def decoded(segmentation) -> np.ndarray:
    """A mask from COCO's uncompressed run lengths, pixel by pixel down the columns."""
    pixels: list[bool] = []
    for run, count in enumerate(segmentation["counts"]):
        pixels += [run % 2 == 1] * count
    height, width = segmentation["size"]
    return np.array([[pixels[x * height + y] for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("top", [30, 100])  # there are 48 scores
@pytest.mark.parametrize("seed", range(6))
def test_instances_equal_the_slow_definition(seed: int, top: int):
    class_logits, mask_logits, size = random_case(seed)
    class_logits /= 6  # so that a query occurs with several classes
    mask_logits[::4] -= 30.0  # empty masks
    ours = instances(class_logits, mask_logits, size, TAXONOMY, top=top)

    masks = slow_masks(mask_logits, size)
    probabilities = class_logits.double().softmax(-1)[:, :-1].numpy()
    pairs = sorted(np.ndindex(*probabilities.shape), key=lambda pair: -probabilities[pair])[:top]
    expected = []
    for query, class_index in pairs:
        inside = masks[query] > 0
        if class_index in (DOG, CAT) and inside.any():
            score = probabilities[query, class_index] * sigmoid(masks[query])[inside].mean()
            expected.append((score, {DOG: 11, CAT: 12}[class_index], query))
    expected.sort(reverse=True)

    assert [found["category_id"] for found in ours] == [category_id for _, category_id, _ in expected]
    assert [found["score"] for found in ours] == pytest.approx([score for score, _, _ in expected], rel=1e-4)
    for found, (_, _, query) in zip(ours, expected, strict=True):
        mask = decoded(found["segmentation"])
        clear = np.abs(masks[query]) > 1e-4
        assert (mask == (masks[query] > 0))[clear].all()
        rows, columns = np.nonzero(mask)
        x, y, width, height = found["bbox"]
        assert (x, x + width - 1, y, y + height - 1) == (columns.min(), columns.max(), rows.min(), rows.max())
    queries = [query for _, _, query in expected]
    assert len(set(queries)) < len(queries) < len(pairs)  # a query with two classes; stuff and empty masks left out


def test_an_instance_by_hand():
    class_logits = class_logits_of([DOG, SKY], [0.9, 0.9])
    dog, sky = ("...", "..#", ".++", "..."), ("###", "###", "###", "###")
    mask_logits = rows_of_pixels(*dog, *sky).view(2, 4, 3)
    found = instances(class_logits, mask_logits, same((4, 3)), TAXONOMY, top=2)
    assert found == [
        {
            "category_id": 11,
            "bbox": [1, 1, 2, 2],
            "score": pytest.approx(0.9 * (1 + 0.6 + 0.6) / 3),
            "segmentation": {"size": [4, 3], "counts": [6, 1, 2, 2, 1]},
        }
    ]


def test_semantic_and_instances_refuse_what_panoptic_refuses():
    mask_logits = rows_of_pixels("##")
    with pytest.raises(ValueError, match="got 4 columns"):
        instances(torch.zeros(1, 4), mask_logits, same((1, 2)), TAXONOMY)
    for size in (((4, 8), (4, 9), (4, 8)), ((4, 8), (4, 8), (0, 8))):
        with pytest.raises(ValueError, match="order padded, valid, original"):
            instances(torch.zeros(1, 5), mask_logits, size, TAXONOMY)
        with pytest.raises(ValueError, match="order padded, valid, original"):
            semantic(torch.zeros(1, 5), mask_logits, size)


# VmHWM is the most memory of a process. Its ru_maxrss would be at least that of the tests, which started it.
MEASURE = """
import re
import torch
from maskformer.config import PanopticConfig
from maskformer.postprocess import instances, panoptic, semantic
from maskformer.taxonomy import COCO

generator = torch.Generator().manual_seed(0)
class_logits = torch.randn(100, 134, generator=generator)
class_logits[:14, :14] += 20 * torch.eye(14)  # fourteen confident things ...
class_logits[14:, -1] += 30  # ... among no-objects
coarse = torch.randn(1, 100, 5, 6, generator=generator) * 5
mask_logits = torch.nn.functional.interpolate(coarse, (200, 250), mode="bilinear")[0]
size = (800, 1000), (800, 1000), (4000, 5000)

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

before = peak()
ids, segments = panoptic(class_logits, mask_logits, size, PanopticConfig(overlap_threshold=0), COCO)
assert len(segments) > 7
assert len(instances(class_logits, mask_logits, size, COCO)) >= 14
assert semantic(class_logits, mask_logits, size).shape == ids.shape
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_queries_or_classes():
    result = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    # A float32 map of 4000x5000 pixels has 76 MiB. Measured: 0.5 to 0.7 GiB, seven to nine maps. The masks of the
    # fourteen confident queries alone would be 1.0 GiB, of all queries 7.5, the votes of all classes 9.9.
    assert int(result.stdout) / 2**20 < 1.0
