"""Pictures of the data: images as packed, or augmented as training sees them; and the folder with the page of them."""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from maskformer.draw import overlay, segment_numbers
from maskformer.taxonomy import Taxonomy
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decode_panoptic, index_map_type
from pipelines.data.reading import PACK_AGAIN, UnusableRowError, read_files, unusable
from pipelines.data.sample_order import SampleOrder
from pipelines.data.tasks import LoadAndAugment
from pipelines.data.view_page import ClassPixels, Figure, page
from pipelines.errors import UserError
from pipelines.storage import locate

MAX_PICTURES = 1000
_PAGE_BYTES, _PICTURE_BYTES = 64 << 20, 200 << 10  # of the encoded pictures of a page, and of one
_SIDES, _QUALITIES = (1024, 768, 512, 320, 160, 64), (85, 60, 30)
_LEGIBLE, _ENOUGH = 480, 2048
"""Pixels of the long side below which an image is enlarged for its picture, and above which pixels are left out."""
_AT_A_TIME = 8  # augmented images in memory
_PATIENCE = 10.0  # seconds to wait for a storage that does not answer


@dataclass(frozen=True, kw_only=True)
class ViewedImage:
    """An image with its segments, and where it comes from."""

    image_id: int
    file_name: str
    original: tuple[int, int]
    """Height and width of the image in the data set."""
    image: npt.NDArray[np.uint8]
    """[H, W, 3] RGB."""
    ids: npt.NDArray[Any]
    """[H, W] segment ids."""
    segments: list[dict[str, Any]]
    """COCO's segments_info: `id`, `category_id`, `iscrowd`."""
    part: tuple[str, str] = ("", "")
    """Worker and micro-batch that it belongs to, as headings."""
    position: int | None = None
    """Position in the order of training, if the image is augmented."""
    epoch: int | None = None
    skipped: str | None = None
    """Why this image takes the place of another."""


def view_packed(samples: PackedSet, count: int) -> Iterator[ViewedImage]:
    """Yield `count` images as they were packed, evenly spaced in the set, with all that is annotated.

    Raises:
        UserError: a row is damaged or missing.
    """
    for entry in samples.subset(count).index.to_pylist():
        shard = samples.shards[entry["shard"]]
        try:
            panoptic, content = read_files(shard, entry, "panoptic", "image")
            image, ids = decode_image(content), decode_panoptic(panoptic, (entry["height"], entry["width"]))
            if image.shape[:2] != ids.shape:
                raise ValueError(f"the image has the size {image.shape[:2]}, and its PNG {ids.shape}")
        except UnusableRowError as error:
            raise UserError(f"{error}. {PACK_AGAIN}.") from error
        except ValueError as error:
            raise UserError(f"{unusable(shard, entry, error)}. {PACK_AGAIN}.") from error
        yield ViewedImage(
            image_id=entry["image_id"],
            file_name=entry["file_name"],
            original=(entry["height"], entry["width"]),
            image=image,
            ids=ids,
            segments=entry["segments"],
        )


def view_augmented(
    samples: PackedSet,
    order: SampleOrder,
    parts: Iterable[tuple[tuple[str, str], npt.NDArray[np.int64]]],
    *,
    damaged: Literal["stop", "skip"] = "stop",
) -> Iterator[ViewedImage]:
    """Yield the images at these positions as training sees them.

    Args:
        order: of these samples, with their augmentation.
        parts: the headings that positions belong to, and the positions.

    Raises:
        UserError: a row is damaged or missing.
    """
    load = LoadAndAugment(samples, order.seed, order.augmentation, _PATIENCE, damaged == "skip")
    names = samples.index.select(["image_id", "file_name", "height", "width"]).to_pydict()
    described = {image_id: facts for image_id, *facts in zip(*names.values(), strict=True)}
    for part, positions in parts:
        for some in np.split(positions, range(_AT_A_TIME, len(positions), _AT_A_TIME)):
            table = load(some, *order.samples(some))
            for row in table.to_pylist():
                shape, classes = (row["height"], row["width"]), row["classes"]
                file_name, height, width = described[row["image_id"]]
                yield ViewedImage(
                    image_id=row["image_id"],
                    file_name=file_name,
                    original=(height, width),
                    image=np.frombuffer(row["image"], np.uint8).reshape(*shape, 3),
                    ids=np.frombuffer(row["index_map"], index_map_type(len(classes))).reshape(shape),
                    segments=[
                        {"id": number, "category_id": samples.taxonomy.category_id(index), "iscrowd": False}
                        for number, index in enumerate(classes, 1)
                    ],
                    part=part,
                    position=row["position"],
                    epoch=row["epoch"],
                    skipped=row["skipped"],
                )


def first_positions(count: int) -> list[tuple[tuple[str, str], npt.NDArray[np.int64]]]:
    """Return the first positions of the order, under no heading."""
    return [(("", ""), np.arange(count, dtype=np.int64))]


