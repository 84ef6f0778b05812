"""Augmentation keeps the class of each pixel, and is determined by the seed, the epoch and the image id."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from maskformer.preprocess import resized_shape
from pipelines.data.augment import (
    Plan,
    Sample,
    augment,
    augmented_size,
    draw_plan,
    draw_window,
    drop_empty,
    resize_nearest,
    sample_rng,
    transform_map,
)
from pipelines.data.augment_config import AugmentConfig

COLORS = np.array([[0, 0, 0], [250, 10, 10], [10, 250, 10], [10, 10, 250]], np.uint8)
CLASSES = np.array([5, 2, 9], np.int16)
SMALL = AugmentConfig(short_sides=(40, 48, 56), long_side=90, crop_short_sides=(40, 50), crop_size=(24, 40))


def quarters(height: int = 60, width: int = 80) -> Sample:
    """Draw four rectangles, each in the color of its segment."""
    index_map = np.zeros((height, width), np.uint16)
    index_map[: height // 2, width // 2 :] = 1
    index_map[height // 2 :, : width // 2] = 2
    index_map[height // 2 :, width // 2 :] = 3
    return Sample(COLORS[index_map], index_map, CLASSES)


def random_config(rng: np.random.Generator) -> AugmentConfig:
    smallest, largest = np.sort(rng.integers(2, 60, 2)).tolist()
    return AugmentConfig(
        flip_probability=rng.random(),
        crop_probability=rng.random(),
        short_sides=tuple(rng.integers(2, 90, rng.integers(1, 4)).tolist()),
        crop_short_sides=tuple(rng.integers(2, 90, rng.integers(1, 4)).tolist()),
        crop_size=(smallest, largest),
        long_side=int(rng.integers(20, 120)),
        crop_long_side=[None, 70][int(rng.integers(2))],
        interpolation="bilinear-antialias" if rng.random() < 0.5 else "bilinear",
        keep_empty=bool(rng.integers(2)),
    )


def assert_image_and_map_agree(sample: Sample) -> None:
    """Check that pixels away from an edge have the color of their segment's class."""
    by_class = {5: COLORS[1], 2: COLORS[2], 9: COLORS[3]}
    colors = np.stack([COLORS[0], *(by_class[int(c)] for c in sample.classes)])
    wrong = (np.abs(sample.image.astype(int) - colors[sample.index_map].astype(int)) > 8).any(-1)
    edge = np.zeros_like(wrong)
    edge[:, 1:] |= sample.index_map[:, 1:] != sample.index_map[:, :-1]
    edge[1:] |= sample.index_map[1:] != sample.index_map[:-1]
    for _ in range(3):  # the blur of two resizes
        edge = edge | np.roll(edge, 1, 0) | np.roll(edge, -1, 0) | np.roll(edge, 1, 1) | np.roll(edge, -1, 1)
    assert not (wrong & ~edge).any()


@pytest.mark.parametrize("image_id", range(12))
def test_image_and_map_stay_together(image_id: int) -> None:
    result = augment(quarters(), sample_rng(0, 1, image_id), SMALL)
    assert result.image.shape[:2] == result.index_map.shape
    assert_image_and_map_agree(result)
    # Every listed segment has pixels, and every number is listed.
    assert sorted(np.unique(result.index_map[result.index_map > 0])) == list(range(1, len(result.classes) + 1))


def test_sample_depends_on_seed_epoch_and_image_alone() -> None:
    def draw(*key: int) -> bytes:
        return augment(quarters(), sample_rng(*key), SMALL).image.tobytes()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert len({draw(0, 1, 2), draw(1, 1, 2), draw(0, 2, 2), draw(0, 1, 3)}) == 4


def test_the_size_is_known_without_pixels() -> None:
    rng = np.random.default_rng(0)
    for image_id in range(150):
        config = random_config(rng)
        height, width = rng.integers(2, 100, 2).tolist()
        sample = augment(quarters(height, width), sample_rng(7, 3, image_id), config)
        assert augmented_size(height, width, sample_rng(7, 3, image_id), config) == sample.index_map.shape


