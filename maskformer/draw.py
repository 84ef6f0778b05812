"""Draw a panoptic segmentation on its image: a translucent color for each segment, outlines, and class names.

Void pixels stay as they are. Crowds are hatched. Letters: H W image, N segments.
"""

import colorsys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt8
from PIL import Image, ImageDraw, ImageFont

from maskformer.taxonomy import Taxonomy

_ALPHA_THING, _ALPHA_STUFF, _ALPHA_CROWD = 0.5, 0.35, 0.6
_HATCH = 8
"""Line widths from one stripe of a crowd to the next; half of them are painted."""
_STRIP_PIXELS = 1 << 20
"""Pixels that are painted at a time; a photograph of 20 million pixels would take 700 MB at once."""
_NAMING_SIDE = 1000
"""Pixels of the longer side that suffice to find room for names."""
_GOLDEN_RATIO = 0.618034
_VARIATIONS = (0.0, 0.16, -0.13, 0.08, -0.2, 0.22, -0.07)
"""Changes in lightness from one instance of a class to the next."""
_FINE = 256
"""Pixels of the long side of a map in which the places of names are found."""
_MAX_NAME = 24
"""Characters of a class name that are drawn."""


def overlay(
    image: UInt8[np.ndarray, "H W 3"],
    ids: Integer[np.ndarray, "H W"],
    segments: Sequence[Mapping[str, Any]],
    taxonomy: Taxonomy,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a copy of the image with every segment painted, outlined and, if there is room, named.

    Args:
        ids: segment id of each pixel. Ids that are not among `segments` are void.
        segments: COCO's segments_info: `id`, `category_id`, and `iscrowd` if it is one.

    Raises:
        ValueError: a category is unknown, or an id occurs twice.
    """
    numbers = segment_numbers(ids, segments)
    painted = Image.fromarray(_paint(image, numbers, segments, taxonomy))
    pen = ImageDraw.Draw(painted)
    height, width = ids.shape
    font = ImageFont.load_default(size=max(11, min(height, width) // 30))
    margin = 3 * line_width(ids.shape)
    colors = segment_colors(segments, taxonomy)
    placed: list[tuple[int, int, int, int]] = []
    # Every other pixel or fewer, so that the places of names cost as much in a large picture as in a small one.
    step = 1 + max(numbers.shape) // _FINE
    for number, (y, x), area in _middles(numbers[::step, ::step]):
        y, x, area = y * step, x * step, area * step**2
        segment = segments[number - 1]
        name = _drawable(taxonomy.names[taxonomy.class_index(segment["category_id"])])
        name += " (crowd)" if segment.get("iscrowd") else ""
        left, top, right, bottom = map(round, pen.textbbox((0, 0), name, font))
        box_width, box_height = right - left + 2 * margin, bottom - top + 2 * margin
        if box_width > width or box_height > height or 2 * box_width * box_height > area:
            continue
        x = min(max(0, x - box_width // 2), width - box_width)
        y = min(max(0, y - box_height // 2), height - box_height)
        box = (x, y, x + box_width - 1, y + box_height - 1)
        if any(x <= b[2] and b[0] <= box[2] and y <= b[3] and b[1] <= box[3] for b in placed):
            continue
        placed.append(box)
        red, green, blue = color = tuple(colors[number - 1].tolist())
        dark = 299 * red + 587 * green + 114 * blue < 140_000
        pen.rectangle(box, color)
        pen.text((x + margin - left, y + margin - top), name, (255, 255, 255) if dark else (0, 0, 0), font)
    return np.array(painted)


def paint(
    image: UInt8[np.ndarray, "H W 3"],
    ids: Integer[np.ndarray, "H W"],
    segments: Sequence[Mapping[str, Any]],
    taxonomy: Taxonomy,
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a copy of the image with every segment painted and outlined, without names; see `overlay`."""
    return _paint(image, segment_numbers(ids, segments), segments, taxonomy)


def line_width(shape: tuple[int, ...]) -> int:
    """Return the pixels of an outline in a picture of this height and width: larger ones are seen from further away."""
    return max(1, min(shape) // 500)


def _paint(
    image: UInt8[np.ndarray, "H W 3"],
    numbers: Integer[np.ndarray, "H W"],
    segments: Sequence[Mapping[str, Any]],
    taxonomy: Taxonomy,
) -> UInt8[np.ndarray, "H W 3"]:
    """Paint the segments by their numbers, as `segment_numbers` gives them."""
    things = [taxonomy.is_thing(taxonomy.class_index(segment["category_id"])) for segment in segments]
    crowds = np.array([False, *(bool(segment.get("iscrowd")) for segment in segments)])
    alphas = [_ALPHA_THING if thing else _ALPHA_STUFF for thing in things]
    alpha_of = np.where(crowds, _ALPHA_CROWD, np.array([0.0, *alphas])).astype(np.float32)
    color_of = np.concatenate([np.zeros((1, 3), np.uint8), segment_colors(segments, taxonomy)]).astype(np.float32)

    height, width = numbers.shape
    line = line_width(numbers.shape)
    edges, painted = outlines(numbers, line), np.empty_like(image)
    rows_at_once = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows_at_once):
        strip = slice(top, top + rows_at_once)
        here = numbers[strip]
        alpha = alpha_of[here]
        if crowds.any():
            rows, columns = np.ogrid[top : top + len(here), :width]
            alpha[crowds[here] & ((rows + columns) // line % _HATCH >= _HATCH // 2)] = 0
        alpha[edges[strip]] = 1
        painted[strip] = image[strip] + (color_of[here] - image[strip]) * alpha[..., None] + 0.5
    return painted


def segment_numbers(ids: Integer[np.ndarray, "H W"], segments: Sequence[Mapping[str, Any]]) -> Int[np.ndarray, "H W"]:
    """Return k on the pixels of the k-th segment, 0 on void.

    Raises:
        ValueError: an id occurs twice in `segments`.
    """
    number_of = {segment["id"]: number for number, segment in enumerate(segments, 1)}
    if len(number_of) < len(segments):
        repeated = [identifier for identifier, count in Counter(s["id"] for s in segments).items() if count > 1]
        raise ValueError(f"Each segment needs its own id, got {repeated} more than once; draw one image at a time.")
    if not segments:
        return np.zeros(ids.shape, np.int64)
    known = np.array(sorted(number_of))
    nearest = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    numbers = np.array([number_of[identifier] for identifier in known.tolist()])
    return np.where(known[nearest] == ids, numbers[nearest], 0)


def outlines(numbers: Integer[np.ndarray, "H W"], width: int = 1) -> Bool[np.ndarray, "H W"]:
    """Return the pixels of segments (not 0) with another segment, or void, above, below, left or right of them.

    Args:
        width: up to how many pixels away.
    """
    edge = np.zeros(numbers.shape, bool)
    for step in range(1, width + 1):
        below, right = numbers[step:] != numbers[:-step], numbers[:, step:] != numbers[:, :-step]
        edge[:-step] |= below
        edge[step:] |= below
        edge[:, :-step] |= right
        edge[:, step:] |= right
    return edge & (numbers != 0)


def segment_colors(segments: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> UInt8[np.ndarray, "N 3"]:
    """Return an RGB color for each segment: its class's, lighter or darker for further instances of a thing.

    The color of a class is its category's, or one that depends on the class index only. It is made neither too dark nor
    too light to be seen.
    """
    seen: Counter[int] = Counter()
    colors: list[tuple[int, int, int]] = []
    for segment in segments:
        index = taxonomy.class_index(segment["category_id"])
        hue, lightness, saturation = _class_color(index, taxonomy)
        if taxonomy.is_thing(index):
            lightness += _VARIATIONS[seen[index] % len(_VARIATIONS)]
            hue += 0.02 * (seen[index] % 5)
            seen[index] += 1
        red, green, blue = colorsys.hls_to_rgb(hue % 1, min(max(lightness, 0.25), 0.8), saturation)
        colors.append((round(255 * red), round(255 * green), round(255 * blue)))
    return np.array(colors, np.uint8).reshape(-1, 3)


def _class_color(index: int, taxonomy: Taxonomy) -> tuple[float, float, float]:
    """Return hue, lightness and saturation of a class, 0..1."""
    color = taxonomy.categories[index].color
    if color is None:
        return index * _GOLDEN_RATIO % 1, (0.5, 0.62, 0.4)[index % 3], (0.85, 0.6)[index // 3 % 2]
    hue, lightness, saturation = colorsys.rgb_to_hls(*(part / 255 for part in color))
    return hue, min(max(lightness, 0.38), 0.7), saturation


def _middles(numbers: Int[np.ndarray, "H W"]) -> list[tuple[int, tuple[int, int], int]]:
    """Return number, a pixel (row, column) well inside, and about the area of each segment, the largest first.

    The pixel is the one with the most room of its segment in all four directions; left and right count a third, since
    names are wide.
    """
    step = -(-max(numbers.shape) // _NAMING_SIDE)
    fewer = numbers[::step, ::step]
    room = np.minimum(_room(fewer), _room(fewer.T, 3).T).ravel()
    flat = fewer.ravel()
    order = np.lexsort((room, flat))  # the last pixel of each segment has the most room
    present, areas = np.unique(flat, return_counts=True)
    best = order[np.cumsum(areas) - 1]
    found = [
        (number, (pixel // fewer.shape[1] * step, pixel % fewer.shape[1] * step), area * step**2)
        for number, pixel, area in zip(present.tolist(), best.tolist(), areas.tolist(), strict=True)
        if number
    ]
    return sorted(found, key=lambda each: (-each[2], each[0]))


def _room(numbers: Int[np.ndarray, "H W"], per: int = 1) -> Float[np.ndarray, "H W"]:
    """Return for each pixel how far its run of equal numbers in its column extends to the nearer end, over `per`."""
    rows = np.arange(len(numbers))[:, None]
    starts = np.ones(numbers.shape, bool)
    starts[1:] = numbers[1:] != numbers[:-1]
    first = np.maximum.accumulate(np.where(starts, rows, 0), axis=0)
    ends = np.roll(starts, -1, axis=0)
    ends[-1] = True
    last = np.minimum.accumulate(np.where(ends, rows, len(numbers))[::-1], axis=0)[::-1]
    return (np.minimum(rows - first, last - rows) + 1) / per


def _drawable(name: str) -> str:
    """Return a name on one line, without characters that are not printed, and not too long."""
    plain = "".join(char if char.isprintable() else "?" for char in name[: _MAX_NAME + 1])
    return plain if len(name) <= _MAX_NAME else f"{plain[: _MAX_NAME - 1]}…"
