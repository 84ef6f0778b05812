"""Pictures of the data: they show what was packed and what training sees, and no name can harm the page."""

import base64
import io
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from maskformer.draw import overlay
from maskformer.taxonomy import Category, Taxonomy
from pipelines.config.recipes import DEMO
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.order import BatchSplit, samples_at
from pipelines.data.pixels import decode_image, decode_panoptic, index_map
from pipelines.data.sample_order import SampleOrder
from pipelines.data.view import (
    ViewedImage,
    first_positions,
    small_jpeg,
    step_positions,
    view_augmented,
    view_packed,
    write_view,
)
from pipelines.errors import UserError
from pipelines.storage import locate
from tests.browser import Browser

SEED, AUGMENT = 5, DEMO.data.augment
ONE = BatchSplit(global_batch=1, micro_batch=1, workers=1)
TAXONOMY = Taxonomy((Category(1, "cat", True), Category(2, '"><script>alert(1)</script>', False)))
HOSTILE = ["<script>alert(1)</script>.jpg", "'\"><img src=x onerror=alert(1)>", "a\nb\x00\u202e\ud800</figure>"]


@pytest.fixture
def samples(packs: dict[str, str]) -> PackedSet:
    return open_pack(packs["train"])


def order_of(samples: PackedSet, split: BatchSplit = ONE, **changes: Any) -> SampleOrder:
    return SampleOrder(
        image_ids=samples.image_ids,
        heights=samples.index["height"].to_numpy(),
        widths=samples.index["width"].to_numpy(),
        seed=SEED,
        augmentation=AUGMENT,
        split=split,
        **{"dealt": False, **changes},
    )


def packed_rows(samples: PackedSet) -> dict[int, dict]:
    return {row["image_id"]: row for shard in samples.shards for row in pq.read_table(shard).to_pylist()}


def test_a_step_shows_what_each_worker_computes(samples: PackedSet) -> None:
    split, step = BatchSplit(global_batch=12, micro_batch=2, workers=3), 13
    samples, rows = samples.take(np.arange(70)), packed_rows(samples)
    order = order_of(samples, split)
    seen = list(view_augmented(samples, order, step_positions(order, step, 14)))
    assert [viewed.part for viewed in seen[::2]] == [
        (f"Worker {rank}", f"Micro-batch {turn}") for rank in range(3) for turn in range(2)
    ]
    # A step has the micro-batches 0 to 5, and worker r computes r and r + 3.
    micro_batches = [0, 3, 1, 4, 2, 5]
    expected = [step * 12 + 2 * number + within for number in micro_batches for within in range(2)]
    assert [viewed.position for viewed in seen] == expected
    epochs, indices = samples_at(np.array(expected), len(samples), SEED)
    for viewed, epoch, image_id in zip(seen, epochs.tolist(), samples.image_ids[indices].tolist(), strict=True):
        row = rows[image_id]
        plane, classes = index_map(decode_panoptic(row["panoptic"]), row["segments"], samples.taxonomy)
        rng = sample_rng(SEED, epoch, image_id)
        sample = augment(Sample(decode_image(row["image"]), plane, classes), rng, AUGMENT)
        assert (viewed.image_id, viewed.epoch, viewed.file_name) == (image_id, epoch, row["file_name"])
        assert viewed.original == (row["height"], row["width"])
        assert np.array_equal(viewed.image, sample.image)
        assert np.array_equal(viewed.ids, sample.index_map)
        assert [segment["id"] for segment in viewed.segments] == list(range(1, len(sample.classes) + 1))
        categories = [samples.taxonomy.category_id(index) for index in sample.classes.tolist()]
        assert [segment["category_id"] for segment in viewed.segments] == categories


def test_the_first_positions(samples: PackedSet) -> None:
    seen = list(view_augmented(samples, order_of(samples), first_positions(10)))
    assert [viewed.position for viewed in seen] == list(range(10))
    assert [viewed.image_id for viewed in seen] == samples.image_ids[samples_at(np.arange(10), 80, SEED)[1]].tolist()


def test_packed_images_are_evenly_spaced_and_as_annotated(samples: PackedSet) -> None:
    rows, seen = packed_rows(samples), list(view_packed(samples, 7))
    assert [viewed.image_id for viewed in seen] == samples.subset(7).image_ids.tolist()
    for viewed in seen:
        row = rows[viewed.image_id]
        assert np.array_equal(viewed.image, decode_image(row["image"]))
        assert np.array_equal(viewed.ids, decode_panoptic(row["panoptic"]))
        assert viewed.segments == row["segments"]
        assert viewed.position is None


def test_a_step_is_shown_as_it_was_dealt(samples: PackedSet) -> None:
    order = order_of(samples, BatchSplit(global_batch=12, micro_batch=2, workers=2), dealt=True, window=3)
    shown = np.concatenate([positions for _, positions in step_positions(order, 3, 14)])
    assert shown.tolist() == [*order.positions(0, 3, 4), *order.positions(1, 3, 4)]


