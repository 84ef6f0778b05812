"""The tensor names of mmdetection's MaskFormer, versions 2.x and 3.x.

Sources: mmdet/models/dense_heads/maskformer_head.py, layers/pixel_decoder.py, layers/transformer/detr_layers.py and
backbones/swin.py of 3.x. In 2.x the transformer layers are mmcv's generic ones, which number their parts.
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
        own, foreign = f"backbone.features.{2 * stage + 1}.{{}}", f"backbone.stages.{stage}.blocks.{{}}"
        yield Row(f"{own}.norm1", f"{foreign}.norm1")
        for name in ("qkv", "proj", "relative_position_bias_table", "relative_position_index"):
            yield Row(f"{own}.attn.{name}", f"{foreign}.attn.w_msa.{name}")
        yield Row(f"{own}.norm2", f"{foreign}.norm2")
        yield Row(f"{own}.mlp.0", f"{foreign}.ffn.layers.0.0")
        yield Row(f"{own}.mlp.3", f"{foreign}.ffn.layers.1")
        yield Row(f"backbone.norms.{stage}", f"backbone.norm{stage}")
    for stage in range(3):
        own, foreign = f"backbone.features.{2 * stage + 2}", f"backbone.stages.{stage}.downsample"
        # The patches are gathered by nn.Unfold, which keeps a channel's four pixels together.
        yield Row(f"{own}.norm", f"{foreign}.norm", channel_major=True)
        yield Row(f"{own}.reduction", f"{foreign}.reduction", channel_major=True)


def _head() -> Iterator[Row]:
    yield Row("pixel_decoder.projection", f"{_PIXEL}.encoder_in_proj", encoder=True)
    yield Row("pixel_decoder.projection", "panoptic_head.decoder_input_proj", encoder=False)
    yield Row("pixel_decoder.top.0", f"{_PIXEL}.encoder_out_proj.conv", encoder=True)
    yield Row("pixel_decoder.top.1", f"{_PIXEL}.encoder_out_proj.gn", encoder=True)
    yield Row("pixel_decoder.top.0", f"{_PIXEL}.last_feat_conv.conv", encoder=False)
    yield Row("pixel_decoder.top.1", f"{_PIXEL}.last_feat_conv.gn", encoder=False)
    for step in range(3):
        level = 2 - step  # fine to coarse there, coarse to fine here
        for own, foreign in (("laterals", "lateral_convs"), ("outputs", "output_convs")):
            yield Row(f"pixel_decoder.{own}.{step}.0", f"{_PIXEL}.{foreign}.{level}.conv")
            yield Row(f"pixel_decoder.{own}.{step}.1", f"{_PIXEL}.{foreign}.{level}.gn")
    yield Row("pixel_decoder.mask_features", f"{_PIXEL}.mask_feature")
    yield Row("query_embedding", "panoptic_head.query_embed")
    yield Row("transformer_decoder.norm", "panoptic_head.transformer_decoder.post_norm")
    yield Row("class_head", "panoptic_head.cls_embed")
    yield Row("mask_head.{}", "panoptic_head.mask_embed.{}")


def _layer(own: str, foreign: str, parts: dict[str, str]) -> Iterator[Row]:
    norms = [f"{part}_norm" for part in parts]
    for part, name in parts.items():
        if part == "feedforward":
            yield Row(f"{own}.feedforward.0", f"{foreign}.{name}.layers.0.0")
            yield Row(f"{own}.feedforward.3", f"{foreign}.{name}.layers.1")
        else:
            for leaf in ("in_proj_weight", "in_proj_bias", "out_proj"):
                yield Row(f"{own}.{part}.{leaf}", f"{foreign}.{name}.attn.{leaf}")
    for index, norm in enumerate(norms):
        yield Row(f"{own}.{norm}", f"{foreign}.norms.{index}")


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
