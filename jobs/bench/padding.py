"""Measure how much padding in a batch changes the output for an image.

python jobs/bench/padding.py

Padding is excluded from attention and positions, but convolutions, GroupNorm and Swin's windows see it. The weights are
random, so the figure is the size of the effect, not its cost in PQ: published recipes and evaluation take images one by
one.
"""

from dataclasses import dataclass, replace

from jobs.shared.cli import parse, run


@dataclass(frozen=True, kw_only=True)
class Padding:
    """Measure how much padding in a batch changes the output for an image."""

    seed: int = 0
    """Seed of the weights and of the image."""


def main() -> None:
    flags = parse(Padding, Padding(), __doc__)

    import torch  # --help should not import it

    from maskformer import R50, SWIN_T, build_model

    torch.manual_seed(flags.seed)
    torch.set_grad_enabled(False)
    image = torch.randn(1, 3, 320, 416)
    print(f"{'':<20}{'padded to':>12}{'class logits':>16}{'mask logits':>16}   mean |difference| / standard deviation")
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
