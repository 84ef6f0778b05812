"""Sizes of many augmented images, without a generator object for each of them.

`augmented_size` takes 20 us an image, most of it for a generator. An order that depends on sizes needs those of all
workers' images in each worker, so this module draws the same numbers for an array of images, in about 1 us an image.
It repeats NumPy's SeedSequence, PCG64 and bounded integers: https://numpy.org/doc/stable/reference/random.
"""

from collections.abc import Iterator

import numpy as np

from pipelines.data.augment import augmented_size, sample_rng
from pipelines.data.augment_config import AugmentConfig

_MULTIPLIER = 0x2360ED051FC65DA44385DF649FCCF645
"""Of the 128-bit linear congruential generator in PCG64."""


def augmented_sizes(
    image_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, seed: int, epoch: int, config: AugmentConfig
) -> np.ndarray:
    """Return the heights and widths of images as augmented in an epoch, [N, 2] int64.

    Args:
        image_ids, heights, widths: [N], not negative, of the images before the augmentation.
    """
    numbers = _Numbers(_seeded([*_words(seed), *_words(epoch)], np.asarray(image_ids).astype(np.uint32)))
    numbers.random()  # the flip
    cropped = numbers.random() < config.crop_probability
    numbers.start_integers()
    height, width = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    short = np.array(config.crop_short_sides)[numbers.integers(len(config.crop_short_sides) - 1, cropped)]
    shape = _resized_shapes(height, width, short, config.crop_long_side)
    sides = []
    for side in shape:
        least, most = (np.minimum(side, limit) for limit in config.crop_size)
        sides.append(least + numbers.integers(most - least, cropped))
    for side, kept in zip(shape, sides, strict=True):  # the place of the window
        numbers.integers(side - kept, cropped)
    height, width = np.where(cropped, sides[0], height), np.where(cropped, sides[1], width)
    short = np.array(config.short_sides)[numbers.integers(len(config.short_sides) - 1, True)]
    sizes = np.stack(_resized_shapes(height, width, short, config.long_side), axis=1)
    for n in np.flatnonzero(numbers.unknown | (np.asarray(image_ids) >= 2**32)):
        rng = sample_rng(seed, epoch, int(image_ids[n]))
        sizes[n] = augmented_size(int(heights[n]), int(widths[n]), rng, config)
    return sizes


