"""Pictures of segmentations: which pixels change, in which color, and where names fit."""

import itertools
from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

from maskformer.draw import outlines, overlay, paint, segment_colors
from maskformer.taxonomy import COCO, Category, Taxonomy

TAXONOMY = Taxonomy(
    (
        Category(1, "cat", True, (200, 30, 30)),
        Category(2, "dog", True),
        Category(9, "sky", False),
        Category(12, "sea", False),
    )
)
Drawn = tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]


def scene(seed: int = 0, size: tuple[int, int] = (60, 90)) -> Drawn:
    """Return an image of blocks of two things, a crowd, two stuff segments and void."""
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 11, 22, 33, 44, 55], (size[0] // 15 + 1, size[1] // 15 + 1)).astype(np.int32)
    ids = ids.repeat(15, 0).repeat(15, 1)[: size[0], : size[1]]
    segments = [
        {"id": 11, "category_id": 1, "iscrowd": 0},
        {"id": 22, "category_id": 1},
        {"id": 33, "category_id": 2, "iscrowd": 1},
        {"id": 44, "category_id": 9},
        {"id": 55, "category_id": 12},
    ]
    present = set(np.unique(ids).tolist())
    return rng.integers(0, 256, (*size, 3), np.uint8), ids, [each for each in segments if each["id"] in present]


def slow_outline(ids: np.ndarray) -> np.ndarray:
    height, width = ids.shape
    edge = np.zeros(ids.shape, bool)
    for y, x in itertools.product(range(height), range(width)):
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [ids[at] for at in near if 0 <= at[0] < height and 0 <= at[1] < width]
        edge[y, x] = ids[y, x] != 0 and any(other != ids[y, x] for other in inside)
    return edge


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (12, 17)])
def test_outlines_are_the_pixels_next_to_another_segment(shape: tuple[int, int]) -> None:
    for seed in range(5):
        ids = np.random.default_rng(seed).integers(0, 3, shape).repeat(2, 0)
        assert np.array_equal(outlines(ids), slow_outline(ids))


@pytest.mark.parametrize("width", [2, 3])
def test_wide_outlines_reach_further(width: int) -> None:
    numbers = np.random.default_rng(0).integers(0, 3, (4, 5)).repeat(5, 0).repeat(5, 1)
    expected = np.zeros(numbers.shape, bool)
    for (y, x), number in np.ndenumerate(numbers):
        for step in range(1, width + 1):
            for at in ((y - step, x), (y + step, x), (y, x - step), (y, x + step)):
                if min(at) >= 0 and at[0] < 20 and at[1] < 25 and numbers[at] != number:
                    expected[y, x] = number != 0
    assert np.array_equal(outlines(numbers, width), expected)


def test_large_pictures_are_painted_as_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    image, ids, segments = scene(3, (70, 90))
    whole = overlay(image, ids, segments, TAXONOMY)
    monkeypatch.setattr("maskformer.draw._STRIP_PIXELS", 1000)
    assert np.array_equal(overlay(image, ids, segments, TAXONOMY), whole)
    monkeypatch.setattr("maskformer.draw._NAMING_SIDE", 30)
    assert not np.array_equal(overlay(image, ids, segments, TAXONOMY), paint(image, ids, segments, TAXONOMY))
    for size in ((1, 5000), (5000, 1), (1100, 3)):
        assert overlay(*scene(0, size), TAXONOMY).shape == (*size, 3)


def test_void_stays_and_every_segment_has_its_color() -> None:
    image, ids, segments = scene()
    before = image.copy()
    painted = paint(image, ids, segments, TAXONOMY)
    assert np.array_equal(image, before)
    assert np.array_equal(painted[ids == 0], image[ids == 0])
    edge = slow_outline(ids)
    for segment, color in zip(segments, segment_colors(segments, TAXONOMY), strict=True):
        mask = ids == segment["id"]
        assert (painted[mask & edge] == color).all()
        inside = mask & ~edge
        moved = np.abs(painted[inside].astype(int) - image[inside])
        distance = np.abs(color.astype(int) - image[inside])
        if segment.get("iscrowd"):  # hatched: half is as it was
            plain = (moved == 0).all(axis=1)
            assert 0.3 < plain.mean() < 0.7
            moved, distance = moved[~plain], distance[~plain]
        assert (moved <= distance).all()
        assert 0.25 < moved.sum() / distance.sum() < 0.75  # translucent


def test_ids_that_are_not_listed_are_void() -> None:
    image, ids, segments = scene()
    kept = [segment for segment in segments if segment["id"] != 44]
    painted = paint(image, ids, kept, TAXONOMY)
    assert np.array_equal(painted[ids == 44], image[ids == 44])
    assert np.array_equal(paint(image, ids, [], TAXONOMY), image)
    assert np.array_equal(overlay(image, ids, [], TAXONOMY), image)


