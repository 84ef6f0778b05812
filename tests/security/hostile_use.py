"""What jobs do with data sets, packs and pictures, without Ray: called in the processes of `isolated`."""

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from maskformer.images import UnreadableImageError, read_image
from pipelines.data.check_report import CheckReport
from pipelines.data.check_tasks import CHECKED, CheckImages
from pipelines.data.checks import CheckConfig
from pipelines.data.coco import CocoDataset, CocoLayout, read_coco
from pipelines.data.findings import Finding
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pack import PackConfig, open_output, pack
from pipelines.data.pixels import decode_image, decode_panoptic, index_map_type
from pipelines.data.reading import UnusableRowError, read_files, unusable
from pipelines.data.tasks import LoadAndResize, decoded_sample
from pipelines.errors import UserError
from pipelines.inference.inputs import Inputs
from pipelines.inference.stages import Read
from pipelines.storage import locate, set_patience
from tests.pipelines.data.coco_folder import SPLIT

REFUSALS = (UserError, UnusableRowError, UnreadableImageError)
"""What jobs report in a paragraph. Any other ValueError would end them with a traceback."""

pa.set_memory_pool(pa.system_memory_pool())  # the default one reserves gigabytes of addresses, which are limited


def use_each(function: str, calls: list[tuple[Any, ...]], output: str, programs: str = "") -> str:
    """Call a function of this module several times; write how each call ended to a file, as JSON.

    Args:
        programs: a folder of programs, first on the path.
    """
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    ends = []
    for arguments in calls:
        start = time.monotonic()
        try:
            kind, text = "result", globals()[function](*arguments)
            assert text.isprintable(), text
        except REFUSALS as error:
            kind, text = "refused", str(error)
        ends.append((kind, text, time.monotonic() - start))
    Path(output).write_text(json.dumps(ends))
    return f"{len(ends)} calls"


def use_data_set(folder: str, **flags: str) -> str:
    """Check a data set as `prepare_data.py` does, and pack what has no error; return the codes that were found.

    Raises:
        AssertionError: a text for people is not printable.
    """
    return _packed(read_coco(CocoLayout.find(folder, SPLIT, **flags)), Path(folder) / "packed")


def use_data_set_with_classes(folder: str, text: str) -> str:
    """As `use_data_set`, with a file of classes."""
    file = Path(folder) / "classes.yaml"
    if text:
        file.write_text(text)
    return _packed(read_coco(CocoLayout.find(folder, SPLIT), locate(file)), Path(folder) / "packed")


def _packed(dataset: CocoDataset, output: Path) -> str:
    layout, findings = dataset.layout, dataset.findings.copy()
    check = CheckImages(layout.images, layout.panoptic, dataset.taxonomy, CheckConfig(), layout.roots)
    for row in check(dataset.records).cast(CHECKED).to_pylist() if len(dataset.records) else []:
        findings.extend(Finding(**finding) for finding in row["findings"])
    report = CheckReport(dataset=dataset, findings=findings)
    for line in report.summary().split("\n"):
        assert line.isprintable(), repr(line)
        assert len(line) < 2000, len(line)
    json.loads(report.to_json())
    if not report.refusal(skip_bad=True):
        left_out = report.images_with_errors
        assert open_output(dataset, str(output), PackConfig()) is None
        pack(dataset, str(output), PackConfig(), left_out, in_process=True)
        use_pack(str(output))
    return " ".join(findings.codes()) or "no fault"


def use_pack(folder: str) -> str:
    """Read every row of a pack as training and evaluation do."""
    set_patience(0)
    samples = open_pack(folder)
    for entry in samples.index.to_pylist():
        _use_row(samples, entry)
    table = LoadAndResize(samples, 32, 48, 0)(np.arange(len(samples)))
    return f"{len(samples)} images, {table.num_rows} resized"


def _use_row(samples: PackedSet, entry: dict) -> None:
    shard, size = samples.shards[entry["shard"]], (entry["height"], entry["width"])
    image, index_map = read_files(shard, entry, "image", "index_map")
    panoptic, _ = read_files(shard, entry, "panoptic", "image")
    try:
        sample = decoded_sample(image, index_map, entry)
        assert sample.image.shape[:2] == sample.index_map.shape == size
        assert sample.index_map.max() <= len(sample.classes)
        assert sample.index_map.dtype == index_map_type(len(sample.classes))
        assert all(0 <= index < samples.taxonomy.num_classes for index in sample.classes)
        assert decode_panoptic(panoptic, size).shape == size
    except ValueError as error:
        raise unusable(shard, entry, error) from error


def use_image(content: bytes) -> str:
    """Decode a file as training does, and as a panoptic map."""
    texts = []
    for decode in (decode_image, decode_panoptic):
        try:
            texts.append(f"good: {decode(content).shape}")
        except ValueError as error:
            texts.append(str(error))
    assert all(text.isprintable() and len(text) < 500 for text in texts), texts
    return "; ".join(texts)


def use_picture(content: bytes) -> str:
    """Read a file as the registered model does."""
    return str(read_image(content, name="x.jpg").shape)


def use_other_decoders(content: bytes) -> str:
    """Open a file as this project does not: with every decoder of Pillow."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()
    return "decoded"


def use_inputs(folder: str, *inputs: str) -> str:
    """Read the pictures of a command line as `predict.py` does; return what cannot be read."""
    os.chdir(folder)
    read = Read(short_side=32, long_side=48, every=1, keep_file=True)
    reasons = []
    for item in Inputs(inputs, f"{folder}/out"):
        row = {"source": os.fsencode(item.source), "name": item.name, "video": item.is_video, "done": []}
        for table in read(pa.Table.from_pylist([row])):
            reasons += [reason for reason in table["reason"].to_pylist() if reason]
    for reason in reasons:
        assert reason.isprintable(), repr(reason)
    if reasons:
        raise UnreadableImageError(" ".join(reasons))
    return "all read"