@pytest.mark.parametrize("step", [-1, 14, 10**12])
def test_training_has_no_such_step(samples: PackedSet, step: int) -> None:
    with pytest.raises(UserError, match=r"There is no step .* the last is 13\."):
        step_positions(order_of(samples, BatchSplit(global_batch=4, micro_batch=2, workers=2)), step, 14)


def test_a_step_may_be_too_large_for_a_page(samples: PackedSet) -> None:
    with pytest.raises(UserError, match=r"--step 0 asks for 2,000 pictures"):
        step_positions(order_of(samples, BatchSplit(global_batch=2000, micro_batch=1, workers=2)), 0, 1)


def damage(samples: PackedSet, folder: Path, index: int) -> PackedSet:
    shutil.copytree(samples.uri, folder)
    copy = open_pack(str(folder))
    file = Path(copy.shards[copy.shard[index]])
    content, image = bytearray(file.read_bytes()), packed_rows(copy)[int(copy.image_ids[index])]["image"]
    content[content.index(image) + len(image) // 2] ^= 1
    file.write_bytes(content)
    return copy


def test_a_damaged_image_leaves_nothing_or_is_replaced_as_in_training(samples: PackedSet, tmp_path: Path) -> None:
    index = int(samples_at(np.arange(6), 80, SEED)[1][3])
    copy = damage(samples, tmp_path / "copy", index)
    images = view_augmented(copy, order_of(copy), first_positions(6))
    with pytest.raises(UserError, match=f"image {copy.image_ids[index]}"):
        write_view(images, 6, copy.taxonomy, str(tmp_path / "view"), "", [])
    assert not (tmp_path / "view").exists()
    (tmp_path / "view").mkdir()
    with pytest.raises(UserError, match="is damaged"):
        write_view(
            view_packed(copy.take(np.array([index - 1, index])), 2), 2, copy.taxonomy, str(tmp_path / "view"), "", []
        )
    assert list((tmp_path / "view").iterdir()) == []  # nor is an empty folder of the user's deleted
    images = view_augmented(copy, order_of(copy), first_positions(6), damaged="skip")
    write_view(images, 6, copy.taxonomy, str(tmp_path / "view"), "", [])
    page = (tmp_path / "view" / "index.html").read_text()
    assert f"image {copy.image_ids[index]}" in page
    assert f"Image {copy.image_ids[(index + 1) % 80]} took its place" in page


def viewed(file_name: str, image_id: int, part: tuple[str, str] = ("", "")) -> ViewedImage:
    rng = np.random.default_rng(image_id)
    ids = np.zeros((40, 60), np.int32)
    ids[:, 30:], ids[5:20, 5:20] = 8, 5
    segments = [{"id": 8, "category_id": 2, "iscrowd": False}, {"id": 5, "category_id": 1, "iscrowd": False}]
    return ViewedImage(
        image_id=image_id,
        file_name=file_name,
        original=(40, 60),
        image=rng.integers(0, 256, (40, 60, 3), np.uint8),
        ids=ids,
        segments=segments if image_id % 2 else segments[:1],
        part=part,
    )


def hostile_view(folder: Path) -> Path:
    images = [viewed(name, number, (f"Worker {number % 2}", name)) for number, name in enumerate(HOSTILE)]
    title = "</title><script>alert(1)</script>"
    write_view(images, 3, TAXONOMY, str(folder), title, [("pack", HOSTILE[0]), (HOSTILE[1], "x")])
    return folder / "index.html"


class Elements(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_names_from_outside_are_text_and_nothing_else(tmp_path: Path) -> None:
    page = hostile_view(tmp_path / "view").read_text()
    elements = Elements(page)
    assert len(elements.all("script")) == 1
    assert len(elements.all("img")) == 2 * 3
    assert len(elements.all("figure")) == 3
    assert not [name for _, attributes in elements.found for name in attributes if name.startswith("on")]
    for name in HOSTILE[:2]:
        assert name in elements.text
    assert r"a\nb\x00\u202e\ud800</figure>" in elements.text
    assert re.search(r'"><script>alert\(1\)</script>', elements.text)
    # Nothing is loaded: no address but data in the page, and links to the PNGs beside it.
    links = [attributes[key] or "" for _, attributes in elements.found for key in ("src", "href") if key in attributes]
    outside = [link for link in links if not link.startswith("data:")]
    assert sorted(outside) == sorted(file.name for file in (tmp_path / "view").glob("*.png"))
    assert "url(" not in page
    assert "@import" not in page


def test_the_pictures_of_the_page_and_of_the_files(tmp_path: Path) -> None:
    shown = viewed("a.jpg", 1)
    names = write_view([shown], 1, TAXONOMY, str(tmp_path / "view"), "Title", [])
    assert names == ["0000-image-1.png", "index.html"]
    assert sorted(file.name for file in (tmp_path / "view").iterdir()) == sorted(names)
    image, ids = (pixels.repeat(8, 0).repeat(8, 1) for pixels in (shown.image, shown.ids))  # 480 pixels wide
    drawn = overlay(image, ids, shown.segments, TAXONOMY)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "view" / names[0])), drawn)
    elements = Elements((tmp_path / "view" / "index.html").read_text())
    for attributes, expected in zip(elements.all("img"), (drawn, image), strict=True):
        content = base64.b64decode((attributes["src"] or "").removeprefix("data:image/jpeg;base64,"))
        picture = np.asarray(Image.open(io.BytesIO(content))).astype(int)
        assert picture.shape == expected.shape
        assert np.abs(picture - expected).mean() < 12
    # 15 x 15 pixels of the cat, 30 x 40 of the other, of 40 x 60.
    for words in ("cat", "225 px, 9.4%", "1,200 px, 50.0%", "void", "975 px, 40.6%", "60 × 40 pixels", "a.jpg"):
        assert words in elements.text
    [figure] = elements.all("figure")
    assert figure["data-classes"] == "0 1"


