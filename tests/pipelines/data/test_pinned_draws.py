"""What a run draws, as stored values.

A run must be able to resume after an upgrade of this program or of a library, and then see the samples, augmentations
and dropout masks that it would have seen without. A changed constant or a changed stream of a generator keeps every
property that other tests check, such as each sample once per epoch, but not these values. Do not update them: a failure
means that stored runs would continue with other data. The exception is the last test, on PyTorch's dropout on a CPU,
which PyTorch may change; then the changelog must say that runs resume with other dropout masks.
"""

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit, dropout_seed, permutation, samples_at

COCO = 118_287


@pytest.mark.parametrize(
    ("seed", "epoch", "of_ten", "of_coco"),
    [
        (0, 0, [0, 9, 1, 6, 3, 5, 4, 2, 8, 7], [22662, 16780, 116036, 98546, 28114]),
        (0, 1, [8, 3, 0, 1, 5, 2, 7, 4, 9, 6], [12001, 69937, 64543, 2675, 105702]),
        (1, 0, [2, 5, 8, 9, 1, 4, 6, 0, 3, 7], [3522, 19047, 22192, 69636, 44615]),
        (2**64 - 1, 7, [4, 0, 6, 5, 3, 8, 9, 2, 1, 7], [114792, 74170, 114195, 30497, 40833]),
    ],
)
def test_order_of_samples(seed: int, epoch: int, of_ten: list[int], of_coco: list[int]) -> None:
    assert permutation(10, seed, epoch).tolist() == of_ten
    assert permutation(COCO, seed, epoch)[:5].tolist() == of_coco


def test_samples_at_positions() -> None:
    epochs, samples = samples_at(np.arange(7, 15), 5, seed=2**63)
    assert epochs.tolist() == [1, 1, 1, 2, 2, 2, 2, 2]
    assert samples.tolist() == [3, 2, 0, 0, 4, 2, 3, 1]


def test_positions_of_a_worker() -> None:
    split = BatchSplit(global_batch=8, micro_batch=2, workers=2)
    assert split.positions(1, 3, 5).tolist() == [26, 27, 30, 31, 34, 35, 38, 39]


@pytest.mark.parametrize(
    ("seed", "epoch", "image_id", "floats", "choice", "integers"),
    [
        (0, 0, 139, [0.21404837157127632, 0.7611204926986637], 512, [60, 475, 0, 86]),
        (0, 1, 139, [0.9273418222637178, 0.0006026605208026004], 480, [442, 264, 452, 115]),
        (2**64 - 1, 3, 581929, [0.35661761665432723, 0.5597701967248948], 544, [262, 683, 122, 362]),
    ],
)
def test_generator_of_a_sample(
    seed: int, epoch: int, image_id: int, floats: list[float], choice: int, integers: list[int]
) -> None:
    """The three kinds of draws that the augmentation uses."""
    rng = sample_rng(seed, epoch, image_id)
    assert [rng.random(), rng.random()] == floats
    assert rng.choice((480, 512, 544)) == choice
    assert rng.integers(0, 1000, 4, endpoint=True).tolist() == integers


@pytest.mark.parametrize(
    ("image_id", "shape", "corners"),
    [
        (0, (41, 40), [[6, 66], [6, 18], [55, 66]]),
        (1, (40, 53), [[0, 0], [0, 78], [58, 0]]),
        (2, (48, 70), [[19, 19], [19, 75], [57, 19]]),
        (4, (48, 64), [[0, 79], [0, 1], [58, 79]]),
    ],
)
def test_augmented_sample(image_id: int, shape: tuple[int, int], corners: list[list[int]]) -> None:
    """Each pixel is a segment of its own, so that the index map tells where a pixel comes from: row and column."""
    height, width = 60, 80
    index_map = np.arange(1, height * width + 1, dtype=np.uint16).reshape(height, width)
    sample = Sample(np.zeros((height, width, 3), np.uint8), index_map, np.zeros(height * width, np.int16))
    config = AugmentConfig(
        short_sides=(40, 48, 56), long_side=90, crop_short_sides=(40, 50), crop_size=(24, 40), keep_empty=True
    )
    found = augment(sample, sample_rng(5, 2, image_id), config).index_map
    places = [divmod(int(found[place]) - 1, width) for place in ((0, 0), (0, -1), (-1, 0))]
    assert (found.shape, [list(place) for place in places]) == (shape, corners)


@pytest.mark.parametrize(
    ("seed", "position", "cpu", "cuda"),
    [
        (0, 0, 2802244911, 12035550249420947055),
        (0, 1, 146079144, 627405149472732430),
        (1, 0, 1581361928, 6791897765849424158),
        (1, 2**40, 1023131415, 4394315971144372773),
        (2**32, 0, 3220505974, 13831967835898817870),
        (2**64 - 1, 2**63 - 1, 2996310148, 12869054096415743361),
    ],
)
def test_dropout_seeds(seed: int, position: int, cpu: int, cuda: int) -> None:
    assert dropout_seed(seed, position) == dropout_seed(seed, position, "cpu") == cpu
    assert dropout_seed(seed, position, "cuda") == cuda


@pytest.mark.parametrize(
    ("seed", "position", "kept"),
    [(0, 0, "1101011100110001"), (1, 48, "1011111000001111")],
)
def test_dropout_mask_of_pytorch(seed: int, position: int, kept: str) -> None:
    torch.manual_seed(dropout_seed(seed, position))
    mask = nn.functional.dropout(torch.ones(16), 0.5) > 0
    assert "".join(str(int(value)) for value in mask) == kept
