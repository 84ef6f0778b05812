"""A small synthetic data set in the official COCO panoptic format.

An image is a sky above a ground of field, water or both, with a few things in front. Color alone does not
determine the class: it correlates with the class in about half of all segments and is random in the others.
Things differ by shape only; sizes, angles and textures vary within a class and overlap between classes.
Stuff differs by position (the sky is above) and by the direction of its texture (vertical stripes in a field,
horizontal ones in water). Things touch and occlude each other, often those of one class. Some images have a crowd
of tiny things. An unlabeled strip at one side, and the remains of nearly hidden things, are void.

H W image. Coordinates are in pixels, x to the right and y down.
"""

import colorsys
import io
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskformer.coco_format import encode_ids
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.pack import PackConfig, pack
from pipelines.errors import UserError
from pipelines.storage import locate

Plane: TypeAlias = NDArray[np.float64]
Mask: TypeAlias = NDArray[np.bool_]

CATEGORIES: list[dict[str, Any]] = [
    {"id": 21, "name": "disk", "supercategory": "round", "isthing": 1},
    {"id": 3, "name": "sky", "supercategory": "background", "isthing": 0},
    {"id": 8, "name": "square", "supercategory": "angular", "isthing": 1},
    {"id": 47, "name": "triangle", "supercategory": "angular", "isthing": 1},
    {"id": 95, "name": "water", "supercategory": "background", "isthing": 0},
    {"id": 62, "name": "cross", "supercategory": "angular", "isthing": 1},
    {"id": 30, "name": "field", "supercategory": "background", "isthing": 0},
]
"""As in COCO, the ids have gaps and are not class indices. Here, things and stuff are also interleaved."""

_CATEGORY_ID: dict[str, int] = {category["name"]: category["id"] for category in CATEGORIES}
_THINGS = ("disk", "square", "triangle", "cross")
_HUE = {"disk": 0.0, "square": 0.14, "triangle": 0.78, "cross": 0.9, "sky": 0.56, "water": 0.64, "field": 0.32}
_STRIPED = ("field", "water")
_HINT_PROBABILITY = 0.5
_LEAST_VISIBLE = 0.3
"""A segment of which less than this share is visible is not labeled."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What determines the images of one split, byte for byte."""

    num_images: int = 1000
    """Number of images, 1 to 999999."""
    split: str = "train"
    """Name of the split. Images differ between splits even with the same seed."""
    seed: int = 0
    """Random seed."""
    min_side: int = 48
    """Smallest height and width, in pixels. At least 32, so that a thing fits."""
    max_side: int = 80
    """Largest height and width, in pixels."""
    max_things: int = 4
    """Largest number of things in an image, not counting those of a crowd."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_images < 1_000_000:
            raise ValueError(f"num_images must lie in 1..999999, got {self.num_images}.")
        if not self.split or not self.split.isidentifier():
            raise ValueError(
                f"split must be an identifier, since it names folders, got {self.split!r}; use train or val."
            )
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if not 32 <= self.min_side <= self.max_side:
            raise ValueError(
                f"Sides must satisfy 32 <= min_side <= max_side (a thing must fit), "
                f"got min_side={self.min_side} and max_side={self.max_side}."
            )
        if self.max_things < 1:
            raise ValueError(f"max_things must be at least 1, got {self.max_things}.")


@dataclass(frozen=True)
class Scene:
    """One image with its ground truth."""

    image: NDArray[np.uint8]
    """[H, W, 3] RGB."""
    ids: NDArray[np.int32]
    """[H, W] segment ids, 0 is void."""
    segments: list[dict[str, Any]]
    """COCO's segments_info: id, category_id, iscrowd, area, bbox as x, y, width, height."""


def draw_dataset(output: str | Path, config: SyntheticConfig) -> Path:
    """Draw one split in the local folder `output` and return the path of its annotation JSON.

    The layout is COCO's: `{split}/*.jpg`, `annotations/panoptic_{split}/*.png`, `annotations/panoptic_{split}.json`.
    The JSON is written last and has the configuration, so that a complete split is not drawn again.

    Raises:
        UserError: the folder has another data set of this split.
    """
    output = Path(output)
    annotations = output / "annotations"
    info = {"description": "maskformer-ray synthetic scenes", "version": "1", "config": asdict(config)}
    index = annotations / f"panoptic_{config.split}.json"
    opening = json.dumps({"info": info})[:-1]
    if index.exists():
        found = index.read_bytes()[: len(opening.encode())]
        if found == opening.encode():
            return index
        raise UserError(
            f"{index} belongs to another data set: it should start with {opening}, and it starts with "
            f"{found.decode(errors='replace')}. Choose another folder, or delete this one if it is not needed."
        )
    (output / config.split).mkdir(parents=True, exist_ok=True)
    (annotations / f"panoptic_{config.split}").mkdir(parents=True, exist_ok=True)

    # As in COCO, no image id occurs in two splits.
    split_key = zlib.crc32(config.split.encode())
    first_id = 1_000_000 * (100 + split_key % 900)
    images: list[dict[str, Any]] = []
    annotated: list[dict[str, Any]] = []
    for number in range(config.num_images):
        scene = draw_scene(np.random.default_rng((config.seed, split_key, number)), config)
        image_id = first_id + number
        jpeg, png = f"{image_id:012d}.jpg", f"{image_id:012d}.png"
        (output / config.split / jpeg).write_bytes(_encode(scene.image, "JPEG", quality=95))
        (annotations / f"panoptic_{config.split}" / png).write_bytes(_encode(encode_ids(scene.ids), "PNG"))
        height, width = scene.ids.shape
        images.append({"id": image_id, "file_name": jpeg, "height": height, "width": width})
        annotated.append({"image_id": image_id, "file_name": png, "segments_info": scene.segments})
    content = {"info": info, "images": images, "annotations": annotated, "categories": CATEGORIES}
    locate(index).write_text(json.dumps(content))
    return index


