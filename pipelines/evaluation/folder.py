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
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from maskformer.untrusted import escaped, parse_json
from pipelines.errors import UserError
from pipelines.evaluation.score import ScoredImage
from pipelines.storage import Location

logger = logging.getLogger(__name__)

IDENTITY, PARTS, PREDICTIONS, IMAGES = "evaluation.json", "parts", "predictions", "images.jsonl"
METRICS, REPORT, OVERLAYS = "metrics.json", "report.html", "overlays"
_NAMES = (METRICS, IMAGES, REPORT, OVERLAYS, "predictions.json", PREDICTIONS, PARTS, IDENTITY)
_IMAGES_PER_PART = 32


def _is_unfinished(name: str) -> bool:
    """Return whether this is a file that `Location.write_bytes` was writing when its process was killed."""
    return name.startswith(".") and name.endswith(".tmp")


@dataclass(frozen=True)
class EvaluationFolder:
    """The folder of one evaluation."""

    location: Location

    def start(self, identity: dict[str, Any], *, resume: bool = True) -> dict[int, ScoredImage]:
        """Return the images that an earlier, equal evaluation finished here, by id; remove any other evaluation.

        Args:
            identity: what is evaluated, as JSON.
            resume: whether to go on with an equal evaluation; otherwise it is removed too.

        Raises:
            UserError: the folder has files that no evaluation wrote.
        """
        names = [name for name in self.location.names() if not _is_unfinished(name)]
        foreign = [name for name in names if name not in _NAMES or IDENTITY not in names]
        if foreign:
            raise UserError(
                f"{self.location} has {escaped(', '.join(foreign[:5]))}, which no evaluation of this version wrote. "
                f"Choose another --output."
            )
        earlier = self._identity()
        if resume and earlier == identity:
            return {image.image_id: image for image in self.finished()}
        if isinstance(earlier, dict) and earlier != identity:
            changed = sorted(key for key in {*earlier, *identity} if earlier.get(key) != identity.get(key))
            logger.warning(
                "The evaluation in %s is replaced: it is another in %s.", self.location, escaped(", ".join(changed))
            )
        for name in _NAMES:
            (self.location / name).delete()
        (self.location / IDENTITY).write_text(json.dumps(identity, indent=1))
        return {}

    def _identity(self) -> Any:
        file = self.location / IDENTITY
        try:
            return parse_json(file.read_bytes()) if file.exists() else None
        except ValueError:
            return None

    def finished(self) -> list[ScoredImage]:
        """Return the finished images in ascending order of their ids.

        Raises:
            UserError: a file is damaged.
        """
        parts = self.location / PARTS
        files = [parts / name for name in parts.names() if not _is_unfinished(name)]
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
