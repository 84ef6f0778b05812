"""Draw docs/demo.png: images of the demo's validation set with their ground truth and the model's prediction.

python docs/make_picture.py

Run `make demo` first. The images are taken at even distances from the validation set, not chosen by their result.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from jobs.shared.cli import run
from maskformer.taxonomy import Taxonomy
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pixels import decode_image, decode_panoptic
from pipelines.errors import UserError

logger = logging.getLogger(__name__)

SCALE = 3
CELL = 64 * SCALE
"""Pixels of a panel: the demo's images have at most 64 a side."""
GAP, GROUP_GAP, HEADER = 8, 28, 30
COLUMNS = ("image", "ground truth", "prediction")
COLORS = {
    "square": "#f2b134",
    "disk": "#e4572e",
    "triangle": "#9b5de5",
    "cross": "#f15bb5",
    "sky": "#9ad1f5",
    "field": "#8cc084",
    "water": "#4a7fc1",
}
VOID, OUTLINE, BACKGROUND, TEXT = (70, 70, 70), (20, 20, 20), (255, 255, 255), (40, 40, 40)
MAX_BYTES = 100_000

Rgb = NDArray[np.uint8]


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--storage", default="runs", help="folder in which `make demo` ran [%(default)s]")
    flags.add_argument("--output", default="docs/demo.png", help="PNG file to write [%(default)s]")
    flags.add_argument("--images", type=int, default=6, help="examples to draw, two in a row [%(default)s]")
    return flags


def main() -> None:
    flags = parser().parse_args()
    if flags.images < 2 or flags.images % 2:
        raise UserError(f"--images must be an even number of at least 2, got {flags.images}.")
    samples = open_pack(f"{flags.storage}/demo-data/val")
    folder = newest_predictions(Path(flags.storage) / "demo" / "evaluation")
    examples = [example(samples, position, folder) for position in positions(len(samples), flags.images)]
    picture = compose(examples, samples.taxonomy)
    # A palette makes the file four times smaller; the panels of labels have few colors.
    picture.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(flags.output, optimize=True)
    size = Path(flags.output).stat().st_size
    if size > MAX_BYTES:
        raise UserError(f"{flags.output} has {size} bytes, more than {MAX_BYTES}. Draw fewer images with --images.")
    logger.info("Wrote %s, %d bytes, with the predictions in %s.", flags.output, size, folder)


def newest_predictions(evaluations: Path) -> Path:
    """Return the predictions of the last step that was evaluated on the validation set.

    Raises:
        UserError: the demo has not been evaluated.
    """
    found = sorted(evaluations.glob("*-val/predictions.json"))
    if not found:
        raise UserError(
            f"There are no predictions in {evaluations}. Run `make demo` first, or give its folder as --storage."
        )
    return found[-1].parent


def positions(total: int, count: int) -> list[int]:
    """Return `count` positions at even distances, in the middle of each of `count` equal parts."""
    return [(2 * number + 1) * total // (2 * count) for number in range(count)]


def example(samples: PackedSet, position: int, folder: Path) -> list[Image.Image]:
    """Return the panels of one validation image: image, ground truth, prediction."""
    table = pq.read_table(samples.shards[samples.shard[position]])
    row = table.slice(int(samples.row[position]), 1).to_pylist()[0]
    image = decode_image(row["image"])
    results = json.loads((folder / "predictions.json").read_text())["annotations"]
    result = next(result for result in results if result["image_id"] == row["image_id"])
    predicted = decode_panoptic((folder / "predictions" / result["file_name"]).read_bytes())
    panels = (
        enlarged(image),
        labels(decode_panoptic(row["panoptic"]), row["segments"], samples.taxonomy),
        labels(predicted, result["segments_info"], samples.taxonomy),
    )
    return [Image.fromarray(panel) for panel in panels]


def labels(ids: NDArray[np.int32], segments: list[dict[str, Any]], taxonomy: Taxonomy) -> Rgb:
    """Paint every segment in the color of its class, with an outline; crowds are hatched and void is dark."""
    large = enlarged(ids)
    painted = np.full((*large.shape, 3), VOID, np.uint8)
    rows, columns = np.indices(large.shape)
    for segment in segments:
        mask = large == segment["id"]
        name = taxonomy.names[taxonomy.class_index(segment["category_id"])]
        painted[mask] = rgb(name)
        if segment.get("iscrowd"):
            painted[mask & ((rows + columns) % 8 < 3)] = VOID
    edge = np.zeros(large.shape, bool)
    for differs, before, after in (
        (large[:, 1:] != large[:, :-1], edge[:, :-1], edge[:, 1:]),
        (large[1:] != large[:-1], edge[:-1], edge[1:]),
    ):
        before |= differs
        after |= differs
    painted[edge] = OUTLINE
    return painted


def rgb(name: str) -> tuple[int, int, int]:
    """Return the color of a class."""
    color = COLORS[name]
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def enlarged(pixels: NDArray[Any]) -> NDArray[Any]:
    """Repeat every pixel `SCALE` times in both directions."""
    return pixels.repeat(SCALE, axis=0).repeat(SCALE, axis=1)


def compose(examples: list[list[Image.Image]], taxonomy: Taxonomy) -> Image.Image:
    """Arrange the examples two in a row below the columns' names, and a legend below them."""
    group = len(COLUMNS) * CELL + (len(COLUMNS) - 1) * GAP
    width, height = 2 * group + GROUP_GAP + 2 * GAP, HEADER + len(examples) // 2 * (CELL + GAP) + 36
    picture = Image.new("RGB", (width, height), BACKGROUND)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=16)
    for number, panels in enumerate(examples):
        row, half = divmod(number, 2)
        for column, panel in enumerate(panels):
            left = GAP + half * (group + GROUP_GAP) + column * (CELL + GAP)
            if row == 0:
                pen.text((left + CELL / 2, HEADER / 2), COLUMNS[column], TEXT, font, anchor="mm")
            top = HEADER + row * (CELL + GAP)
            picture.paste(panel, (left + (CELL - panel.width) // 2, top + (CELL - panel.height) // 2))
    entries = [(name, rgb(name)) for name in taxonomy.names] + [("void, or no prediction", VOID)]
    lengths = [24 + font.getlength(name) for name, _ in entries]
    space = (width - 2 * GAP - sum(lengths)) / len(entries)
    left, middle = GAP + space / 2, height - 17
    for (name, color), length in zip(entries, lengths, strict=True):
        pen.rectangle((left, middle - 8, left + 16, middle + 8), color, OUTLINE)
        pen.text((left + 24, middle), name, TEXT, font, anchor="lm")
        left += length + space
    return picture


if __name__ == "__main__":
    run(main)
