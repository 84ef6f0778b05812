"""Resizing and normalization against definitions by hand and against OpenCV's and Pillow's rules."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskformer.preprocess import normalize, resize_image, resized_shape


@pytest.mark.parametrize(
    ("size", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((400, 1000), 800, 1333, (533, 1333)),  # the long side is the limit
        ((400, 1000), 800, None, (800, 2000)),
        ((1600, 3200), 800, 1333, (667, 1333)),
        ((1, 5000), 32, 64, (1, 64)),  # never empty
        ((3, 2), 3, None, (5, 3)),  # 4.5 rounds up
    ],
)
def test_resized_shape_keeps_the_ratio_within_both_limits(
    size: tuple[int, int], short_side: int, long_side: int | None, expected: tuple[int, int]
) -> None:
    assert resized_shape(*size, short_side, long_side) == expected


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow_resize(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Bilinear by definition, as OpenCV does it: pixel centers at one half, the border repeated, no smoothing."""
    result = image.astype(np.float64)
    for axis, new in enumerate(shape):
        old = result.shape[axis]
        centers = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        lower = np.floor(centers).astype(int)
        upper = np.minimum(lower + 1, old - 1)
        share = np.expand_dims(centers - lower, tuple({0, 1, 2} - {axis}))
        result = (1 - share) * result.take(lower, axis) + share * result.take(upper, axis)
    return result


@pytest.mark.parametrize("shape", [(9, 13), (40, 31), (20, 7)], ids=["smaller", "larger", "both"])
def test_without_antialias_the_result_is_that_of_opencv(shape: tuple[int, int]) -> None:
    image = random_image(20, 26)
    resized = resize_image(image, shape)
    assert (resized.dtype, resized.shape) == (np.uint8, (*shape, 3))
    assert np.abs(resized - slow_resize(image, shape)).max() <= 1.0  # one step of rounding


@pytest.mark.parametrize("shape", [(9, 13), (40, 31), (20, 7)], ids=["smaller", "larger", "both"])
def test_with_antialias_the_result_is_that_of_pillow(shape: tuple[int, int]) -> None:
    image = random_image(20, 26)
    expected = np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BILINEAR))
    resized = resize_image(image, shape, antialias=True).astype(int)
    assert np.abs(resized - expected).max() <= 1


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("shape", [(9, 13), (40, 31), (20, 7), (20, 26), (1, 1), (333, 517)])
def test_the_result_is_that_of_torchvision(shape: tuple[int, int], antialias: bool) -> None:
    """To the bit, also of an image that is mirrored or cut out, whose pixels do not follow each other in memory."""
    from torchvision.transforms.v2 import functional as tv

    image = random_image(31, 40)[5:25, 33:7:-1]
    planes = torch.from_numpy(image.copy()).permute(2, 0, 1)
    expected = tv.resize(planes, list(shape), antialias=antialias).permute(1, 2, 0).numpy()
    assert np.array_equal(resize_image(image, shape, antialias), expected)


def test_normalize_subtracts_the_mean_and_divides_by_the_deviation() -> None:
    images = torch.tensor([[[[0, 255]], [[10, 20]], [[7, 8]]]], dtype=torch.uint8)
    normalized = normalize(images, (1.0, 10.0, 0.0), (2.0, 5.0, 4.0))
    assert normalized.dtype == torch.float32
    assert normalized.tolist() == [[[[-0.5, 127.0]], [[0.0, 2.0]], [[1.75, 2.0]]]]