@pytest.mark.parametrize("limit", [200_000, 20_000, 3_000])
def test_a_picture_in_the_page_has_a_bounded_size(limit: int) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 1333, 3), np.uint8)
    assert limit / 10 < len(small_jpeg(noise, limit)) <= limit
    large = small_jpeg(np.zeros((900, 1333, 3), np.uint8), 200_000)
    assert Image.open(io.BytesIO(large)).size == (1024, 691)


def test_a_large_image_is_drawn_smaller_and_counted_whole(tmp_path: Path) -> None:
    shape = (30, 5000)
    ids = np.tile(np.array([0, 8, 8, 8], np.int32), (30, 1250))
    image = replace(viewed("wide", 1), image=np.zeros((*shape, 3), np.uint8), ids=ids, original=shape)
    write_view([image], 1, TAXONOMY, str(tmp_path / "view"), "", [])
    assert Image.open(tmp_path / "view" / "0000-image-1.png").size == (1667, 10)
    assert "112,500 px, 75.0%" in (tmp_path / "view" / "index.html").read_text()


def test_a_view_in_an_object_store(bucket: str) -> None:
    names = write_view([viewed("a", 1)], 1, TAXONOMY, f"{bucket}/view", "", [])
    assert locate(f"{bucket}/view").names() == sorted(names)
    with pytest.raises(UserError, match="is not empty"):
        write_view([viewed("a", 1)], 1, TAXONOMY, f"{bucket}/view", "", [])


def occupied(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine.txt").touch()


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (occupied, "is not empty: it has 'mine.txt'"),
        (lambda folder: folder.touch(), "is a file"),
        (lambda folder: folder.parent.joinpath("blocked").touch(), "Cannot write"),
    ],
)
def test_an_output_folder_that_cannot_be_used(tmp_path: Path, prepare: Callable[[Path], object], message: str) -> None:
    prepare(tmp_path / "view")
    output = tmp_path / ("blocked/view" if message == "Cannot write" else "view")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        write_view([viewed("a", 1)], 1, TAXONOMY, str(output), "", [])
    assert sorted(tmp_path.rglob("*")) == before


# ---- in a browser


INTERACT = """(async () => {
  const visible = kind => [...document.images].filter(i => i.className === kind && i.offsetParent).length;
  const sections = () => [...document.querySelectorAll("section")].filter(s => s.offsetParent).length;
  const loaded = [...document.images].filter(i => i.decode && i.complete && i.naturalWidth > 100).length;
  const seen = [document.images.length, loaded, document.scripts.length, form.elements.count.value];
  seen.push(visible("overlay"), visible("plain"), sections());
  form.elements.overlay.click();
  seen.push(visible("overlay"), visible("plain"));
  form.elements.class.value = "0";
  form.elements.class.dispatchEvent(new Event("change", {bubbles: true}));
  seen.push(visible("plain"), sections(), form.elements.count.value, document.title,
            document.documentElement.scrollWidth <= innerWidth);
  return seen;
})()"""


@pytest.mark.timeout(200)
def test_the_page_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    file = hostile_view(tmp_path / "view")
    page = browser.open(file, width=360)
    title = "</title><script>alert(1)</script>"
    # One of the three images has a cat.
    expected = [6, 6, 1, "3 of 3 pictures", 3, 0, 6, 0, 3, 1, 2, "1 of 3 pictures", title, True]
    assert page.evaluate(INTERACT) == expected
    assert page.complaints() == []


@pytest.mark.timeout(200)
def test_the_policy_of_the_page_forbids_other_scripts(tmp_path: Path, browser: Browser) -> None:
    file = hostile_view(tmp_path / "view")
    (tmp_path / "more.html").write_text(file.read_text() + "<script>document.body.dataset.seen = 1</script>")
    page = browser.open(tmp_path / "more.html")
    assert page.evaluate("document.body.dataset.seen") is None
    [complaint] = page.complaints()
    assert "Content Security Policy" in complaint
