"""Tensor names of mmdetection's MaskFormer, versions 2.x and 3.x.

Sources: mmdet/models/dense_heads/maskformer_head.py, layers/pixel_decoder.py, layers/transformer/detr_layers.py and
backbones/swin.py of 3.x. In 2.x the transformer layers are mmcv's generic ones, whose parts are numbered.
"""

from collections.abc import Iterator

from maskformer.weights.names import Layout, Row

_PIXEL = "panoptic_head.pixel_decoder"


def _resnet() -> Iterator[Row]:
    for name in ("conv1.*", "bn1.*", "layer{}.*"):
        yield Row(f"backbone.{name}", f"backbone.{name}")


def _swin() -> Iterator[Row]:
    yield Row("backbone.features.0.0", "backbone.patch_embed.projection")
    yield Row("backbone.features.0.2", "backbone.patch_embed.norm")
    for stage in range(4):
        native, foreign = f"backbone.features.{2 * stage + 1}.{{}}", f"backbone.stages.{stage}.blocks.{{}}"
        yield Row(f"{native}.norm1", f"{foreign}.norm1")
        for name in ("qkv", "proj", "relative_position_bias_table", "relative_position_index"):
            yield Row(f"{native}.attn.{name}", f"{foreign}.attn.w_msa.{name}")
        yield Row(f"{native}.norm2", f"{foreign}.norm2")
        yield Row(f"{native}.mlp.0", f"{foreign}.ffn.layers.0.0")
        yield Row(f"{native}.mlp.3", f"{foreign}.ffn.layers.1")
        yield Row(f"backbone.norms.{stage}", f"backbone.norm{stage}")
    for stage in range(3):
        native, foreign = f"backbone.features.{2 * stage + 2}", f"backbone.stages.{stage}.downsample"
        # mmdetection gathers the patches by nn.Unfold, which keeps the four pixels of a channel together.
        yield Row(f"{native}.norm", f"{foreign}.norm", channel_major=True)
        yield Row(f"{native}.reduction", f"{foreign}.reduction", channel_major=True)


def _head() -> Iterator[Row]:
    yield Row("pixel_decoder.projection", f"{_PIXEL}.encoder_in_proj", encoder=True)
    yield Row("pixel_decoder.projection", "panoptic_head.decoder_input_proj", encoder=False)
    yield Row("pixel_decoder.top.0", f"{_PIXEL}.encoder_out_proj.conv", encoder=True)
    yield Row("pixel_decoder.top.1", f"{_PIXEL}.encoder_out_proj.gn", encoder=True)
    yield Row("pixel_decoder.top.0", f"{_PIXEL}.last_feat_conv.conv", encoder=False)
    yield Row("pixel_decoder.top.1", f"{_PIXEL}.last_feat_conv.gn", encoder=False)
    for step in range(3):
        level = 2 - step  # mmdetection counts fine to coarse, the native names coarse to fine
        for native, foreign in (("laterals", "lateral_convs"), ("outputs", "output_convs")):
            yield Row(f"pixel_decoder.{native}.{step}.0", f"{_PIXEL}.{foreign}.{level}.conv")
            yield Row(f"pixel_decoder.{native}.{step}.1", f"{_PIXEL}.{foreign}.{level}.gn")
    yield Row("pixel_decoder.mask_features", f"{_PIXEL}.mask_feature")
    yield Row("query_embedding", "panoptic_head.query_embed")
    yield Row("transformer_decoder.norm", "panoptic_head.transformer_decoder.post_norm")
    yield Row("class_head", "panoptic_head.cls_embed")
    yield Row("mask_head.{}", "panoptic_head.mask_embed.{}")


def _layer(native: str, foreign: str, parts: dict[str, str]) -> Iterator[Row]:
    norms = [f"{part}_norm" for part in parts]
    for part, name in parts.items():
        if part == "feedforward":
            yield Row(f"{native}.feedforward.0", f"{foreign}.{name}.layers.0.0")
            yield Row(f"{native}.feedforward.3", f"{foreign}.{name}.layers.1")
        else:
            for tensor in ("in_proj_weight", "in_proj_bias", "out_proj"):
                yield Row(f"{native}.{part}.{tensor}", f"{foreign}.{name}.attn.{tensor}")
    for index, norm in enumerate(norms):
        yield Row(f"{native}.{norm}", f"{foreign}.norms.{index}")


def _layout(version: str, self_attention: str, cross_attention: str, feedforward: str) -> Layout:
    encoder = {"self_attention": self_attention, "feedforward": feedforward}
    decoder = {"self_attention": self_attention, "cross_attention": cross_attention, "feedforward": feedforward}
    return Layout(
        f"mmdet {version}",
        [
            *_resnet(),
            *_swin(),
            *_head(),
            *_layer("pixel_decoder.encoder.{}", f"{_PIXEL}.encoder.layers.{{}}", encoder),
            *_layer("transformer_decoder.layers.{}", "panoptic_head.transformer_decoder.layers.{}", decoder),
        ],
        leftovers=r"^data_preprocessor\.",
    )


MMDET_3 = _layout("3.x", "self_attn", "cross_attn", "ffn")
MMDET_2 = _layout("2.x", "attentions.0", "attentions.1", "ffns.0")