def draw_and_pack(folder: str | Path, config: SyntheticConfig, pack_config: PackConfig | None = None) -> str:
    """Draw one split in `<folder>/coco`, pack it, and return the path of the pack, `<folder>/<split>`.

    Work that an earlier call completed is not repeated.

    Args:
        folder: a local folder.
        config: the images to draw.
        pack_config: how to pack them; by default as `PackConfig()`.

    Raises:
        UserError: the folder has other files, or cannot be written.
    """
    packed = f"{folder}/{config.split}"
    draw_dataset(f"{folder}/coco", config)
    layout = CocoLayout.find(f"{folder}/coco", config.split)
    pack(read_coco(layout), packed, pack_config or PackConfig(), in_process=True)  # not checked: it was drawn here
    return packed


def draw_scene(rng: np.random.Generator, config: SyntheticConfig) -> Scene:
    """Draw one image; the same state of the generator gives the same image."""
    height, width = (int(side) for side in rng.integers(config.min_side, config.max_side, size=2, endpoint=True))
    canvas = _Canvas(height, width)
    _draw_ground(canvas, rng)
    if rng.random() < 0.12:
        _draw_crowd(canvas, rng)
    _draw_things(canvas, rng, config.max_things)
    if rng.random() < 0.25:
        _draw_void(canvas, rng)
    return canvas.scene(rng)


class _Canvas:
    """An unfinished image: its colors and, for each pixel, the segment in front."""

    def __init__(self, height: int, width: int) -> None:
        self.y, self.x = np.mgrid[:height, :width].astype(np.float64)
        self.color = np.zeros((height, width, 3))
        self.owner = np.zeros((height, width), np.int32)
        """[H, W]: 0 is void, k is the k-th segment drawn."""
        self.segments: list[tuple[str, bool, int]] = []
        """Category name, whether it is a crowd, and area in pixels when drawn."""

    def add(self, name: str, mask: Mask, color: Plane, *, crowd: bool = False) -> None:
        """Draw a segment in front of all others."""
        self.segments.append((name, crowd, int(mask.sum())))
        self.owner[mask] = len(self.segments)
        self.color[mask] = color[mask]

    def scene(self, rng: np.random.Generator) -> Scene:
        """Label the visible part of each segment."""
        ids = np.zeros(self.owner.shape, np.int32)
        segments: list[dict[str, Any]] = []
        # Use all 24 bits, as in COCO, so that code which confuses an id with an index fails.
        segment_ids = rng.choice(2**24 - 1, size=len(self.segments), replace=False) + 1
        for number, ((name, crowd, drawn), segment_id) in enumerate(zip(self.segments, segment_ids, strict=True), 1):
            mask = self.owner == number
            area = int(mask.sum())
            if area == 0 or area < _LEAST_VISIBLE * drawn:
                continue
            ids[mask] = segment_id
            segments.append(
                {
                    "id": int(segment_id),
                    "category_id": _CATEGORY_ID[name],
                    "iscrowd": int(crowd),
                    "area": area,
                    "bbox": _bounding_box(mask),
                }
            )
        image = (self.color + rng.normal(0, 0.02, self.color.shape)).clip(0, 1) * 255
        return Scene(image.astype(np.uint8), ids, segments)