def step_positions(
    order: SampleOrder, step: int, total_steps: int
) -> list[tuple[tuple[str, str], npt.NDArray[np.int64]]]:
    """Return the positions of each worker's micro-batches in a step, counted from 0.

    Raises:
        UserError: training has no such step, or it has too many images for a page.
    """
    if not 0 <= step < total_steps:
        raise UserError(
            f"There is no step {step}: steps are counted from 0, and training has {total_steps:,}, so the last is "
            f"{total_steps - 1:,}. Give another --step, or a longer training (--run.epochs, --run.steps)."
        )
    split = order.split
    require_drawable(split.global_batch, f"--step {step}")
    return [
        ((f"Worker {rank}", f"Micro-batch {turn}" if split.accumulation > 1 else ""), positions)
        for rank in range(split.workers)
        for turn, positions in enumerate(order.positions(rank, step, step + 1).reshape(split.accumulation, -1))
    ]


def require_drawable(count: int, flag: str) -> None:
    """Raise UserError if this many pictures are none, or too many for a page; `flag` asked for them."""
    if not 1 <= count <= MAX_PICTURES:
        raise UserError(
            f"{flag} asks for {count:,} pictures; a page has 1 to {MAX_PICTURES:,}. Ask for another number."
        )


def write_view(
    images: Iterable[ViewedImage],
    count: int,
    taxonomy: Taxonomy,
    output: str,
    title: str,
    facts: Sequence[tuple[str, str]],
) -> list[str]:
    """Draw the images into a new or empty folder: `index.html` with all of them, and a PNG of each.

    The page is written last. If drawing fails, what was written is deleted.

    Args:
        count: number of images, at most; from it follows how large each may be in the page.
        facts: what to say on top of the page, as pairs of a name and a value.

    Returns:
        The names of the files.

    Raises:
        UserError: the folder has other files, or cannot be written.
    """
    folder = locate(output)
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise UserError(f"{output!r} is a file; give a new or empty folder with --output.")
    if names := folder.names():
        raise UserError(
            f"The folder {output!r} is not empty: it has {names[0]!r}, {len(names)} names in total; give a new or "
            f"empty folder with --output."
        )
    limit = min(_PICTURE_BYTES, _PAGE_BYTES // (2 * count))
    written: list[str] = []
    figures: list[Figure] = []
    try:
        for viewed in images:
            name = f"{len(written):04d}-image-{viewed.image_id}.png"
            legible = _legible(viewed)
            drawn = overlay(*legible, viewed.segments, taxonomy)
            written.append(name)
            (folder / name).write_bytes(_encoded(drawn, "PNG", compress_level=4))
            figures.append(_figure(viewed, name, taxonomy, (small_jpeg(legible[0], limit), small_jpeg(drawn, limit))))
        written.append("index.html")
        (folder / "index.html").write_bytes(page(title, facts, taxonomy.names, figures))
    except BaseException:
        with suppress(Exception):  # the first error is the one to tell
            for name in written:
                (folder / name).delete()
            if not existed:
                folder.delete()
        raise
    return written


def _legible(viewed: ViewedImage) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Return image and ids, enlarged by repeating pixels if names could not be read, reduced if there are too many."""
    side = max(viewed.ids.shape)
    times, step = -(-_LEGIBLE // side), -(-side // _ENOUGH)
    image, ids = (pixels[::step, ::step] for pixels in (viewed.image, viewed.ids))
    return image.repeat(times, axis=0).repeat(times, axis=1), ids.repeat(times, axis=0).repeat(times, axis=1)


def _figure(viewed: ViewedImage, name: str, taxonomy: Taxonomy, pictures: tuple[bytes, bytes]) -> Figure:
    pixels = np.bincount(segment_numbers(viewed.ids, viewed.segments).ravel(), minlength=len(viewed.segments) + 1)
    kinds = [(taxonomy.class_index(s["category_id"]), bool(s["iscrowd"])) for s in viewed.segments]
    classes = [
        ClassPixels(
            class_index=kind[0],
            crowd=kind[1],
            segments=kinds.count(kind),
            pixels=sum(count for count, other in zip(pixels[1:].tolist(), kinds, strict=True) if other == kind),
        )
        for kind in sorted(set(kinds))
    ]
    return Figure(
        part=viewed.part,
        plain=pictures[0],
        overlay=pictures[1],
        png=name,
        position=viewed.position,
        epoch=viewed.epoch,
        image_id=viewed.image_id,
        file_name=viewed.file_name,
        original=viewed.original,
        shown=(viewed.ids.shape[0], viewed.ids.shape[1]),
        classes=tuple(classes),
        void=int(pixels[0]),
        note=viewed.skipped or "",
    )


def small_jpeg(image: npt.NDArray[np.uint8], limit: int) -> bytes:
    """Return the image as the largest and best JPEG of some that has at most `limit` bytes, or as the smallest."""
    content = b""
    for side in _SIDES:
        small = Image.fromarray(image)
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            content = _encoded(np.asarray(small), "JPEG", quality=quality)
            if len(content) <= limit:
                return content
    return content


def _encoded(image: npt.NDArray[np.uint8], kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()
