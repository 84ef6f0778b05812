"""Scoring of written predictions with the official panopticapi, where it is installed, as a check of our PQ."""

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.data.files import read_file, resolved
from pipelines.data.pixels import decode_panoptic
from pipelines.data.reading import read_files
from pipelines.errors import UserError
from pipelines.evaluation.result import EvaluationResult
from pipelines.storage import locate

LARGEST_DIFFERENCE = 1e-9
"""Both sum the same numbers in another order."""


@dataclass(frozen=True)
class Check:
    """How far our numbers are from the official ones."""

    pq: float
    """PQ over all classes by panopticapi, a fraction 0..1."""
    difference: float
    """Largest difference of PQ, SQ and RQ over all classes, things, stuff and of each class."""

    @property
    def agrees(self) -> bool:
        return self.difference <= LARGEST_DIFFERENCE


def require_installed() -> None:
    """Raise UserError if panopticapi is not installed."""
    try:
        importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise UserError(
            "--check-with panopticapi needs the official code, which is not installed. Install it: "
            "pip install --no-deps panopticapi-lite"
        ) from error


def check_with_panopticapi(evaluation: EvaluationResult) -> Check:
    """Score the PNGs of an evaluation with panopticapi, on all CPUs of this machine, and compare.

    Raises:
        UserError: panopticapi is not installed.
    """
    require_installed()
    categories = {category.id: {"isthing": int(category.isthing)} for category in evaluation.taxonomy.categories}
    workers = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as scratch:
        pairs = list(_written(evaluation, Path(scratch)))
        parts = [(pairs[start::workers], scratch, categories) for start in range(workers)]
        # A forked process would have the threads' locks of this one.
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            statistics = list(pool.map(_score, parts))
    total = statistics[0]
    for other in statistics[1:]:
        total += other
    difference = 0.0
    per_class: dict[int, Any] = {}
    for group, isthing in (("all", None), ("things", True), ("stuff", False)):
        ours = getattr(evaluation.quality, group)
        if not ours.num_classes:
            continue
        expected, found = total.pq_average(categories, isthing)
        per_class |= found
        difference = max(difference, *(abs(getattr(ours, name) - expected[name]) for name in ("pq", "sq", "rq")))
    for quality in evaluation.quality.per_class.values():
        expected = per_class.get(quality.category_id)
        if expected is not None:
            difference = max(difference, *(abs(getattr(quality, name) - expected[name]) for name in ("pq", "sq", "rq")))
    pq = total.pq_average(categories, None)[0]["pq"] if evaluation.quality.all.num_classes else math.nan
    return Check(pq=pq, difference=difference)


def _written(evaluation: EvaluationResult, scratch: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Write the PNGs of truth and prediction; yield their annotations."""
    predicted = {image.image_id: image for image in evaluation.images}
    folder = locate(evaluation.png_folder)
    for side in ("truth", "prediction"):
        (scratch / side).mkdir()
    for entry in evaluation.data.index.to_pylist():
        image_id, name = entry["image_id"], f"{entry['image_id']}.png"
        panoptic, _ = read_files(evaluation.data.shards[entry["shard"]], entry, "panoptic", "panoptic")
        (scratch / "truth" / name).write_bytes(panoptic)
        image = predicted[image_id]
        (scratch / "prediction" / name).write_bytes(read_file(folder, image.file_name, (resolved(folder),)))
        # panopticapi takes the areas of the ground truth from its JSON, which a pack does not have.
        areas = dict(zip(*(a.tolist() for a in np.unique(decode_panoptic(panoptic), return_counts=True)), strict=True))
        truth = [{**s, "iscrowd": int(s["iscrowd"]), "area": areas[s["id"]]} for s in entry["segments"]]
        yield (
            {"image_id": image_id, "file_name": name, "segments_info": truth},
            {
                "image_id": image_id,
                "file_name": name,
                "segments_info": [dict(segment) for segment in image.segments_info],
            },
        )


def _score(part: tuple[list[Any], str, dict[int, Any]]) -> Any:
    from panopticapi.evaluation import pq_compute_single_core

    pairs, scratch, categories = part
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute_single_core(0, pairs, f"{scratch}/truth", f"{scratch}/prediction", categories)
