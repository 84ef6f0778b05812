"""predict(): segment all pictures that a command line names, and continue where an earlier one ended."""

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maskformer import Segmenter
from maskformer.checkpoint import pick_device
from pipelines.config.predict import PredictConfig
from pipelines.errors import UserError
from pipelines.inference.inputs import Inputs, Item
from pipelines.inference.model import fingerprint, open_segmenter
from pipelines.inference.output import Output
from pipelines.inference.stages import Read, Row, Segment, Write
from pipelines.inference.videos import expected_frames, require_decoder
from pipelines.progress import progress
from pipelines.storage import is_remote, locate

FEW = 8
"""Local pictures that are segmented in this process; to start Ray takes longer."""


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """What a prediction did."""

    output: str
    done: int
    """Pictures and frames segmented now."""
    before: int
    """Pictures and videos that were finished before."""
    failed: list[dict[str, str]]
    """`name`, `source` and `reason` of those that cannot be segmented, as in failed.json."""


def predict(config: PredictConfig) -> PredictResult:
    """Segment all pictures and write overlays, panoptic PNGs and COCO's results; finished ones are left alone.

    Up to FEW local pictures are segmented in this process, more of them with Ray Data.

    Raises:
        UserError: no input exists, the model cannot be opened, or the output folder has other results.
        StorageUnavailableError: the storage did not answer.
    """
    inputs = Inputs(config.input, config.output)
    total, few = _survey(inputs, config.every)
    segmenter, source = open_segmenter(config.checkpoint, config.panoptic, config.tracking.uri)
    read = Read(
        segmenter.short_side, segmenter.long_side, config.every, keep_file=config.write.overlays, stores=inputs.stores
    )
    folder = locate(config.output)
    write = Write(folder, segmenter.taxonomy, config.write.overlays, config.write.pngs)
    failed: list[dict[str, str]] = []
    done, missing = 0, 0
    with Output(folder, _settings(config, segmenter, source)) as output:
        todo = _Todo(inputs, output)
        for row in progress(_run(todo, segmenter, read, write, config, few), total, "pictures segmented"):
            if row["reason"]:
                failed.append({"name": row["name"], "source": os.fsdecode(row["source"]), "reason": row["reason"]})
                missing += row["missing"]
            else:
                output.add(row)
                done += row["frames"] < 0
        if failed and missing == len(failed) and not done and not todo.before:
            raise UserError(f"None of the {missing} pictures exist, first {failed[0]['reason']} Correct their paths.")
        output.finish(segmenter.taxonomy, failed, config.write.json)
    return PredictResult(output=str(folder), done=done, before=todo.before, failed=failed)


class _Todo:
    """Yields the ITEM rows that are not finished, each name once."""

    def __init__(self, inputs: Inputs, output: Output) -> None:
        self._inputs, self._output = inputs, output
        self.before = 0

    def __iter__(self) -> Iterator[Row]:
        names: set[str] = set()  # inputs may overlap
        for item in self._inputs:
            if item.name in names:
                continue
            names.add(item.name)
            if self._output.is_done(item):
                self.before += 1
                continue
            video = item.is_video
            frames = self._output.frames_done(item) if video else []
            yield {"source": os.fsencode(item.source), "name": item.name, "video": video, "done": frames}


def _run(
    todo: _Todo, segmenter: Segmenter, read: Read, write: Write, config: PredictConfig, few: bool
) -> Iterator[Row]:
    items = iter(todo)
    first = next(items, None)
    if first is None:
        return
    items = _chained(first, items)
    if not few:
        from pipelines.inference import on_ray  # takes seconds

        yield from on_ray.run(items, segmenter, read, write, config.scaling)
        return
    segmenter.model.to(pick_device(config.scaling.device))
    segment = Segment(segmenter)
    for item in items:
        for row in read.rows(item):
            yield write.row(segment.row(row))


def _chained(first: Row, items: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from items


def _survey(inputs: Inputs, every: int) -> tuple[int, bool]:
    """Return about how many pictures and frames there are, and whether they are a few local pictures.

    Raises:
        UserError: there are none.
    """
    total, count, only_local_pictures, has_video = 0, 0, True, False
    for item in inputs:
        count += 1
        if item.is_video and not has_video:
            require_decoder()
            has_video = True
        total += _expected(item, every)
        only_local_pictures = only_local_pictures and not item.is_video and not is_remote(item.source)
    if not count:
        raise UserError(
            "There is no picture in what is named. Name pictures, folders with pictures (.jpg, .png, ...), globs in "
            "quotes or s3:// prefixes; videos are taken by name, not from folders."
        )
    return total, only_local_pictures and count <= FEW


def _expected(item: Item, every: int) -> int:
    return expected_frames(item.source, every) if item.is_video else 1


def _settings(config: PredictConfig, segmenter: Segmenter, source: str) -> dict[str, Any]:
    """Return what must stay the same when a prediction is continued, as JSON gives it back."""
    return {
        "checkpoint": source,
        "weights": fingerprint(segmenter),
        **dataclasses.asdict(segmenter.config),
        "short_side": segmenter.short_side,
        "long_side": segmenter.long_side,
        "every": config.every,
        "overlays": config.write.overlays,
        "pngs": config.write.pngs,
    }
