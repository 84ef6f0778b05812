"""Tensor names of ImageNet classifiers that share a backbone with the native model.

Sources: torchvision's models, the official Swin (models/swin_transformer.py of microsoft/Swin-Transformer) and timm's
Swin, which since 0.9 merges patches at the start of a stage instead of at the end of the previous one.
"""

from collections.abc import Iterator

from maskformer.weights.names import Layout, Row


def swin_rows(prefix: str, merging_ends_stage: bool) -> Iterator[Row]:
    """Yield the rows of the official Swin, whose names have a prefix in the original MaskFormer."""
    yield Row("backbone.features.0.0", f"{prefix}patch_embed.proj")
    yield Row("backbone.features.0.2", f"{prefix}patch_embed.norm")
    for stage in range(4):
        native, foreign = f"backbone.features.{2 * stage + 1}.{{}}", f"{prefix}layers.{stage}.blocks.{{}}"
        for name in ("norm1", "attn.qkv", "attn.proj", "attn.relative_position_bias_table", "norm2"):
            yield Row(f"{native}.{name}", f"{foreign}.{name}")
        yield Row(f"{native}.mlp.0", f"{foreign}.mlp.fc1")
        yield Row(f"{native}.mlp.3", f"{foreign}.mlp.fc2")
    for stage in range(3):
        native = f"backbone.features.{2 * stage + 2}"
        foreign = f"{prefix}layers.{stage if merging_ends_stage else stage + 1}.downsample"
        yield Row(f"{native}.norm", f"{foreign}.norm")
        yield Row(f"{native}.reduction", f"{foreign}.reduction")


TORCHVISION = Layout(
    "torchvision",
    [Row(f"backbone.{name}", name) for name in ("conv1.*", "bn1.*", "layer{}.*", "features.*")],
    leftovers=r"^(fc|norm|head)\.",
)
SWIN = Layout("Swin", list(swin_rows("", merging_ends_stage=True)), leftovers=r"^(norm|head)\.")
TIMM = Layout("timm", list(swin_rows("", merging_ends_stage=False)), leftovers=r"^(norm|head)\.")
