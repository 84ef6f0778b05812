"""Train MaskFormer R50 on COCO panoptic as mmdetection published it: PQ 46.9 after 75 epochs of 16 x 1 images.

Starts a run, or resumes the one of the same name. The recipes r50_original and r101_original train as the original
code did, with 64 images a step.
"""

from jobs.shared.cli import run
from jobs.shared.training import train
from pipelines.config.recipes import R50_MMDET, R50_ORIGINAL, R101_ORIGINAL


def main() -> int:
    return train(__doc__, R50_MMDET, R50_ORIGINAL, R101_ORIGINAL)


if __name__ == "__main__":
    run(main)
