"""Train MaskFormer Swin-L on COCO panoptic as mmdetection published it: PQ 53.2 after 300 epochs of 64 x 1 images.

Starts a run, or resumes the one of the same name. The recipe swin_l_original trains as the original code did, and so
do the others, with smaller backbones.
"""

from jobs.shared.cli import run
from jobs.shared.training import train
from pipelines.config.recipes import SWIN_B_ORIGINAL, SWIN_L_MMDET, SWIN_L_ORIGINAL, SWIN_S_ORIGINAL, SWIN_T_ORIGINAL


def main() -> int:
    return train(__doc__, SWIN_L_MMDET, SWIN_L_ORIGINAL, SWIN_B_ORIGINAL, SWIN_S_ORIGINAL, SWIN_T_ORIGINAL)


if __name__ == "__main__":
    run(main)
