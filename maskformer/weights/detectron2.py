"""Tensor names of the original MaskFormer, built on detectron2, and of detectron2's ResNet alone.

Sources: mask_former/modeling of the original code, heads/pixel_decoder.py, transformer/transformer_predictor.py,
transformer/transformer.py and backbone/swin.py. Its frozen batch norms have no `num_batches_tracked`.
"""

from collections.abc import Iterator

from maskformer.weights.imagenet import swin_rows
from maskformer.weights.names import Layout, Row


def _resnet(prefix: str) -> Iterator[Row]:
    yield Row("backbone.conv1", f"{prefix}stem.conv1")
    yield Row("backbone.bn1", f"{prefix}stem.conv1.norm")
    for stage in range(1, 5):
        native, foreign = f"backbone.layer{stage}.{{}}", f"{prefix}res{stage + 1}.{{}}"
        yield Row(f"{native}.conv{{}}", f"{foreign}.conv{{}}")
        yield Row(f"{native}.bn{{}}", f"{foreign}.conv{{}}.norm")
        yield Row(f"{native}.downsample.0", f"{foreign}.shortcut")
        yield Row(f"{native}.downsample.1", f"{foreign}.shortcut.norm")


def _swin() -> Iterator[Row]:
    yield from swin_rows("backbone.", merging_ends_stage=True)
    for stage in range(4):
        yield Row(f"backbone.norms.{stage}", f"backbone.norm{stage}")


def _pixel_decoder(prefix: str) -> Iterator[Row]:
    yield Row("pixel_decoder.projection", f"{prefix}.input_proj")
    yield Row("pixel_decoder.top.0", f"{prefix}.layer_4")
    yield Row("pixel_decoder.top.1", f"{prefix}.layer_4.norm")
    for step in range(3):
        level = 3 - step  # detectron2 counts fine to coarse, the native names coarse to fine
        for native, foreign in (("laterals", "adapter"), ("outputs", "layer")):
            yield Row(f"pixel_decoder.{native}.{step}.0", f"{prefix}.{foreign}_{level}")
            yield Row(f"pixel_decoder.{native}.{step}.1", f"{prefix}.{foreign}_{level}.norm")
    yield Row("pixel_decoder.mask_features", f"{prefix}.mask_features")
    native, foreign = "pixel_decoder.encoder.{}", f"{prefix}.transformer.encoder.layers.{{}}"
    yield from _attention(f"{native}.self_attention", f"{foreign}.self_attn")
    yield Row(f"{native}.self_attention_norm", f"{foreign}.norm1")
    yield Row(f"{native}.feedforward.0", f"{foreign}.linear1")
    yield Row(f"{native}.feedforward.3", f"{foreign}.linear2")
    yield Row(f"{native}.feedforward_norm", f"{foreign}.norm2")


def _predictor(prefix: str) -> Iterator[Row]:
    yield Row("query_embedding", f"{prefix}.query_embed")
    yield Row("pixel_decoder.projection", f"{prefix}.input_proj")
    native, foreign = "transformer_decoder.layers.{}", f"{prefix}.transformer.decoder.layers.{{}}"
    yield from _attention(f"{native}.self_attention", f"{foreign}.self_attn")
    yield Row(f"{native}.self_attention_norm", f"{foreign}.norm1")
    yield from _attention(f"{native}.cross_attention", f"{foreign}.multihead_attn")
    yield Row(f"{native}.cross_attention_norm", f"{foreign}.norm2")
    yield Row(f"{native}.feedforward.0", f"{foreign}.linear1")
    yield Row(f"{native}.feedforward.3", f"{foreign}.linear2")
    yield Row(f"{native}.feedforward_norm", f"{foreign}.norm3")
    yield Row("transformer_decoder.norm", f"{prefix}.transformer.decoder.norm")
    yield Row("class_head", f"{prefix}.class_embed")
    for index in range(3):
        yield Row(f"mask_head.{2 * index}", f"{prefix}.mask_embed.layers.{index}")


def _attention(native: str, foreign: str) -> Iterator[Row]:
    for name in ("in_proj_weight", "in_proj_bias", "out_proj"):
        yield Row(f"{native}.{name}", f"{foreign}.{name}")


DETECTRON2 = Layout(
    "detectron2",
    [
        *_resnet("backbone."),
        *_swin(),
        *_pixel_decoder("sem_seg_head.pixel_decoder"),
        *_pixel_decoder("sem_seg_head"),  # names before version 2 of the head
        *_predictor("sem_seg_head.predictor"),
    ],
    leftovers=r"^criterion\.empty_weight$|^pixel_(mean|std)$",
)

DETECTRON2_BACKBONE = Layout("detectron2 backbone", list(_resnet("")), leftovers=r"^stem\.fc\.|^fc1000\.")
