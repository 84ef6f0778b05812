"""The color baseline is correct, and color alone is not enough on the synthetic data set."""

import numpy as np
import pytest

from maskformer.taxonomy import Taxonomy
from pipelines.data.synthetic import CATEGORIES, SyntheticConfig, draw_scene
from pipelines.demo.color_baseline import color_baseline, mean_colors, segment_by_color

TOY = Taxonomy.from_coco(
    [{"id": 5, "name": "ball", "isthing": 1}, {"id": 2, "name": "lawn", "isthing": 0}],
)
RED, GREEN = (200, 10, 10), (10, 200, 10)


def toy_record():
    """Two red balls on a green lawn; a blue crowd of balls and gray void must not count."""
    image = np.full((20, 30, 3), GREEN, np.uint8)
    ids = np.full((20, 30), 7, np.int32)
    image[4:10, 4:10] = image[12:18, 18:26] = RED
    ids[4:10, 4:10], ids[12:18, 18:26] = 300, 70_000
    image[:, :2], ids[:, :2] = (0, 0, 255), 9
    image[:, -1], ids[:, -1] = (128, 128, 128), 0
    segments = [
        {"id": 7, "category_id": 2, "iscrowd": 0},
        {"id": 300, "category_id": 5, "iscrowd": 0},
        {"id": 70_000, "category_id": 5, "iscrowd": 0},
        {"id": 9, "category_id": 5, "iscrowd": 1},
    ]
    return image, ids, segments


def synthetic_records(split: int, count: int):
    scenes = (draw_scene(np.random.default_rng((0, split, number)), SyntheticConfig()) for number in range(count))
    return [(scene.image, scene.ids, scene.segments) for scene in scenes]


def test_mean_colors_exclude_void_and_crowds() -> None:
    np.testing.assert_array_equal(mean_colors([toy_record(), toy_record()], TOY), [RED, GREEN])


def test_a_thing_is_a_connected_component() -> None:
    image, truth, _ = toy_record()
    image[:, :2] = image[:, -1] = GREEN
    ids, segments = segment_by_color(image, np.array([RED, GREEN], float), TOY)
    assert [segment["category_id"] for segment in segments] == [5, 5, 2]
    # The blur removes the corners of a ball: 4 of the 9 pixels around a corner pixel are red.
    expected = np.isin(truth, [300, 70_000])
    for row, column in [(4, 4), (4, 9), (9, 4), (9, 9), (12, 18), (12, 25), (17, 18), (17, 25)]:
        expected[row, column] = False
    np.testing.assert_array_equal(ids > 0, True)
    np.testing.assert_array_equal(np.isin(ids, [1, 2]), expected)
    assert len(np.unique(ids[5:9, 5:9])) == len(np.unique(ids[13:17, 19:25])) == 1
    assert ids[5, 5] != ids[13, 21]


def test_the_baseline_is_good_where_color_determines_the_class() -> None:
    result = color_baseline([toy_record()], [toy_record()], TOY)
    # The IoU of the balls: the blur removes their corners.
    assert result.per_class["ball"].tp == 2
    assert result.per_class["ball"].pq == pytest.approx((32 / 36 + 44 / 48) / 2)


def test_a_class_without_training_pixel_is_named() -> None:
    image, ids, segments = toy_record()
    with pytest.raises(ValueError, match="got none of lawn"):
        color_baseline([(image, ids, segments[1:])], [], TOY)


def test_color_alone_stays_below_35_percent_on_the_synthetic_data_set() -> None:
    result = color_baseline(synthetic_records(1, 300), synthetic_records(2, 200), Taxonomy.from_coco(CATEGORIES))
    assert 0.02 < result.pq < 0.35