def test_choosing_from_a_tuple_draws_an_integer() -> None:
    """Sizes were once drawn by `Generator.choice`, and runs from that time must be able to resume."""
    for length in (1, 2, 3, 5, 11, 100):
        values = tuple(range(480, 480 + 32 * length, 32))
        one, other = sample_rng(0, 0, length), sample_rng(0, 0, length)
        for _ in range(200):
            assert one.choice(values) == values[int(other.integers(length))]
            assert one.random() == other.random()


def test_a_flip_mirrors_image_and_map() -> None:
    sample = quarters()
    always = replace(SMALL, flip_probability=1.0, crop_probability=0.0, short_sides=(60,))
    flipped = augment(sample, sample_rng(0, 0, 0), always)
    np.testing.assert_array_equal(flipped.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(flipped.index_map, sample.index_map[:, ::-1])


def test_crop_sides_cover_their_range() -> None:
    rng = np.random.default_rng(0)
    windows = [draw_window(60, 80, rng, (20, 24)) for _ in range(300)]
    shapes = np.array([[side.stop - side.start for side in window] for window in windows])
    assert {tuple(np.unique(side)) for side in shapes.T} == {(20, 21, 22, 23, 24)}
    assert len(set(map(tuple, shapes.tolist()))) > 20  # height and width are drawn independently
    assert {window[0].start for window in windows} <= set(range(41))
    assert {window[1].stop for window in windows} <= set(range(20, 81))
    assert draw_window(10, 30, rng, (20, 24))[0] == slice(0, 10)


def test_resize_keeps_the_nearest_pixel_by_index() -> None:
    index_map = np.arange(35, dtype=np.uint16).reshape(5, 7)
    plan = Plan(flipped=False, crop=None, shape=(13, 18))
    result, _ = transform_map(index_map, np.arange(34, dtype=np.int16), plan, keep_empty=True)
    assert result.shape == (13, 18)
    for y in range(13):
        for x in range(18):
            assert result[y, x] == index_map[y * 5 // 13, x * 7 // 18]


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [((480, 640), 800, 1333, (800, 1067)), ((427, 640), 800, 1333, (800, 1199)), ((200, 640), 800, 1333, (417, 1333))],
)
def test_resized_shape(size: tuple[int, int], short: int, long: int, expected: tuple[int, int]) -> None:
    assert resized_shape(*size, short, long) == expected


def test_published_policies() -> None:
    """Half of the images are cropped; short sides are multiples of 32 from 480 to 800."""
    config = AugmentConfig()
    assert config.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (config.crop_short_sides, config.crop_size, config.long_side) == ((400, 500, 600), (384, 600), 1333)
    assert (config.flip_probability, config.crop_probability) == (0.5, 0.5)


def test_segments_without_pixels_are_dropped() -> None:
    index_map = quarters().index_map
    assert drop_empty(index_map[:30], CLASSES)[1].tolist() == [5]
    assert drop_empty(index_map[:30, :40], CLASSES)[1].tolist() == []
    bottom, classes = drop_empty(index_map[30:], CLASSES)
    assert classes.tolist() == [2, 9]
    assert set(np.unique(bottom)) == {1, 2}


def test_segments_without_pixels_can_be_kept() -> None:
    """The image and the random numbers are the same; only the segments outside the crop differ."""
    cropping = AugmentConfig(
        short_sides=(20,), crop_short_sides=(60,), crop_size=(20, 20), flip_probability=0.0, crop_probability=1.0
    )
    lost = 0
    for image_id in range(10):
        kept, dropped = (
            augment(quarters(), sample_rng(0, 0, image_id), replace(cropping, keep_empty=keep))
            for keep in (True, False)
        )
        lost += len(kept.classes) - len(dropped.classes)
        np.testing.assert_array_equal(kept.image, dropped.image)
        np.testing.assert_array_equal(kept.classes, quarters().classes)
        # The class of every pixel is the same; 0 is void in both.
        with_kept, with_dropped = (
            np.concatenate([[-1], sample.classes])[sample.index_map] for sample in (kept, dropped)
        )
        np.testing.assert_array_equal(with_kept, with_dropped)
    assert lost > 0


def slow_resize(sample: Sample, shape: tuple[int, int], interpolation: str) -> Sample:
    """torch's resizes, of the map by way of float32, which represents every number exactly."""
    image = F.interpolate(
        torch.tensor(sample.image.copy()).permute(2, 0, 1)[None],
        shape,
        mode="bilinear",
        align_corners=False,
        antialias=interpolation == "bilinear-antialias",
    )
    plane = F.interpolate(torch.tensor(sample.index_map.astype(np.float32))[None, None], shape, mode="nearest")
    index_map = plane[0, 0].numpy().astype(sample.index_map.dtype)
    return sample._replace(image=image[0].permute(1, 2, 0).numpy(), index_map=index_map)


def slow_drop(sample: Sample) -> Sample:
    """Look at the pixels of one segment after the other."""
    index_map, classes = np.zeros_like(sample.index_map), []
    for number, class_index in enumerate(sample.classes, 1):
        if (sample.index_map == number).any():
            classes.append(class_index)
            index_map[sample.index_map == number] = len(classes)
    return sample._replace(index_map=index_map, classes=np.array(classes, np.int16))


def slow_augment(sample: Sample, rng: np.random.Generator, config: AugmentConfig) -> Sample:
    """Do each step of the plan with the whole image and the whole map."""
    height, width = sample.index_map.shape
    plan = draw_plan(height, width, rng, config)
    if plan.flipped:
        sample = sample._replace(image=sample.image[:, ::-1], index_map=sample.index_map[:, ::-1])
    if plan.crop:
        sample = slow_resize(sample, plan.crop.shape, config.interpolation)
        window = plan.crop.window
        sample = sample._replace(image=sample.image[window], index_map=sample.index_map[window])
    sample = slow_resize(sample, plan.shape, config.interpolation)
    return sample if config.keep_empty else slow_drop(sample)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_augmentation_equals_its_steps_one_by_one(dtype: type) -> None:
    rng = np.random.default_rng(3)
    for image_id in range(120):
        height, width = rng.integers(2, 120, 2).tolist()
        count = int(rng.integers(0, 256))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        few = rng.integers(0, count + 1, 9)  # of all numbers, so that segments are lost before and after
        index_map = np.where(rng.random((height, width)) < 0.9, rng.choice(few), rng.choice(few, (height, width)))
        sample = Sample(image, index_map.astype(dtype), rng.integers(0, 133, count).astype(np.int16))
        config = random_config(rng)
        found = augment(sample, sample_rng(1, 2, image_id), config)
        expected = slow_augment(sample, sample_rng(1, 2, image_id), config)
        assert (found.image.dtype, found.index_map.dtype, found.classes.dtype) == (np.uint8, dtype, np.int16)
        np.testing.assert_array_equal(found.image, expected.image)
        np.testing.assert_array_equal(found.index_map, expected.index_map)
        np.testing.assert_array_equal(found.classes, expected.classes)


def test_lines_are_resized_as_torch_does() -> None:
    for size in range(1, 130, 3):
        for length in range(1, 260, 7):
            line = torch.arange(size, dtype=torch.float32)
            expected = F.interpolate(line[None, None], length, mode="nearest")[0, 0].numpy()
            np.testing.assert_array_equal(resize_nearest(np.arange(size), length), expected)


def test_bytes_and_words_give_the_same_sample() -> None:
    sample = quarters()
    small, large = (sample._replace(index_map=sample.index_map.astype(dtype)) for dtype in (np.uint8, np.uint16))
    for image_id in range(12):
        one, other = (augment(each, sample_rng(0, 1, image_id), SMALL) for each in (small, large))
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.index_map, other.index_map)
        np.testing.assert_array_equal(one.classes, other.classes)
