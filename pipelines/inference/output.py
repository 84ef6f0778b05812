"""The folder of a prediction: its settings, a record of each finished picture, and the results of all.

    settings.json          checkpoint, thresholds and what else must stay the same when it is continued
    records/*.jsonl        a line for each finished picture: name, source, size, segments
    overlays/, panoptic/   see `stages`
    predictions.json       all records in COCO's panoptic result format
    failed.json            the pictures that could not be segmented the last time, and why

Each file is written atomically, records after the files of their pictures. What was written and not recorded, in the
last second before the end of a process, is written again.
"""

import json
import os
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any, BinaryIO

from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped, parse_json
from pipelines.errors import UserError
from pipelines.inference.inputs import Item
from pipelines.inference.stages import Row, png_file
from pipelines.storage import Location

_VERSION = 1
_SECONDS, _LINES = 1.0, 1000
"""Records wait in memory for at most about this long, and at most so many."""
_MERGED = "0-merged.jsonl"
"""Before all others in the order of names, so that later records win."""


class Output:
    """The output folder of a prediction, new or continued. As a context, it saves the records at the end."""

    def __init__(self, folder: Location, settings: dict[str, Any]) -> None:
        """Open a folder.

        Raises:
            UserError: it has other files, or a prediction with other settings.
        """
        self.folder = folder
        self._lines: list[str] = []
        self._saved = time.monotonic()
        self._sources: dict[str, str] = {}
        self._frames: dict[str, set[int]] = defaultdict(set)
        self._num_frames: dict[str, int] = {}
        _require_same(folder, settings)
        (folder / "settings.json").write_text(json.dumps({"version": _VERSION, **settings}, indent=1))
        for record in self._read():
            self._remember(record)

    def __enter__(self) -> "Output":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._save()

    def is_done(self, item: Item) -> bool:
        """Return whether a picture, or all frames of a video, are finished.

        Raises:
            UserError: another picture is finished under the same name.
        """
        other = self._sources.get(item.name, item.source)
        if other != item.source:
            raise UserError(
                f"{self.folder} has results of {escaped(other)} under the name {item.name}, which "
                f"{escaped(item.source)} would have too. Choose another --output."
            )
        if item.is_video:
            return len(self._frames[item.source]) == self._num_frames.get(item.source, -1)
        return item.name in self._sources

    def frames_done(self, item: Item) -> list[int]:
        """Return the numbers of a video's finished frames."""
        return sorted(self._frames[item.source]) if item.source in self._frames else []

    def add(self, row: Row) -> None:
        """Record a RECORD row without a reason."""
        record = {"name": row["name"], "source": os.fsdecode(row["source"])}
        if row["frames"] >= 0:
            record["frames"] = row["frames"]
        else:
            if row["frame"] >= 0:
                record["frame"] = row["frame"]
            record |= {"height": row["height"], "width": row["width"], "segments": json.loads(row["segments"])}
        self._remember(record)
        self._lines.append(json.dumps(record))
        if len(self._lines) >= _LINES or time.monotonic() - self._saved >= _SECONDS:
            self._save()

    def finish(self, taxonomy: Taxonomy, failed: list[dict[str, str]], write_json: bool) -> None:
        """Write predictions.json if asked to, and failed.json if there is any; merge the records into one file."""
        self._save()
        names = [name for name in (self.folder / "records").names() if name != _MERGED]  # before they are read
        with tempfile.TemporaryFile() as file:
            places = _sorted(self._read(), file)
            if write_json:
                (self.folder / "predictions.json").write_with(lambda to: _write_coco(to, file, places, taxonomy))
            if names:
                (self.folder / "records" / _MERGED).write_with(
                    lambda to: [to.write(_line(file, place)) for place in places]
                )
            for name in names:
                (self.folder / "records" / name).delete()
        if failed:
            (self.folder / "failed.json").write_text(
                json.dumps(sorted(failed, key=lambda each: each["name"]), indent=1)
            )
        else:
            (self.folder / "failed.json").delete()

    def _remember(self, record: dict[str, Any]) -> None:
        source = record["source"]
        if "frames" in record:
            self._num_frames[source] = record["frames"]
        elif "frame" in record:
            self._frames[source].add(record["frame"])
        else:
            self._sources[record["name"]] = source

    def _read(self) -> Iterator[dict[str, Any]]:
        records = self.folder / "records"
        for name in records.names():
            if name.endswith(".jsonl"):
                for line in (records / name).read_bytes().splitlines():
                    yield parse_json(line)

    def _save(self) -> None:
        if self._lines:
            file = self.folder / "records" / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.jsonl"
            file.write_text("\n".join(self._lines) + "\n")
            self._lines = []
        self._saved = time.monotonic()


def _require_same(folder: Location, settings: dict[str, Any]) -> None:
    names = folder.names()
    if not names:
        return
    if "settings.json" not in names:
        raise UserError(
            f"{folder} has {escaped(', '.join(names[:5]))}, which no prediction wrote. Choose a new --output."
        )
    try:
        earlier = parse_json((folder / "settings.json").read_bytes())
        version = earlier.pop("version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}/settings.json cannot be read ({error}). Choose a new --output.") from error
    if version != _VERSION:
        raise UserError(f"{folder} was written by another version of maskformer-ray. Choose a new --output.")
    if earlier.get("weights") != settings["weights"]:
        raise UserError(
            f"{folder} has results of another model, {escaped(str(earlier.get('checkpoint')))}; this one is "
            f"{settings['checkpoint']}. Continue with that model, or choose a new --output."
        )
    changed = [key for key in settings if key != "checkpoint" and earlier.get(key) != settings[key]]
    if changed:
        what = ", ".join(f"{key} {escaped(str(earlier.get(key)))} -> {settings[key]}" for key in changed)
        raise UserError(f"{folder} has results of other settings: {what}. Use those, or choose a new --output.")


Place = tuple[int, int]
"""Offset and length of a record in a file."""


def _sorted(records: Iterator[dict[str, Any]], file: IO[bytes]) -> list[Place]:
    """Copy the newest record of each name to a file; return their places in the order of the names."""
    place_of: dict[str, Place] = {}
    for record in records:
        line = json.dumps(record).encode() + b"\n"
        place_of[record["name"]] = (file.tell(), len(line))
        file.write(line)
    return [place for _, place in sorted(place_of.items())]


def _line(file: IO[bytes], place: Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _write_coco(to: BinaryIO, file: IO[bytes], places: list[Place], taxonomy: Taxonomy) -> None:
    """Write the results of all pictures, numbered from 1 in the order of their names, one at a time."""

    def pictures() -> Iterator[tuple[int, dict[str, Any]]]:
        records = (json.loads(_line(file, place)) for place in places)
        yield from enumerate((record for record in records if "segments" in record), 1)

    def write_list(entries: Iterator[dict[str, Any]]) -> None:
        for number, entry in enumerate(entries):
            to.write((",\n" if number else "\n").encode() + json.dumps(entry).encode())

    to.write(b'{"images": [')
    write_list(
        {"id": number, "file_name": each["name"], "width": each["width"], "height": each["height"]}
        for number, each in pictures()
    )
    to.write(b'],\n"annotations": [')
    write_list(
        {
            "image_id": number,
            "file_name": png_file(each["name"]).partition("/")[2],
            "segments_info": each["segments"],
        }
        for number, each in pictures()
    )
    to.write(b'],\n"categories": ')
    to.write(json.dumps(taxonomy.to_coco()).encode() + b"}\n")