def _resized_shapes(
    height: np.ndarray, width: np.ndarray, short_side: np.ndarray, long_side: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Do what `resized_shape` does for one image."""
    scale = short_side / np.minimum(height, width)
    if long_side is not None:
        scale = np.minimum(scale, long_side / np.maximum(height, width))
    first, second = (np.maximum(1, (side * scale + 0.5).astype(np.int64)) for side in (height, width))
    return first, second


class _Numbers:
    """The numbers that `np.random.Generator(PCG64)` draws, for N generators at once.

    All floats must be drawn before the integers, which take half a number of PCG64 each, the low one first.
    """

    def __init__(self, state: list[np.ndarray]) -> None:
        """Start from SeedSequence's four words of 64 bits, [N] each."""
        self._increment = (
            state[2] << np.uint64(1) | state[3] >> np.uint64(63),
            state[3] << np.uint64(1) | np.uint64(1),
        )
        self._high, self._low = _add(self._increment, (state[0], state[1]))
        self._step()
        self._rows = np.arange(len(state[0]))
        self.unknown = np.zeros(len(state[0]), bool)
        """[N] where a number was rejected, so that what follows is not the generator's."""

    def random(self) -> np.ndarray:
        """Draw floats in [0, 1)."""
        return (self._next() >> np.uint64(11)) * 2.0**-53

    def start_integers(self, at_most: int = 6) -> None:
        """Prepare for that many integers per generator."""
        drawn = [self._next() for _ in range((at_most + 1) // 2)]
        self._halves = np.stack([half for number in drawn for half in (number & _LOW, number >> _HALF)])
        self._used = np.zeros(len(self._rows), np.int64)

    def integers(self, largest: np.ndarray | int, where: np.ndarray | bool) -> np.ndarray:
        """Draw integers from 0 to `largest`, [N] or one for all; 0 `where` none is drawn, as if there was no call."""
        count = np.asarray(largest).astype(np.uint64) + np.uint64(1)
        drawn = (count > 1) & where  # NumPy takes no number if there is no choice
        product = self._halves[self._used, self._rows] * count
        self._used = self._used + drawn
        # Lemire's method; the threshold is 2**32 mod `count`.
        self.unknown |= drawn & ((product & _LOW) < np.uint64(1 << 32) % count)
        return np.where(drawn, product >> _HALF, np.uint64(0)).astype(np.int64)

    def _next(self) -> np.ndarray:
        self._step()
        mixed, turn = self._high ^ self._low, self._high >> np.uint64(58)
        return mixed >> turn | mixed << (-turn & np.uint64(63))

    def _step(self) -> None:
        """Multiply the 128 bits by the constant and add the increment."""
        high, low = np.uint64(_MULTIPLIER >> 64), np.uint64(_MULTIPLIER & (1 << 64) - 1)
        product = _high_product(self._low, low) + self._low * high + self._high * low
        self._high, self._low = _add((product, self._low * low), self._increment)


_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)

Pair = tuple[np.ndarray, np.ndarray]


def _add(one: Pair, other: Pair) -> Pair:
    """Add numbers of 128 bits, given as their high and low words."""
    low = one[1] + other[1]
    return one[0] + other[0] + (low < other[1]), low


def _high_product(values: np.ndarray, constant: np.uint64) -> np.ndarray:
    """Return the upper 64 bits of the products, which have 128."""
    high, low = values >> _HALF, values & _LOW
    of_high, of_low = constant >> _HALF, constant & _LOW
    middle = low * of_high + (low * of_low >> _HALF)
    return high * of_high + (middle >> _HALF) + ((middle & _LOW) + high * of_low >> _HALF)


def _words(value: int) -> list[int]:
    """Split a number into words of 32 bits, the low one first."""
    return [value & 0xFFFFFFFF, *(_words(value >> 32) if value >> 32 else [])]


def _seeded(first: list[int], last: np.ndarray) -> list[np.ndarray]:
    """Return the state, four words of 64 bits, of `SeedSequence([*first, value])` for each value [N] of `last`."""
    entropy = [*(np.full_like(last, word) for word in first), last]
    entropy += [np.zeros_like(last)] * (4 - len(entropy))
    constants = _constants(0x43B0D7E5, 0x931E8875)
    pool = [_hashed(word, next(constants)) for word in entropy[:4]]
    for source in range(4):
        for target in range(4):
            if source != target:
                pool[target] = _mixed(pool[target], _hashed(pool[source], next(constants)))
    for word in entropy[4:]:
        for target in range(4):
            pool[target] = _mixed(pool[target], _hashed(word, next(constants)))
    constants = _constants(0x8B51F9DD, 0x58F38DED)
    state = [_hashed(word, next(constants)).astype(np.uint64) for word in pool * 2]
    return [low | high << _HALF for low, high in zip(state[::2], state[1::2], strict=True)]


def _constants(value: int, factor: int) -> Iterator[tuple[np.uint32, np.uint32]]:
    """Yield a constant and the next one, for each word that is hashed."""
    while True:
        following = value * factor & 0xFFFFFFFF
        yield np.uint32(value), np.uint32(following)
        value = following


def _hashed(words: np.ndarray, constants: tuple[np.uint32, np.uint32]) -> np.ndarray:
    words = (words ^ constants[0]) * constants[1]
    return words ^ words >> np.uint32(16)


def _mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    words = one * np.uint32(0xCA01F9DD) - other * np.uint32(0x4973F715)
    return words ^ words >> np.uint32(16)
