"""Train MaskFormer Swin-L on COCO panoptic as mmdetection published it: PQ 53.2 after 300 epochs of 64 x 1 images.

Starts a run or goes on with the one of the same name. Data and storage may also come from $MASKFORMER_TRAIN_DATA,
$MASKFORMER_VAL_DATA and $MASKFORMER_STORAGE. `--recipe swin_l_original` trains as the original code did, and so do
`swin_t_original`, `swin_s_original` and `swin_b_original` with smaller backbones.
"""

from jobs.cli import run
from jobs.training import train
from pipelines.recipes import SWIN_B_ORIGINAL, SWIN_L_MMDET, SWIN_L_ORIGINAL, SWIN_S_ORIGINAL, SWIN_T_ORIGINAL


def main() -> int:
    return train(__doc__, SWIN_L_MMDET, SWIN_L_ORIGINAL, SWIN_B_ORIGINAL, SWIN_S_ORIGINAL, SWIN_T_ORIGINAL)


if __name__ == "__main__":
    run(main)
