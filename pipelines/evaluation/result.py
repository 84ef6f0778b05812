"""EvaluationResult: what an evaluation found, and its numbers by name."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from maskformer.analysis.lost_quality import CAUSES
from maskformer.analysis.summary import Analysis
from maskformer.panoptic_quality import ClassQuality, PanopticResult, panoptic_result
from maskformer.taxonomy import Taxonomy
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.data.manifest import PackedSet
from pipelines.evaluation.score import ScoredImage

_FORBIDDEN = re.compile(r"[^\w. :-]")
"""Characters that MLflow does not allow in a part of the name of a metric."""


@dataclass(frozen=True)
class EvaluationResult:
    """Panoptic quality of a checkpoint, or of predictions, on a data set, in fractions 0..1."""

    analysis: Analysis
    images: list[ScoredImage]
    """Of every image, in ascending order of their ids."""
    output: str
    """Folder with the files that `EvaluationFolder` describes."""
    png_folder: str
    """Folder of the predictions' PNGs."""
    data: PackedSet
    model: SavedModel | None = None
    """None for the predictions of another program."""

    @property
    def quality(self) -> PanopticResult:
        return self.analysis.quality

    @property
    def taxonomy(self) -> Taxonomy:
        return self.data.taxonomy

    @property
    def data_hash(self) -> str:
        """Hash of the evaluated pack, as `PackedSet.data_hash`."""
        return self.data.data_hash

    @property
    def per_image_counts(self) -> dict[int, dict[int, ClassQuality]]:
        """What each image contributes to PQ, by image id and category id."""
        return {image.image_id: image.analysis.quality for image in self.images}

    @cached_property
    def file_names(self) -> dict[int, str]:
        """Name of each image in the data set, by image id."""
        names = self.data.index.select(["image_id", "file_name"]).to_pydict()
        return dict(zip(names["image_id"], names["file_name"], strict=True))

    @cached_property
    def per_image(self) -> dict[int, PanopticResult]:
        """Qualities of each image alone, by image id."""
        return {
            image_id: panoptic_result([counts], self.taxonomy) for image_id, counts in self.per_image_counts.items()
        }

    @property
    def metrics(self) -> dict[str, float]:
        """Every number with a name, such as `pq/all`; those that are not defined are omitted."""
        return metrics(self.analysis)

    @property
    def summary(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {
            "checkpoint": self.model.uri if self.model else None,
            "step": self.model.step if self.model else None,
            "predictions": self.png_folder,
            "data": self.data.uri,
            "data_hash": self.data_hash,
            "num_images": self.quality.num_images,
            "metrics": self.metrics,
        }


def metrics(analysis: Analysis) -> dict[str, float]:
    """Return the numbers of an analysis by name, without those that are not defined."""
    flat: dict[str, float] = {}
    for group in ("all", "things", "stuff"):
        values, lrp = getattr(analysis.quality, group), analysis.lrp[group]
        flat |= {f"{name}/{group}": getattr(values, name) for name in ("pq", "sq", "rq")}
        flat |= {f"boundary_pq/{group}": getattr(analysis.boundary, group).pq, f"lrp/{group}": lrp.lrp}
        if group in analysis.intervals:
            interval = analysis.intervals[group]
            flat |= {f"pq_low/{group}": interval.low, f"pq_high/{group}": interval.high}
    flat["mean_iou"] = analysis.mean_iou
    flat |= {f"mask_ap/{name}": getattr(analysis.mask_ap, name) for name in ("ap", "ap50", "ap75")}
    flat["calibration_error"] = analysis.calibration.expected_error
    for cause, lost in zip(CAUSES, analysis.lost.all.sum(axis=1).tolist(), strict=True):
        flat[f"lost/{cause}"] = lost
    for name, values in analysis.quality.per_class.items():
        if values.tp + values.fp + values.fn:
            flat[_free(f"pq_class/{_FORBIDDEN.sub('_', name).strip('. ') or '_'}", flat)] = values.pq
    return {name: value for name, value in flat.items() if not math.isnan(value)}


def _free(name: str, taken: Mapping[str, float]) -> str:
    """Return the name, with a number at its end if it is taken: different classes may have the same characters left."""
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in taken else next(other for other in numbered if other not in taken)
