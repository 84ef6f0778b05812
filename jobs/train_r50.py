"""Train MaskFormer R50 on COCO panoptic as mmdetection published it: PQ 46.9 after 75 epochs of 16 x 1 images.

Starts a run or goes on with the one of the same name. Data and storage may also come from $MASKFORMER_TRAIN_DATA,
$MASKFORMER_VAL_DATA and $MASKFORMER_STORAGE.
"""

from jobs.cli import parse, run, train
from pipelines.config import TrainConfig
from pipelines.recipes import R50_MMDET


def main() -> int:
    return train(parse(TrainConfig, R50_MMDET, __doc__))


if __name__ == "__main__":
    run(main)
