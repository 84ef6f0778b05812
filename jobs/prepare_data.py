"""Check a COCO panoptic data set and pack it into Parquet shards for training.

python jobs/prepare_data.py --input coco --split val2017 --check
python jobs/prepare_data.py --input coco --split val2017 --output packed/val2017
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from pipelines.errors import RunFailedError, UserError

if TYPE_CHECKING:
    from pipelines.data.check_report import CheckReport
    from pipelines.data.pack import PackReport


@dataclass(frozen=True, kw_only=True)
class PrepareData:
    """Check a COCO panoptic data set and pack it into Parquet shards. Run again, it resumes where it stopped."""

    input: str
    """The data set's folder: a path or a URI (s3://, gs://, abfs://)."""
    split: str
    """Name of the split, such as train2017: images in {split}/, annotations in annotations/panoptic_{split}.json."""
    output: str | None = None
    """A new or empty folder for the pack: a path or a URI (s3://, gs://, abfs://)."""
    check: bool = False
    """Check only. Nothing is packed, and --output is not needed."""
    report: str | None = None
    """File to write all findings to, as JSON."""
    skip_bad: bool = False
    """Leave out the images that have errors and pack the others."""
    other_split: str | None = None
    """Another split, whose images in {input}/{other-split}/ must not occur in this one."""
    max_void_share: float = 0.5
    """Warn of images of which a larger share is void."""
    min_images_per_class: int = 0
    """Warn of classes that fewer images have; 0: of none."""
    max_megapixels: float = 52
    """Refuse files of more pixels, in millions, before they are decoded; WebP and CMYK of more than half of them."""
    images: str | None = None
    """Folder of the images, if it is not {input}/{split}."""
    annotations: str | None = None
    """The panoptic JSON, if it is not {input}/annotations/panoptic_{split}.json."""
    panoptic: str | None = None
    """Folder of the PNGs, if it is neither {input}/annotations/panoptic_{split} nor {input}/panoptic_{split}."""
    classes: str | None = None
    """YAML file that renames, merges or drops classes, or says which are things."""
    shard_megabytes: int = 128
    """Size of a Parquet file in MB."""
    rows_per_shard: int = 4096
    """Most images in a Parquet file."""
    verbose: bool = False
    """Show the output of Ray instead of writing it to a log file."""


def main() -> int:
    flags = parse(PrepareData, description=__doc__)
    if not flags.check and flags.output is None:
        raise UserError("Where should the pack be? Give --output FOLDER, or --check to check only.")
    with quiet(flags.verbose):
        checked, packed = _check_and_pack(flags, None if flags.check else flags.output)
    if checked:
        print(checked.summary())
    if packed:
        print_line(_summary(packed))
        if checked and checked.has_errors:
            print(f"{len(checked.images_with_errors)} images were left out")
        return 0
    assert checked is not None
    refusal = checked.refusal(flags.skip_bad)
    if refusal and not flags.check:
        raise RunFailedError(refusal)
    return int(checked.has_errors)


def _check_and_pack(flags: PrepareData, output: str | None) -> "tuple[CheckReport | None, PackReport | None]":
    """Return no check if the pack is complete already, and no pack if it was refused or not asked for."""
    from pipelines.cluster.session import session  # imports Ray, which --help should not
    from pipelines.data.checks import CheckConfig
    from pipelines.data.coco import CocoLayout, read_coco
    from pipelines.data.pack import PackConfig, open_output, pack, require_writable
    from pipelines.data.validate import validate
    from pipelines.storage import locate

    config = PackConfig(shard_megabytes=flags.shard_megabytes, rows_per_shard=flags.rows_per_shard)
    checks = CheckConfig(
        max_void_share=flags.max_void_share,
        min_images_per_class=flags.min_images_per_class,
        max_megapixels=flags.max_megapixels,
    )
    layout = CocoLayout.find(flags.input, flags.split, flags.images, flags.annotations, flags.panoptic)
    other_images = locate(flags.input) / flags.other_split if flags.other_split else None
    if flags.report:
        require_writable(locate(flags.report))
    dataset = read_coco(layout, locate(flags.classes) if flags.classes else None)
    if output and (packed := open_output(dataset, output, config, flags.skip_bad)):
        return None, packed
    with session():
        checked = validate(dataset, checks, other_images)
        if flags.report:
            locate(flags.report).write_text(checked.to_json())
        if output is None or checked.refusal(flags.skip_bad):
            return checked, None
        return checked, pack(dataset, output, config, checked.images_with_errors)


def _summary(report: "PackReport") -> str:
    manifest = report.manifest
    return (
        f"{manifest.num_images} images, {manifest.num_segments} non-crowd segments ({manifest.num_things} of things), "
        f"{len(manifest.shards)} shards, {sum(shard.bytes for shard in manifest.shards):,} bytes in {report.output}"
        f"{', packed already: nothing to do' if report.was_complete else ''}"
    )


if __name__ == "__main__":
    run(main)
