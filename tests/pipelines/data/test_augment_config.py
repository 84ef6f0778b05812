"""AugmentConfig accepts values up to its limits and refuses all beyond."""

from typing import Any

import pytest

from pipelines.data.augment_config import AugmentConfig


@pytest.mark.parametrize("name", ["flip_probability", "crop_probability"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_probabilities_at_the_limits_are_accepted(name: str, value: float) -> None:
    assert getattr(AugmentConfig(**{name: value}), name) == value  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["flip_probability", "crop_probability"])
@pytest.mark.parametrize("value", [-0.001, 1.001, float("nan")])
def test_other_probabilities_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"augment\.{name} must lie in \[0, 1\], got {value}\."):
        AugmentConfig(**{name: value})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["short_sides", "crop_short_sides"])
@pytest.mark.parametrize("value", [(1,), (480, 1, 800)])
def test_short_sides_of_one_pixel_are_accepted(name: str, value: tuple[int, ...]) -> None:
    changes: dict[str, Any] = {name: value}
    assert getattr(AugmentConfig(**changes), name) == value


@pytest.mark.parametrize("name", ["short_sides", "crop_short_sides"])
@pytest.mark.parametrize("value", [(), (0,), (480, 0), (480, -1, 800)])
def test_missing_or_nonpositive_short_sides_are_refused(name: str, value: tuple[int, ...]) -> None:
    changes: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"augment\.{name} must have at least one length, all positive, got \("):
        AugmentConfig(**changes)


@pytest.mark.parametrize("value", [(1, 1), (1, 600), (600, 600)])
def test_crop_ranges_at_the_limits_are_accepted(value: tuple[int, int]) -> None:
    assert AugmentConfig(crop_size=value).crop_size == value


@pytest.mark.parametrize("value", [(0, 0), (0, 600), (-1, 600), (601, 600)])
def test_other_crop_ranges_are_refused(value: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"augment\.crop_size must be a range \(smallest, largest\), got \("):
        AugmentConfig(crop_size=value)
