"""Validation of a data set: every image and PNG is opened, on all CPUs, and compared with the JSON.

Ray Data checks blocks of records; the results stream to this process, which only counts. Memory holds the records, 100
bytes per image and a limited number of findings, whatever the number of faults. Ray's object store has the records once
more.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import fs

from maskformer.untrusted import escaped
from pipelines.data.check_report import CheckReport
from pipelines.data.check_tasks import FILE, CheckImages, HashFiles
from pipelines.data.checks import CheckConfig
from pipelines.data.coco import CocoDataset
from pipelines.data.execution import mapped, outputs
from pipelines.data.findings import Finding, Findings
from pipelines.errors import UserError
from pipelines.progress import progress
from pipelines.storage import Location, retried

_IMAGES_PER_TASK = 64


def validate(dataset: CocoDataset, config: CheckConfig, other_images: Location | None = None) -> CheckReport:
    """Check every record on Ray Data and return all findings, including those of `read_coco`.

    Args:
        other_images: folder of another split's images, which must not occur in this data set.

    Raises:
        UserError: the other folder does not exist, or Ray refuses.
        StorageUnavailableError: the storage does not answer.
    """
    others = _sizes(other_images) if other_images is not None else {}
    findings = dataset.findings.copy()
    hashes = np.zeros(len(dataset.records), "S64")  # in hexadecimal; empty if the file cannot be read
    lengths = np.zeros(len(dataset.records), np.int64)
    layout = dataset.layout
    check = CheckImages(layout.images, layout.panoptic, dataset.taxonomy, config, layout.roots)
    for row, checked in enumerate(_run(dataset.records, check, "images checked")):
        findings.extend(Finding(**finding) for finding in checked["findings"])
        hashes[row], lengths[row] = checked["sha256"].encode(), checked["bytes"]
    _find_repeated_images(dataset, hashes, findings)
    if other_images is not None:
        # Files of other lengths have other bytes, so few need be read.
        wanted = set(lengths[lengths > 0].tolist())
        names = [name for name, length in others.items() if length in wanted]
        table = pa.table([names], schema=FILE)
        _find_in_other_split(dataset, hashes, _run(table, HashFiles(other_images), "images compared"), findings)
    _find_rare_classes(dataset, config, findings)
    return CheckReport(dataset=dataset, findings=findings)


def _run(table: pa.Table, operator: Callable[[pa.Table], pa.Table], what: str) -> Iterator[dict[str, Any]]:
    """Apply `operator` to blocks of the rows of `table` in Ray tasks; yield the resulting rows in order."""
    if not len(table):
        return
    # Copies, since pickling a slice pickles the entire table.
    parts = [
        table.take(list(range(start, min(start + _IMAGES_PER_TASK, len(table)))))
        for start in range(0, len(table), _IMAGES_PER_TASK)
    ]
    count, dataset = len(parts), mapped(ray.data.from_arrow(parts), operator, "check", in_order=True)
    del parts  # Ray has them now
    for batch in progress(outputs(dataset), count, f"blocks of {_IMAGES_PER_TASK} {what}"):
        yield from batch.to_pylist()


def _find_repeated_images(dataset: CocoDataset, hashes: np.ndarray, findings: Findings) -> None:
    """Find files of the same bytes under several names."""
    records, layout = dataset.records, dataset.layout
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    first = first[which]  # for each row the first with the same bytes
    for row in np.flatnonzero((first != np.arange(len(hashes))) & (hashes != b"")).tolist():
        name, other = records["image_file"][row].as_py(), records["image_file"][int(first[row])].as_py()
        if name != other:  # otherwise it is image-file-repeated
            findings.add(
                "image-repeated",
                file=str(layout.images / name),
                image_id=records["image_id"][row].as_py(),
                what=f"the file has the bytes of {other!r}",
            )


def _find_in_other_split(
    dataset: CocoDataset, hashes: np.ndarray, others: Iterator[dict[str, Any]], findings: Findings
) -> None:
    order = np.argsort(hashes)
    ordered = hashes[order]
    for other in others:
        if not other["sha256"]:
            continue
        digest = np.bytes_(other["sha256"].encode())
        start, end = np.searchsorted(ordered, digest, "left"), np.searchsorted(ordered, digest, "right")
        for row in sorted(order[start:end].tolist()):
            findings.add(
                "image-in-other-split",
                file=str(dataset.layout.images / dataset.records["image_file"][row].as_py()),
                image_id=dataset.records["image_id"][row].as_py(),
                what=f"the file has the bytes of {other['name']!r} in the other split",
            )


def _find_rare_classes(dataset: CocoDataset, config: CheckConfig, findings: Findings) -> None:
    if not config.min_images_per_class:
        return
    images: Counter[int | None] = Counter()
    category_of = dataset.classes.category_of
    for batch in dataset.records.select(["segments"]).to_batches(max_chunksize=1024):
        for segments in batch["segments"].to_pylist():
            used = {segment["category_id"] for segment in segments if not segment["iscrowd"]}
            images.update({category_of.get(category) for category in used})
    for category in dataset.classes.taxonomy.categories:
        if images[category.id] < config.min_images_per_class:
            what = f"the class {category.name!r}, id {category.id}, is in {images[category.id]} images"
            findings.add("class-rare", file=str(dataset.layout.annotations), what=what)


def _sizes(folder: Location) -> dict[str, int]:
    """Return the length in bytes of each file in a folder whose name is UTF-8; no JSON can have another name."""
    if folder.is_local:
        found = folder.sizes().items()
        sizes = {n: size for n, size in found if "/" not in n and n.encode(errors="replace").decode() == n}
    else:
        selector = fs.FileSelector(folder.path, allow_not_found=True)
        infos = retried("list", folder, lambda: folder.filesystem.get_file_info(selector))
        sizes = {info.base_name: info.size or 0 for info in infos if info.type == fs.FileType.File}
    if not sizes:
        raise UserError(f"There are no images in {escaped(folder.uri)}; check --other-split.")
    return dict(sorted(sizes.items()))
