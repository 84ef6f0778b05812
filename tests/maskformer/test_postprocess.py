import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import PanopticConfig
from maskformer.panoptic_quality import PanopticQuality
from maskformer.postprocess import decode_ids, encode_ids, panoptic
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
    # What comes out goes into the metric.
    quality = PanopticQuality(TAXONOMY)
    quality.update((ids, segments), (ids, segments), image_id=seed)
    assert not segments or quality.result().pq == 1.0


def test_the_random_cases_drop_and_join_segments():
    dropped = joined = 0
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
        joined += len(everything) < num_kept
    assert dropped > 5
    assert joined > 5


def rows_of_pixels(*rows: str) -> Tensor:
    """Draw mask logits: `#` is inside (probability 1), `+` just inside (0.6), `.` outside."""
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
    ids=["no object", "unsure", "no pixel of its own"],
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


def test_ids_survive_the_png_encoding():
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 2**24 - 1, 1234567]])
    rgb = encode_ids(ids)
    assert rgb.dtype == np.uint8
    assert rgb[1, 3].tolist() == [1234567 % 256, 1234567 // 256 % 256, 1234567 // 65536]
    again = decode_ids(rgb)
    assert again.dtype == np.int32
    assert (again == ids).all()


@pytest.mark.parametrize("bad", [-1, 2**24])
def test_refuses_ids_a_png_cannot_hold(bad: int):
    with pytest.raises(ValueError, match=rf"{bad}"):
        encode_ids(np.array([[0, bad]]) if bad > 0 else np.array([[bad, 0]]))
