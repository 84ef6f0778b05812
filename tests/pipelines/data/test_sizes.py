"""Sizes of many augmented images against those drawn with a generator for each image."""

import numpy as np
import pytest

from pipelines.data.augment import augmented_size, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.sizes import augmented_sizes

PUBLISHED = AugmentConfig()
HUGE = AugmentConfig(crop_short_sides=(3_000_000_000,), crop_long_side=None, crop_probability=1)
"""Half of the integers are rejected, as so large a range does not divide 2**32."""


def one_by_one(
    image_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, config: AugmentConfig
) -> np.ndarray:
    images = zip(image_ids.tolist(), heights.tolist(), widths.tolist(), strict=True)
    return np.array([augmented_size(h, w, sample_rng(seed, epoch, image), config) for image, h, w in images])


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 299, 2**33])
@pytest.mark.parametrize("config", [PUBLISHED, HUGE], ids=["published", "huge"])
def test_sizes_are_those_of_single_images(seed: int, epoch: int, config: AugmentConfig) -> None:
    rng = np.random.default_rng(epoch + seed % 100)
    heights, widths = rng.integers(1, 1000, (2, 300))
    heights[:20], widths[10:30] = 400, 384  # as large as a crop, whose place is then not drawn
    ids = rng.choice([2, 600_000, 2**32, 2**63 - 1], 300)
    ids = rng.integers(0, ids)
    arguments = (ids, heights, widths, seed, epoch, config)
    np.testing.assert_array_equal(augmented_sizes(*arguments), one_by_one(*arguments))


def test_sizes_with_random_configurations() -> None:
    rng = np.random.default_rng(0)
    for seed in range(60):
        smallest, largest = np.sort(rng.integers(1, 60, 2)).tolist()
        config = AugmentConfig(
            crop_probability=rng.random(),
            short_sides=tuple(rng.integers(1, 60, rng.integers(1, 4)).tolist()),
            crop_short_sides=tuple(rng.integers(1, 60, rng.integers(1, 4)).tolist()),
            crop_size=(smallest, largest),
            long_side=int(rng.integers(20, 90)),
            crop_long_side=[None, 70][int(rng.integers(2))],
        )
        heights, widths = rng.integers(1, 100, (2, 50))
        arguments = (rng.integers(0, 2**32, 50), heights, widths, seed, 1, config)
        np.testing.assert_array_equal(augmented_sizes(*arguments), one_by_one(*arguments))


def test_no_images_have_no_sizes() -> None:
    nothing = np.zeros(0, np.int64)
    assert augmented_sizes(nothing, nothing, nothing, 0, 0, PUBLISHED).shape == (0, 2)
