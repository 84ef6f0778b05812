"""Seeded fuzz of the files of data sets and packs; each is used or refused in time, and nothing else happens."""

from pathlib import Path

import pytest

from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.pack import PackConfig, pack
from tests.pipelines.data.coco_folder import SPLIT, write_coco_folder
from tests.security.hostile_fuzz import fuzz
from tests.security.isolated import run

COUNTS = {
    **{f"picture {name}": 90 for name in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")},
    **{f"image {name}": 80 for name in ("JPEG", "PNG", "WEBP")},
    "panoptic": 100,
    "annotations": 100,
    "classes": 100,
    "manifest.json": 100,
    "index.parquet": 100,
    "shard-00000.parquet": 40,
}
"""Files of each kind: 1,320 in all."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    write_coco_folder(folder / "coco", 3)
    dataset = read_coco(CocoLayout.find(str(folder / "coco"), SPLIT))
    pack(dataset, str(folder / "packed"), PackConfig(), in_process=True)
    return folder


def check(good: Path, scratch: Path, kind: str, count: int, seed: int) -> None:
    outcome = run(fuzz, kind, count, seed, str(good / "coco"), str(good / "packed"), str(scratch))
    outcome.require_clean()
    assert outcome.kind == "result", outcome


@pytest.mark.parametrize("kind", COUNTS)
def test_mutated_files(good: Path, tmp_path: Path, kind: str) -> None:
    check(good, tmp_path, kind, COUNTS[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("kind", COUNTS)
def test_many_mutated_files(good: Path, tmp_path: Path, kind: str, seed: int) -> None:
    check(good, tmp_path, kind, COUNTS[kind], seed)


def test_there_are_enough_files() -> None:
    assert sum(COUNTS.values()) >= 1300
