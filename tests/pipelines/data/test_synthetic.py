"""The synthetic data set is in exact COCO format, reproducible, and as difficult as intended."""

import colorsys
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from panopticapi.utils import rgb2id
from PIL import Image
from scipy import ndimage

from pipelines.data.manifest import open_pack
from pipelines.data.pack import PackConfig
from pipelines.data.synthetic import CATEGORIES, SyntheticConfig, draw_and_pack, draw_dataset
from pipelines.errors import UserError

NUM_IMAGES = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic")
    for split in ("train", "val"):
        draw_dataset(folder, SyntheticConfig(num_images=NUM_IMAGES, split=split))
    return folder


def read(folder: Path, split: str) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray, list[dict[str, Any]]]]:
    """Yield (image entry, image, ids, segments) for each image, as any reader of COCO's format would."""
    content = json.loads((folder / "annotations" / f"panoptic_{split}.json").read_text())
    entries = {entry["id"]: entry for entry in content["images"]}
    for annotation in content["annotations"]:
        entry = entries[annotation["image_id"]]
        image = np.asarray(Image.open(folder / split / entry["file_name"]))
        png = np.asarray(Image.open(folder / "annotations" / f"panoptic_{split}" / annotation["file_name"]))
        yield entry, image, np.asarray(rgb2id(png)), annotation["segments_info"]


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_every_image_agrees_with_its_annotation(folder: Path) -> None:
    things = {category["id"]: category["isthing"] for category in CATEGORIES}
    count = 0
    for entry, image, ids, segments in read(folder, "val"):
        assert entry["file_name"] == f"{entry['id']:012d}.jpg"
        assert image.shape == (entry["height"], entry["width"], 3)
        assert ids.shape == image.shape[:2]
        assert sorted(segment["id"] for segment in segments) == [value for value in np.unique(ids) if value]
        stuff = [segment["category_id"] for segment in segments if not things[segment["category_id"]]]
        assert len(stuff) == len(set(stuff)), "stuff has one segment per class and image"
        for segment in segments:
            mask = ids == segment["id"]
            left, top, width, height = segment["bbox"]
            assert segment["area"] == mask.sum()
            assert mask[top : top + height, left : left + width].sum() == segment["area"]
            assert mask[top].any()
            assert mask[top + height - 1].any()
            assert mask[:, left].any()
            assert mask[:, left + width - 1].any()
        count += 1
    assert count == NUM_IMAGES >= 200


def test_categories_cannot_be_taken_for_class_indices() -> None:
    things = [category["id"] for category in CATEGORIES if category["isthing"]]
    stuff = [category["id"] for category in CATEGORIES if not category["isthing"]]
    assert len(things) >= 4
    assert len(stuff) >= 3
    in_order_of_class = sorted(things) + sorted(stuff)
    ids = [category["id"] for category in CATEGORIES]
    assert len(set(ids)) == len(ids)
    assert sorted(ids) != in_order_of_class
    assert ids != in_order_of_class
    assert np.diff(sorted(ids)).min() > 1


def test_segment_ids_use_all_three_bytes(folder: Path) -> None:
    ids = [segment["id"] for *_, segments in read(folder, "val") for segment in segments]
    assert min(ids) > 255
    assert max(ids) < 2**24
    assert np.median(ids) > 2**22


def test_same_configuration_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        draw_dataset(tmp_path, SyntheticConfig(num_images=NUM_IMAGES, split=split))
    assert hashes(tmp_path) == hashes(folder)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(folder: Path, tmp_path: Path) -> None:
    draw_dataset(tmp_path, SyntheticConfig(num_images=5, split="val"))
    images = {name: value for name, value in hashes(tmp_path).items() if not name.endswith(".json")}
    assert len(images) == 10
    assert images.items() <= hashes(folder).items()


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}])
def test_splits_and_seeds_share_no_image(folder: Path, tmp_path: Path, other: dict[str, int | str]) -> None:
    draw_dataset(tmp_path, SyntheticConfig(num_images=NUM_IMAGES, **other))  # pyright: ignore[reportArgumentType]  # one of two fields
    ours = {digest for name, digest in hashes(folder).items() if name.startswith("train/")}
    theirs = {digest for name, digest in hashes(tmp_path).items() if name.endswith(".jpg")}
    assert len(ours) == len(theirs) == NUM_IMAGES
    assert not ours & theirs


def test_splits_share_no_image_id(folder: Path) -> None:
    train, val = ({entry["id"] for entry, *_ in read(folder, split)} for split in ("train", "val"))
    assert not train & val


