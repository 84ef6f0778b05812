"""A tiny data set in COCO's panoptic format for the tests: every kind of segment, few pixels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SPLIT = "val2017"
THING, OTHER_THING, STUFF, OTHER_STUFF, THIRD_STUFF = 7, 3, 200, 92, 93
CATEGORIES = [
    {"id": STUFF, "name": "rug", "isthing": 0},
    {"id": THING, "name": "train", "isthing": 1},
    {"id": OTHER_STUFF, "name": "banner", "isthing": 0},
    {"id": OTHER_THING, "name": "car", "isthing": 1},
    {"id": THIRD_STUFF, "name": "blanket", "isthing": 0},
]


def write_coco_folder(folder: Path, num_images: int = 5, seed: int = 0) -> dict[str, Any]:
    """Write the data set and return its JSON.

    Each image has two things, three stuff segments, a crowd, and void. `check_record` finds no fault in it.
    """
    rng = np.random.default_rng(seed)
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    images, pngs = folder / SPLIT, folder / "annotations" / f"panoptic_{SPLIT}"
    for created in (images, pngs):
        created.mkdir(parents=True)
    for image_id in rng.permutation(np.arange(num_images) + 11).tolist():
        height, width = rng.integers(24, 40, 2).tolist()
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{image_id:012d}.jpg", quality=70)
        identifiers = rng.choice(2**24 - 1, 6, replace=False) + 1
        ids = np.zeros((height, width), np.int64)
        ids[2:, : width // 3], ids[2:, width // 3 :], ids[20:22] = identifiers[:3]
        ids[4:9, 5:11], ids[7:15, 8:14], ids[0, 3] = identifiers[3:]
        Image.fromarray(ids_to_rgb(ids)).save(pngs / f"{image_id:012d}.png")
        kinds = [(STUFF, 0), (OTHER_STUFF, 0), (THIRD_STUFF, 0), (THING, 0), (OTHER_THING, 0), (THING, 1)]
        segments = [
            {"id": int(identifier), "category_id": category, "iscrowd": crowd, **measured(ids == identifier)}
            for identifier, (category, crowd) in zip(identifiers, kinds, strict=True)
        ]
        document["images"].append(
            {"id": image_id, "file_name": f"{image_id:012d}.jpg", "width": width, "height": height}
        )
        document["annotations"].append(
            {"image_id": image_id, "file_name": f"{image_id:012d}.png", "segments_info": segments}
        )
    json_file(folder).write_text(json.dumps(document))
    return document


def json_file(folder: Path) -> Path:
    return folder / "annotations" / f"panoptic_{SPLIT}.json"


def edit_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(json_file(folder).read_text())
    change(document)
    json_file(folder).write_text(json.dumps(document))


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def measured(mask: np.ndarray) -> dict[str, Any]:
    y, x = np.nonzero(mask)
    box = [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
    return {"area": int(mask.sum()), "bbox": [int(value) for value in box]}
