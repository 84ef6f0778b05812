"""Measure how far an image in a padded batch is from the same image alone.

Padding is kept out of attention and positions; convolutions, GroupNorm and Swin's windows see it. Random weights, so
the figure is the size of the effect, not its cost in PQ: published recipes and evaluation take images one by one.
"""

from dataclasses import replace

import torch

from jobs.cli import run
from maskformer import R50, SWIN_T, build_model


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    image = torch.randn(1, 3, 320, 416)
    print(f"{'':<20}{'padded to':>12}{'class logits':>16}{'mask logits':>16}   |difference| / standard deviation, mean")
    for name, config in {"R50": R50, "R50, no encoder": replace(R50, encoder_layers=0), "Swin-T": SWIN_T}.items():
        model = build_model(config).eval()
        alone = model(image)
        for height, width in ((320, 448), (416, 416), (480, 640)):
            padded = torch.zeros(1, 3, height, width)
            padded[..., :320, :416] = image
            padding = torch.ones(1, height, width, dtype=torch.bool)
            padding[:, :320, :416] = False
            output = model(padded, padding)
            classes = (output.class_logits - alone.class_logits)[-1].abs().mean() / alone.class_logits[-1].std()
            inside = output.mask_logits[-1, ..., :80, :104]
            masks = (inside - alone.mask_logits[-1]).abs().mean() / alone.mask_logits[-1].std()
            print(f"{name:<20}{f'{height}x{width}':>12}{classes:>16.4f}{masks:>16.4f}")


if __name__ == "__main__":
    run(main)
