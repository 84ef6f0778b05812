"""Check a COCO panoptic data set and pack it into Parquet shards for training.

python jobs/prepare_data.py --input coco --split val2017 --output packed/val2017
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.shared.cli import parse, run

if TYPE_CHECKING:
    from pipelines.data.pack import PackReport


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Check a COCO panoptic data set and pack it into Parquet shards. Run again, it resumes where it stopped."""

    input: str
    """The data set's folder: a path or an s3:// URI."""
    split: str
    """Name of the split, such as train2017: images in {split}/, annotations in annotations/panoptic_{split}.json."""
    output: str
    """A new or empty folder for the pack: a path or an s3:// URI."""
    images: str | None = None
    """Folder of the images, if it is not {input}/{split}."""
    annotations: str | None = None
    """The panoptic JSON, if it is not {input}/annotations/panoptic_{split}.json."""
    panoptic: str | None = None
    """Folder of the PNGs, if it is neither {input}/annotations/panoptic_{split} nor {input}/panoptic_{split}."""
    rows_per_shard: int = 256
    """Images per Parquet file. 256 images of COCO are about 40 MB."""


def main() -> None:
    flags = parse(PrepareData, description=__doc__)

    from pipelines.data.coco import CocoLayout  # imports pyarrow, which --help should not
    from pipelines.data.pack import PackConfig, pack

    config = PackConfig(rows_per_shard=flags.rows_per_shard)
    layout = CocoLayout.find(flags.input, flags.split, flags.images, flags.annotations, flags.panoptic)
    print(_summary(pack(layout, flags.output, config)))


def _summary(report: "PackReport") -> str:
    manifest = report.manifest
    lines = [
        f"{manifest.num_images} images, {manifest.num_segments} non-crowd segments ({manifest.num_things} of things), "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards):,} bytes in {report.output}"
        f"{', packed already: nothing to do' if report.was_complete else ''}"
    ]
    for code, count in sorted(Counter(fault.code for fault in report.warnings).items()):
        first = next(fault for fault in report.warnings if fault.code == code)
        lines.append(f"warning: {code} {count} times, first in {first}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
