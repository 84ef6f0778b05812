"""The folder of an evaluation: what it has finished, so that it can go on after a kill.

evaluation.json      what is evaluated: checkpoint, thresholds, data
parts/*.jsonl        finished images, a file for each few, until all are finished
predictions/*.png    COCO panoptic results, with predictions.json
images.jsonl         all images, a line of JSON each; the parts are deleted then
metrics.json         the numbers, written last but for the report
report.html          all numbers, and pictures of some images
overlays/*.jpg       predictions drawn on some images
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.errors import UserError
from pipelines.evaluation.score import ScoredImage
from pipelines.storage import Location

IDENTITY, PARTS, PREDICTIONS, IMAGES = "evaluation.json", "parts", "predictions", "images.jsonl"
METRICS, REPORT, OVERLAYS = "metrics.json", "report.html", "overlays"
_NAMES = (METRICS, IMAGES, REPORT, OVERLAYS, "predictions.json", PREDICTIONS, PARTS, IDENTITY)
_IMAGES_PER_PART = 32


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of one evaluation."""

    location: Location

    def start(self, identity: dict[str, Any]) -> dict[int, ScoredImage]:
        """Return the images that an earlier, equal evaluation finished here, by id; remove any other evaluation.

        Args:
            identity: what is evaluated, as JSON.

        Raises:
            UserError: the folder has files that no evaluation wrote.
        """
        foreign = [name for name in self.location.names() if name not in _NAMES]
        if foreign:
            raise UserError(
                f"{self.location} has {', '.join(foreign[:5])}, which no evaluation wrote. Choose another --output."
            )
        if self._identity() == identity:
            return {image.image_id: image for image in self.finished()}
        for name in _NAMES:
            (self.location / name).delete()
        (self.location / IDENTITY).write_text(json.dumps(identity, indent=1))
        return {}

    def _identity(self) -> Any:
        file = self.location / IDENTITY
        try:
            return json.loads(file.read_text()) if file.exists() else None
        except ValueError:
            return None

    def finished(self) -> list[ScoredImage]:
        """Return the finished images in ascending order of their ids.

        Raises:
            UserError: a file is damaged.
        """
        files = [self.location / PARTS / name for name in (self.location / PARTS).names()]
        if (self.location / IMAGES).exists():
            files.append(self.location / IMAGES)
        found: dict[int, ScoredImage] = {}
        for file in files:
            try:
                for line in file.read_text().splitlines():
                    image = ScoredImage.from_json(line)
                    found[image.image_id] = image
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{file} is damaged ({type(error).__name__}: {error}). Delete {self.location} and evaluate again."
                ) from error
        return [found[image_id] for image_id in sorted(found)]

    def keep(self, images: Iterable[ScoredImage]) -> Iterator[ScoredImage]:
        """Yield the images, and keep those that were yielded even if the evaluation ends early."""
        waiting: list[ScoredImage] = []
        try:
            for image in images:
                waiting.append(image)
                if len(waiting) == _IMAGES_PER_PART:
                    self._write_part(waiting)
                    waiting = []
                yield image
        finally:
            self._write_part(waiting)

    def _write_part(self, images: list[ScoredImage]) -> None:
        if images:
            lines = "".join(image.to_json() + "\n" for image in images)
            (self.location / PARTS / f"{images[0].image_id:012d}.jsonl").write_text(lines)

    def finish(self, images: list[ScoredImage], metrics: dict[str, Any]) -> None:
        """Write the files of a complete evaluation."""
        annotations = [
            {"image_id": image.image_id, "file_name": image.file_name, "segments_info": image.segments_info}
            for image in images
        ]
        (self.location / "predictions.json").write_text(json.dumps({"annotations": annotations}))
        (self.location / IMAGES).write_text("".join(image.to_json() + "\n" for image in images))
        (self.location / PARTS).delete()
        (self.location / METRICS).write_text(json.dumps(metrics, indent=1))