def _draw_ground(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Draw the sky above a wavy horizon, and field, water or both below it."""
    height, width = canvas.owner.shape
    horizon = height * rng.uniform(0.2, 0.6) + _wave(canvas.x, rng)
    shore = width * rng.uniform(0.25, 0.75) + _wave(canvas.y, rng) if rng.random() < 0.6 else width
    left, right = (str(name) for name in rng.permutation(["field", "water"]))
    regions = {
        "sky": canvas.y < horizon,
        left: (canvas.y >= horizon) & (canvas.x < shore),
        right: (canvas.y >= horizon) & (canvas.x >= shore),
    }
    for name, mask in regions.items():
        canvas.add(name, mask, _paint(name, canvas, rng))


def _draw_things(canvas: _Canvas, rng: np.random.Generator, max_things: int) -> None:
    height, width = canvas.owner.shape
    name, x, y, radius = "", 0.0, 0.0, 0.0
    for number in range(int(rng.integers(1, max_things, endpoint=True))):
        last_x, last_y, last_radius = x, y, radius
        radius = rng.uniform(7, 13)
        if number and rng.random() < 0.35:
            # Next to the last thing or partly in front of it, and of its class: only shape and outline separate them.
            angle = rng.uniform(0, 2 * np.pi)
            distance = (radius + last_radius) * rng.uniform(0.6, 1.0)
            x, y = last_x + distance * np.cos(angle), last_y + distance * np.sin(angle)
        else:
            name = str(rng.choice(_THINGS))
            x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.9) * height
        _draw_thing(canvas, rng, name, x, y, radius)


def _draw_thing(canvas: _Canvas, rng: np.random.Generator, name: str, x: float, y: float, radius: float) -> None:
    gauge = _gauge(name, canvas, rng, x, y, radius)
    if not (gauge <= 1).any():  # entirely outside the image
        return
    color = _paint(name, canvas, rng)
    color[gauge > 1 - 1.5 / radius] *= 0.35  # a dark outline
    canvas.add(name, gauge <= 1, color)


def _draw_crowd(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Draw many tiny things of one class in a small region, as one crowd segment."""
    height, width = canvas.owner.shape
    name = str(rng.choice(_THINGS))
    left, top = rng.uniform(0, 0.6) * width, rng.uniform(0, 0.6) * height
    mask = np.zeros((height, width), bool)
    color = _paint(name, canvas, rng)
    for _ in range(int(rng.integers(8, 14))):
        x, y = left + rng.uniform(0, 24), top + rng.uniform(0, 24)
        gauge = _gauge(name, canvas, rng, x, y, radius=rng.uniform(2.5, 4))
        color[(gauge <= 1) & (gauge > 0.6)] *= 0.5
        mask |= gauge <= 1
    canvas.add(name, mask, color, crowd=True)


def _draw_void(canvas: _Canvas, rng: np.random.Generator) -> None:
    """Draw an unlabeled gray strip at the left or right side."""
    strip = int(rng.integers(3, 9))
    columns = slice(None, strip) if rng.random() < 0.5 else slice(-strip, None)
    canvas.owner[:, columns] = 0
    canvas.color[:, columns] = rng.uniform(0.1, 0.9) + rng.normal(0, 0.1, canvas.owner[:, columns].shape)[..., None]


def _gauge(name: str, canvas: _Canvas, rng: np.random.Generator, x: float, y: float, radius: float) -> Plane:
    """Return for each pixel the scale at which the shape at (x, y) reaches it: at most 1 inside the shape, [H, W]."""
    angle = rng.uniform(-0.35, 0.35)
    stretch = rng.uniform(0.85, 1.15)
    across, down = (canvas.x - x) / (radius * stretch), (canvas.y - y) / (radius / stretch)
    u = across * np.cos(angle) + down * np.sin(angle)
    v = down * np.cos(angle) - across * np.sin(angle)
    if name == "disk":
        return np.hypot(u, v)
    if name == "square":
        return np.maximum(abs(u), abs(v)) / 0.88
    if name == "triangle":  # equilateral, one corner up
        return np.maximum(v, np.sqrt(0.75) * abs(u) - 0.5 * v) / 0.6
    arm = 0.36  # a cross is the union of two bars
    return np.minimum(np.maximum(abs(u), abs(v) / arm), np.maximum(abs(u) / arm, abs(v)))


def _paint(name: str, canvas: _Canvas, rng: np.random.Generator) -> Plane:
    """Return a textured color for each pixel, [H, W, 3], about 0..1."""
    hinted = rng.random() < _HINT_PROBABILITY
    hue = _HUE[name] + rng.normal(0, 0.02) if hinted else rng.random()
    color = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 0.9), rng.uniform(0.5, 0.95))
    return np.array(color) * (1 + rng.uniform(0.1, 0.3) * _texture(name, canvas, rng))[..., None]


def _texture(name: str, canvas: _Canvas, rng: np.random.Generator) -> Plane:
    """Return a texture in -1..1, [H, W]: stripes in the direction of the class on field and water, else random."""
    steep, flat = rng.normal(0, 0.2), rng.normal(np.pi / 2, 0.2)
    direction = {"field": steep, "water": flat}.get(name, rng.uniform(0, np.pi))
    along = canvas.x * np.cos(direction) + canvas.y * np.sin(direction)
    if name in _STRIPED or rng.random() < 0.3:
        return np.sin(2 * np.pi * (along / rng.uniform(3, 7) + rng.random()))
    if rng.random() < 0.5:
        return np.sin(2 * np.pi * (along / 80 + rng.random()))  # looks like a gradient
    return rng.uniform(-1, 1, canvas.owner.shape)


def _wave(along: Plane, rng: np.random.Generator) -> Plane:
    """Return a wave of small amplitude, in pixels."""
    return rng.uniform(1, 4) * np.sin(2 * np.pi * (along / rng.uniform(20, 60) + rng.random()))


def _bounding_box(mask: Mask) -> list[int]:
    """Return the bounding box x, y, width, height of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    return [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1]


def _encode(pixels: NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()
