"""Measure how many training images one CPU turns from packed rows into Arrow per second, without Ray.

python jobs/bench/augment.py --input coco --split val2017

Reading from storage and Ray's overhead are not included. jobs/plan.py takes the result as --images-per-cpu-second.
"""

import time
from dataclasses import dataclass

from jobs.shared.cli import parse, run


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Measure how many training images one CPU decodes and augments per second."""

    input: str
    """Folder of a COCO panoptic data set."""
    split: str
    """Split of the data set, such as val2017."""
    images: int = 64
    """Augmented images to time. The first images of the data set are used, repeatedly if there are fewer."""


def main() -> None:
    flags = parse(Augment, description=__doc__)

    import torch  # --help should not import it

    from pipelines.config.recipes import R50_MMDET, SWIN_L_ORIGINAL
    from pipelines.data.augment import augment, sample_rng
    from pipelines.data.coco import CocoLayout, read_coco
    from pipelines.data.shards import packed_row
    from pipelines.data.tasks import augmented_row, augmented_table, decoded_sample

    torch.set_num_threads(1)
    layout = CocoLayout.find(flags.input, flags.split)
    dataset = read_coco(layout)
    rows = [packed_row(layout, dataset.classes, record) for record in dataset.records[: flags.images].to_pylist()]
    print(f"{'':<18}{'images/s per CPU':>20}{'decoding':>16}")
    for recipe in (R50_MMDET, SWIN_L_ORIGINAL):
        decoding, start = 0.0, time.process_time()
        for turn in range(flags.images):
            row = rows[turn % len(rows)]
            since = time.process_time()
            sample = decoded_sample(row["image"], row["index_map"], row)
            decoding += time.process_time() - since
            epoch = turn // len(rows)
            sample = augment(sample, sample_rng(0, epoch, row["image_id"]), recipe.data.augment)
            augmented_table([augmented_row(sample, turn, epoch, row["image_id"])])
        seconds = time.process_time() - start
        print(f"{recipe.recipe:<18}{flags.images / seconds:>20.1f}{decoding / seconds:>16.0%}")


if __name__ == "__main__":
    run(main)
