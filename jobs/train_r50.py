"""Train MaskFormer R50 on COCO panoptic as mmdetection published it: PQ 46.9 after 75 epochs of 16 x 1 images.

Starts a run or goes on with the one of the same name. Data and storage may also come from $MASKFORMER_TRAIN_DATA,
$MASKFORMER_VAL_DATA and $MASKFORMER_STORAGE. `--recipe r50_original` or `r101_original` trains as the original code
did, 64 images a step.
"""

from jobs.cli import run
from jobs.training import train
from pipelines.recipes import R50_MMDET, R50_ORIGINAL, R101_ORIGINAL


def main() -> int:
    return train(__doc__, R50_MMDET, R50_ORIGINAL, R101_ORIGINAL)


if __name__ == "__main__":
    run(main)
