"""Tensor names and configuration of transformers' MaskFormerForInstanceSegmentation.

Sources: transformers/models/maskformer and models/resnet. The names that `save_pretrained` writes may differ from those
of the modules in memory (`out_proj` and `fc1` on disk, `o_proj` and `mlp.fc1` in memory since version 5).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from maskformer.config import LossConfig, ModelConfig
from maskformer.taxonomy import Taxonomy
from maskformer.weights.model_card import ModelDetails
from maskformer.weights.names import Layout, Row

_BACKBONE = "model.pixel_level_module.encoder"
_PYRAMID = "model.pixel_level_module.decoder.fpn"
_TRANSFORMER = "model.transformer_module"


def _resnet() -> Iterator[Row]:
    for name, native in (("convolution", "conv"), ("normalization", "bn")):
        yield Row(f"backbone.{native}1", f"{_BACKBONE}.embedder.embedder.{name}")
    for stage in range(4):
        block, foreign = f"backbone.layer{stage + 1}.{{}}", f"{_BACKBONE}.encoder.stages.{stage}.layers.{{}}"
        for index in range(3):
            yield Row(f"{block}.conv{index + 1}", f"{foreign}.layer.{index}.convolution")
            yield Row(f"{block}.bn{index + 1}", f"{foreign}.layer.{index}.normalization")
        yield Row(f"{block}.downsample.0", f"{foreign}.shortcut.convolution")
        yield Row(f"{block}.downsample.1", f"{foreign}.shortcut.normalization")


def _swin() -> Iterator[Row]:
    yield Row("backbone.features.0.0", f"{_BACKBONE}.model.embeddings.patch_embeddings.projection")
    yield Row("backbone.features.0.2", f"{_BACKBONE}.model.embeddings.norm")
    for stage in range(4):
        native = f"backbone.features.{2 * stage + 1}.{{}}"
        foreign = f"{_BACKBONE}.model.encoder.layers.{stage}.blocks.{{}}"
        yield Row(f"{native}.norm1", f"{foreign}.layernorm_before")
        for kind in ("weight", "bias"):
            query, key, value = (f"{foreign}.attention.self.{part}.{kind}" for part in ("query", "key", "value"))
            yield Row(f"{native}.attn.qkv.{kind}", (query, key, value))
        for name in ("relative_position_bias_table", "relative_position_index"):
            yield Row(f"{native}.attn.{name}", f"{foreign}.attention.self.{name}")
        yield Row(f"{native}.attn.proj", f"{foreign}.attention.output.dense")
        yield Row(f"{native}.norm2", f"{foreign}.layernorm_after")
        yield Row(f"{native}.mlp.0", f"{foreign}.intermediate.dense")
        yield Row(f"{native}.mlp.3", f"{foreign}.output.dense")
        yield Row(f"backbone.norms.{stage}", f"{_BACKBONE}.hidden_states_norms.{stage}")
    for stage in range(3):
        for name in ("norm", "reduction"):
            native = f"backbone.features.{2 * stage + 2}.{name}"
            yield Row(native, f"{_BACKBONE}.model.encoder.layers.{stage}.downsample.{name}")


def _pixel_decoder() -> Iterator[Row]:
    yield Row("pixel_decoder.projection", f"{_TRANSFORMER}.input_projection", encoder=False)
    yield Row("pixel_decoder.top.{}", f"{_PYRAMID}.stem.{{}}", encoder=False)
    for step in range(3):  # both count coarse to fine
        yield Row(f"pixel_decoder.laterals.{step}.{{}}", f"{_PYRAMID}.layers.{step}.proj.{{}}")
        yield Row(f"pixel_decoder.outputs.{step}.{{}}", f"{_PYRAMID}.layers.{step}.block.{{}}")
    yield Row("pixel_decoder.mask_features", "model.pixel_level_module.decoder.mask_projection")


def _decoder() -> Iterator[Row]:
    native, foreign = "transformer_decoder.layers.{}", f"{_TRANSFORMER}.decoder.layers.{{}}"
    for native_part, part in (("self_attention", "self_attn"), ("cross_attention", "encoder_attn")):
        for kind in ("weight", "bias"):
            query, key, value = (f"{foreign}.{part}.{letter}_proj.{kind}" for letter in "qkv")
            yield Row(f"{native}.{native_part}.in_proj_{kind}", (query, key, value))
        for name in ("out_proj", "o_proj"):  # export uses the first
            yield Row(f"{native}.{native_part}.out_proj", f"{foreign}.{part}.{name}")
        yield Row(f"{native}.{native_part}_norm", f"{foreign}.{part}_layer_norm")
    for prefix in ("", "mlp."):  # export uses the first
        yield Row(f"{native}.feedforward.0", f"{foreign}.{prefix}fc1")
        yield Row(f"{native}.feedforward.3", f"{foreign}.{prefix}fc2")
    yield Row(f"{native}.feedforward_norm", f"{foreign}.final_layer_norm")
    yield Row("transformer_decoder.norm", f"{_TRANSFORMER}.decoder.layernorm")
    yield Row("query_embedding", f"{_TRANSFORMER}.queries_embedder")
    yield Row("class_head", "class_predictor")
    for index in range(3):
        yield Row(f"mask_head.{2 * index}", f"mask_embedder.{index}.0")


HUGGINGFACE = Layout(
    "huggingface",
    [*_resnet(), *_swin(), *_pixel_decoder(), *_decoder()],
    leftovers=r"^criterion\.empty_weight$|\.encoder\.model\.layernorm\.",  # a norm that transformers never applies
)


def constants(config: ModelConfig) -> dict[str, Tensor]:
    """Return the constant tensors that `from_pretrained` expects in addition to the weights."""
    constants = {"criterion.empty_weight": torch.ones(config.num_classes + 1)}
    constants["criterion.empty_weight"][-1] = LossConfig().no_object_weight
    if config.backbone in _SWINS:
        channels = 8 * _SWINS[config.backbone]["embed_dim"]
        constants[f"{_BACKBONE}.model.layernorm.weight"] = torch.ones(channels)
        constants[f"{_BACKBONE}.model.layernorm.bias"] = torch.zeros(channels)
    return constants


def _swin_config(embed_dim: int, depths: list[int], num_heads: list[int], window_size: int) -> dict[str, Any]:
    return {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": window_size}


_SWINS = {
    "swin_t": _swin_config(96, [2, 2, 6, 2], [3, 6, 12, 24], 7),
    "swin_s": _swin_config(96, [2, 2, 18, 2], [3, 6, 12, 24], 7),
    "swin_b": _swin_config(128, [2, 2, 18, 2], [4, 8, 16, 32], 12),
    "swin_l": _swin_config(192, [2, 2, 18, 2], [6, 12, 24, 48], 12),
}
_RESNETS: Mapping[str, dict[str, Any]] = {
    "resnet50": {"depths": [3, 4, 6, 3]},
    "resnet101": {"depths": [3, 4, 23, 3]},
}


def model_json(config: ModelConfig, taxonomy: Taxonomy | None) -> dict[str, Any]:
    """Return the content of `config.json`.

    transformers keeps the fields that it does not know: `label_ids_to_fuse`, the classes of stuff, has the name of an
    argument of its panoptic post-processing, and `categories` is the taxonomy in COCO's form.

    Raises:
        ValueError: transformers cannot build such a model.
    """
    if config.encoder_layers:
        raise ValueError(
            f"transformers' MaskFormer has no transformer encoder in its pixel decoder, this model has "
            f"{config.encoder_layers} encoder layers. Only models with encoder_layers 0 can be written in this format; "
            f"write this one in a format of mmdetection."
        )
    if config.backbone in _SWINS:
        backbone = {"model_type": "swin", "drop_path_rate": config.drop_path, **_SWINS[config.backbone]}
    elif config.backbone in _RESNETS:
        backbone = {"model_type": "resnet", **_RESNETS[config.backbone]}
    else:
        raise ValueError(
            f"transformers' MaskFormer has no backbone {config.backbone!r}, only ResNets and Swins. Write this model "
            f"in the native format."
        )
    if config.hidden_dim % 32:
        raise ValueError(
            f"transformers' pixel decoder normalizes 32 groups of channels, so hidden_dim must be a multiple of 32, "
            f"got {config.hidden_dim}. Write this model in the native format."
        )
    names, stuff = tuple(f"LABEL_{index}" for index in range(config.num_classes)), list[int]()
    if taxonomy is not None:
        names, stuff = taxonomy.names, list(range(taxonomy.num_things, taxonomy.num_classes))
    return {
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "model_type": "maskformer",
        "backbone_config": {**backbone, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        "decoder_config": {
            "model_type": "detr",
            "d_model": config.hidden_dim,
            "num_queries": config.num_queries,
            "encoder_layers": 0,
            "decoder_layers": config.decoder_layers,
            "encoder_attention_heads": config.num_heads,
            "decoder_attention_heads": config.num_heads,
            "decoder_ffn_dim": config.feedforward_dim,
            "dropout": config.dropout,
            "attention_dropout": config.dropout,
            "activation_dropout": config.decoder_feedforward_dropout,
        },
        "fpn_feature_size": config.hidden_dim,
        "mask_feature_size": config.hidden_dim,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
        "label_ids_to_fuse": stuff,
        **({} if taxonomy is None else {"categories": taxonomy.to_coco()}),
        "dtype": "float32",
    }


def processor_json(config: ModelConfig, details: ModelDetails) -> dict[str, Any]:
    """Return the content of `preprocessor_config.json`: the preprocessing with which the model is evaluated."""
    return {
        "image_processor_type": "MaskFormerImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": details.short_side, "longest_edge": details.long_side},
        "size_divisor": 0,  # the default of 32 would change the aspect ratio
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in config.pixel_mean],
        "image_std": [value / 255 for value in config.pixel_std],
        "ignore_index": 255,
        "do_reduce_labels": False,
        "num_labels": config.num_classes,
    }
