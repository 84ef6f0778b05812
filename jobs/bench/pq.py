"""Time panoptic quality: from memory and from PNG files, beside panopticapi and hotcoco in the same run.

python jobs/bench/pq.py

Pairs of synthetic 640 x 480 maps with 14 segments and wavy edges. A figure is the median of the repeats, in ms a pair,
in one thread. panopticapi and hotcoco are left out where they are not installed.
"""

import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.shared.cli import parse, run

THREADS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")


@dataclass(frozen=True, kw_only=True)
class PQ:
    """Time panoptic quality."""

    pairs: int = 200
    """Pairs of maps."""
    segments: int = 14
    """Segments of a map."""
    repeats: int = 5
    """Measurements, of which the median is printed."""


def main() -> None:
    flags = parse(PQ, PQ(), __doc__)
    for variable in THREADS:
        os.environ[variable] = "1"  # before numpy and hotcoco are imported

    import numpy as np
    from PIL import Image

    from maskformer.analysis.image import analyze_image
    from maskformer.analysis.summary import summarize
    from maskformer.coco_format import encode_ids
    from maskformer.panoptic_quality import PanopticQuality
    from maskformer.taxonomy import COCO
    from pipelines.data.pixels import decode_panoptic

    rng = np.random.default_rng(0)
    pairs = [_pair(rng, flags.segments) for _ in range(flags.pairs)]

    def from_memory() -> float:
        quality = PanopticQuality(COCO)
        for number, (prediction, truth) in enumerate(pairs):
            quality.update(prediction, truth, number)
        return quality.result().pq

    def everything() -> float:
        images = [analyze_image(prediction, truth, COCO, number) for number, (prediction, truth) in enumerate(pairs)]
        return summarize(images, COCO).quality.pq

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = {side: _write(folder, side, [pair[place] for pair in pairs], encode_ids, Image.fromarray)
                 for place, side in enumerate(("prediction", "truth"))}  # fmt: skip

        def from_files() -> float:
            quality = PanopticQuality(COCO)
            for number, (prediction, truth) in enumerate(pairs):
                ids = [
                    decode_panoptic((folder / side / f"{number}.png").read_bytes()) for side in ("prediction", "truth")
                ]
                quality.update((ids[0], prediction[1]), (ids[1], truth[1]), number)
            return quality.result().pq

        def hotcoco() -> float:
            from hotcoco.panoptic import pq_compute

            return pq_compute(str(files["truth"]), str(files["prediction"]))["All"]["pq"]

        def panopticapi() -> float:
            from panopticapi.evaluation import pq_compute_single_core

            annotations = [json.loads(files[side].read_text())["annotations"] for side in ("truth", "prediction")]
            categories = {category.id: {"isthing": int(category.isthing)} for category in COCO.categories}
            found = pq_compute_single_core(
                0, list(zip(*annotations, strict=True)), folder / "truth", folder / "prediction", categories
            )
            return found.pq_average(categories, None)[0]["pq"]

        print(f"{flags.pairs} pairs of 640 x 480 with {flags.segments} segments, one thread, ms a pair")
        for name, measured in {
            "from memory": from_memory,
            "all numbers of an evaluation, from memory": everything,
            "from PNG files": from_files,
            "hotcoco, from PNG files": hotcoco,
            "panopticapi, from PNG files": panopticapi,
        }.items():
            print(f"{name:<44}{_timed(measured, flags)}")


def _timed(measured: Callable[[], float], flags: PQ) -> str:
    times, pq = [], 0.0
    try:
        for _ in range(flags.repeats):
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                pq = measured()
            times.append(time.perf_counter() - start)
    except ImportError as error:
        return f"  not installed: {error.name}"
    return f"{1000 * statistics.median(times) / flags.pairs:>8.2f}   PQ {pq:.12f}"


def _pair(rng: Any, count: int) -> tuple[Any, Any]:
    """Return a prediction and its truth: cells around random points with wavy edges, the points moved a little."""
    import numpy as np
    from scipy import ndimage

    from maskformer.taxonomy import COCO

    height, width = 480, 640
    waves = ndimage.gaussian_filter(rng.standard_normal((2, height, width)), (0, 6, 6)) * 60
    rows, columns = np.mgrid[:height, :width] + waves
    points = rng.random((count, 2)) * (height, width)
    categories = [COCO.category_id(int(index)) for index in rng.choice(COCO.num_classes, count)]

    def cells(points: Any) -> tuple[Any, list[dict[str, Any]]]:
        nearest = np.argmin([(rows - y) ** 2 + (columns - x) ** 2 for y, x in points], axis=0)
        ids = (nearest + 1).astype(np.int32)
        present, areas = np.unique(ids, return_counts=True)
        return ids, [
            {"id": i, "category_id": categories[i - 1], "area": area, "iscrowd": 0, "score": float(rng.random())}
            for i, area in zip(present.tolist(), areas.tolist(), strict=True)
        ]

    truth, prediction = cells(points), cells(points + rng.normal(0, 12, points.shape))
    return prediction, truth


def _write(folder: Path, side: str, maps: list[Any], encode: Callable[[Any], Any], image: Callable[[Any], Any]) -> Path:
    from maskformer.taxonomy import COCO

    (folder / side).mkdir()
    annotations = []
    for number, (ids, segments) in enumerate(maps):
        image(encode(ids)).save(folder / side / f"{number}.png")
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments})
    images = [{"id": number, "height": 480, "width": 640, "file_name": f"{number}.jpg"} for number in range(len(maps))]
    file = folder / f"{side}.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": COCO.to_coco()}))
    return file


if __name__ == "__main__":
    run(main)