def test_sizes_crowd_and_void_occur(folder: Path) -> None:
    config = SyntheticConfig()
    scenes = list(read(folder, "val"))
    sizes = {image.shape[:2] for _, image, _, _ in scenes}
    assert len(sizes) > 100
    assert {min(map(min, sizes)), max(map(max, sizes))} == {config.min_side, config.max_side}
    assert 10 < sum(any(segment["iscrowd"] for segment in segments) for *_, segments in scenes) < NUM_IMAGES / 4
    assert 10 < sum((ids == 0).mean() > 0.02 for _, _, ids, _ in scenes) < NUM_IMAGES / 2
    assert any((ids != 0).all() for _, _, ids, _ in scenes)


def test_things_of_one_class_touch(folder: Path) -> None:
    touching = 0
    for _, _, ids, segments in read(folder, "val"):
        by_class = defaultdict(list)
        for segment in segments:
            if not segment["iscrowd"]:
                by_class[segment["category_id"]].append(ids == segment["id"])
        touching += sum(
            bool((ndimage.binary_dilation(first) & second).any())
            for masks in by_class.values()
            for index, first in enumerate(masks)
            for second in masks[index + 1 :]
        )
    assert touching > NUM_IMAGES / 4


def test_color_correlates_with_the_class_in_about_half_of_the_segments(folder: Path) -> None:
    """Half of the segments should be close to the most frequent hue of their class, the others anywhere."""
    hues = defaultdict(list)
    for _, image, ids, segments in read(folder, "train"):
        for segment in segments:
            if not segment["iscrowd"] and segment["area"] > 100:
                red, green, blue = np.median(image[ids == segment["id"]], axis=0) / 255
                hues[segment["category_id"]].append(colorsys.rgb_to_hsv(red, green, blue)[0])
    assert len(hues) == len(CATEGORIES)
    for values in hues.values():
        distance = abs((np.array(values)[:, None] - np.linspace(0, 1, 100) + 0.5) % 1 - 0.5)
        assert 0.45 < (distance < 0.07).mean(0).max() < 0.7


def test_sizes_within_a_class_overlap_those_of_the_others(folder: Path) -> None:
    areas = defaultdict(list)
    for _, _, _, segments in read(folder, "train"):
        for segment in segments:
            if not segment["iscrowd"]:
                areas[segment["category_id"]].append(segment["area"])
    things = [category["id"] for category in CATEGORIES if category["isthing"]]
    quartiles = {key: np.percentile(areas[key], [10, 90]) for key in things}
    assert max(low for low, _ in quartiles.values()) < min(high for _, high in quartiles.values())


def test_drawing_again_changes_nothing(tmp_path: Path) -> None:
    config = SyntheticConfig(num_images=2, split="val")
    index = draw_dataset(tmp_path, config)
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert draw_dataset(tmp_path, config) == index
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == drawn


def test_drawing_and_packing_again_changes_nothing(tmp_path: Path) -> None:
    config, pack_config = SyntheticConfig(num_images=5, split="val", seed=1), PackConfig(rows_per_shard=2)
    packed = draw_and_pack(tmp_path, config, pack_config)
    assert packed == f"{tmp_path}/val"
    samples = open_pack(packed)
    assert len(samples.shards) == 3
    draw_dataset(tmp_path / "again", config)
    entries = json.loads((tmp_path / "again" / "annotations" / "panoptic_val.json").read_text())["images"]
    assert samples.image_ids.tolist() == [entry["id"] for entry in entries]

    written = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
    assert draw_and_pack(tmp_path, config, pack_config) == packed
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")} == written


@pytest.mark.parametrize("content", ['{"images": []}', "not JSON", "[]"])
def test_a_foreign_folder_is_refused_and_not_changed(tmp_path: Path, content: str) -> None:
    index = tmp_path / "annotations" / "panoptic_val.json"
    index.parent.mkdir()
    index.write_text(content)
    with pytest.raises(UserError, match="another data set"):
        draw_dataset(tmp_path, SyntheticConfig(num_images=2, split="val"))
    assert hashes(tmp_path) == {
        "annotations/panoptic_val.json": hashlib.sha256(content.encode()).hexdigest(),
    }


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    draw_dataset(tmp_path, SyntheticConfig(num_images=2))
    with pytest.raises(UserError, match=r'another data set.*"seed": 1.*"seed": 0'):
        draw_dataset(tmp_path, SyntheticConfig(num_images=2, seed=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_images": 0},
        {"split": "../val"},
        {"split": ""},
        {"seed": -1},
        {"min_side": 16},
        {"min_side": 64, "max_side": 63},
        {"max_things": 0},
    ],
)
def test_invalid_configurations_are_refused(wrong: dict[str, int | str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SyntheticConfig(**wrong)  # pyright: ignore[reportArgumentType]  # wrong values are the point