def test_the_type_of_ids_does_not_matter() -> None:
    image, ids, segments = scene()
    for dtype in (np.uint8, np.uint16, np.int64):
        assert np.array_equal(
            overlay(image, ids.astype(dtype), segments, TAXONOMY), overlay(image, ids, segments, TAXONOMY)
        )


def test_the_color_of_a_class_does_not_depend_on_the_image() -> None:
    def color(*category_ids: int) -> list[list[int]]:
        return segment_colors([{"id": n, "category_id": c} for n, c in enumerate(category_ids)], TAXONOMY).tolist()

    assert color(9, 1, 12)[1:] == color(1, 2, 12)[::2]
    one, two, three = color(1, 1, 1)
    assert len({tuple(one), tuple(two), tuple(three)}) == 3
    sky, again = color(9, 9)  # stuff is one region
    assert sky == again
    assert segment_colors([], TAXONOMY).shape == (0, 3)
    red, green, blue = one
    assert red > 3 * green
    assert red > 3 * blue  # the category's own color


def test_no_color_is_too_dark_or_too_light_to_be_seen() -> None:
    segments = [
        {"id": 10 * n + k, "category_id": category.id} for n, category in enumerate(COCO.categories) for k in range(9)
    ]
    colors = segment_colors(segments, COCO).astype(int)
    lightness = (colors.max(axis=1) + colors.min(axis=1)) / 2 / 255
    assert lightness.min() > 0.24
    assert lightness.max() < 0.81


Boxes = list[tuple[int, int, int, int]]


@pytest.fixture
def boxes(monkeypatch: pytest.MonkeyPatch) -> Boxes:
    """Collect the boxes of the names that are drawn."""
    found: Boxes = []
    original = ImageDraw.ImageDraw.rectangle

    def rectangle(self: ImageDraw.ImageDraw, box: tuple[int, int, int, int], *args: Any) -> None:
        found.append(box)
        original(self, box, *args)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", rectangle)
    return found


@pytest.mark.parametrize("size", [(60, 90), (400, 300), (800, 700), (20, 400), (400, 20), (1, 1), (3, 200)])
def test_names_lie_inside_the_picture_and_apart(size: tuple[int, int], boxes: Boxes) -> None:
    total = 0
    for seed in range(3):
        boxes.clear()
        image, ids, segments = scene(seed, size)
        named = overlay(image, ids, segments, TAXONOMY)
        covered = np.zeros(size, int)
        for left, top, right, bottom in boxes:
            assert 0 <= left <= right < size[1]
            assert 0 <= top <= bottom < size[0]
            covered[top : bottom + 1, left : right + 1] += 1
        assert covered.max() <= 1
        unnamed = paint(image, ids, segments, TAXONOMY)
        assert np.array_equal(named[covered == 0], unnamed[covered == 0])  # the letters stay in their boxes
        total += len(boxes)
    assert total > 0 or min(size) <= 20


def test_a_name_begins_inside_its_segment_and_small_segments_have_none(boxes: Boxes) -> None:
    ids = np.zeros((200, 300), np.int32)
    ids[20:180, 200:290], ids[5:9, 5:9] = 1, 2
    segments = [{"id": 1, "category_id": 9}, {"id": 2, "category_id": 1}]
    overlay(np.zeros((200, 300, 3), np.uint8), ids, segments, TAXONOMY)
    [(left, top, right, bottom)] = boxes
    assert (ids[top : bottom + 1, left : right + 1] == 1).all()


@pytest.mark.parametrize("name", ["x" * 1000, "a\nb\x1b[31m\u202e", "\ud800", "名前", "<b>", " "])
def test_any_name_can_be_drawn_on_one_line(name: str, boxes: Boxes) -> None:
    category = Category(1, "cat", True)
    taxonomy = Taxonomy((category,))
    object.__setattr__(category, "name", name)  # a taxonomy refuses some of these
    ids = np.ones((300, 500), np.int32)
    overlay(np.zeros((300, 500, 3), np.uint8), ids, [{"id": 1, "category_id": 1}], taxonomy)
    [(left, top, right, bottom)] = boxes
    assert bottom - top < 25
    assert right - left < 300


def test_what_cannot_be_drawn_is_refused() -> None:
    image, ids, segments = scene()
    with pytest.raises(ValueError, match=r"own id, got \[11\]"):
        overlay(image, ids, [segments[0], *segments], TAXONOMY)
    with pytest.raises(ValueError, match="Unknown category id 77"):
        overlay(image, ids, [{"id": 11, "category_id": 77}], TAXONOMY)
