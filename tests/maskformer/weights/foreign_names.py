"""The tensors of other codes' checkpoints by name, written from their sources and not from the tables under test."""

import re
from collections.abc import Mapping

import torch
import torchvision
from torch import Tensor

from maskformer import ModelConfig

QUERIES, CLASSES, HIDDEN, FEEDFORWARD = 3, 4, 32, 16
WINDOW = 7
DEPTHS, CHANNELS, HEADS = (2, 2, 6, 2), (96, 192, 384, 768), (3, 6, 12, 24)

R50_SMALL = ModelConfig(
    num_classes=CLASSES,
    num_queries=QUERIES,
    hidden_dim=HIDDEN,
    feedforward_dim=FEEDFORWARD,
    encoder_layers=2,
    decoder_layers=2,
)
SWIN_SMALL = ModelConfig(
    backbone="swin_t",
    num_classes=CLASSES,
    num_queries=QUERIES,
    hidden_dim=HIDDEN,
    feedforward_dim=FEEDFORWARD,
    encoder_layers=0,
    decoder_layers=2,
    drop_path=0.3,
)

Shapes = dict[str, tuple[int, ...]]


def fill(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of these shapes; the constants of a Swin's windows and counters are integers."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: window_index()
        if name.endswith("relative_position_index")
        else torch.tensor(7)
        if name.endswith("num_batches_tracked")
        else torch.rand(shape, generator=generator)
        for name, shape in shapes.items()
    }


def window_index() -> Tensor:
    """Return the relative position index by its definition, cell by cell."""
    cells = [(y, x) for y in range(WINDOW) for x in range(WINDOW)]
    return torch.tensor(
        [[(y - v + WINDOW - 1) * (2 * WINDOW - 1) + (x - u + WINDOW - 1) for v, u in cells] for y, x in cells]
    )


def both(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def norm(name: str, channels: int) -> Shapes:
    return both(name, channels)


def resnet50() -> Shapes:
    """Return torchvision's ResNet-50."""
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def swin(block: Mapping[str, str], merging: str, prefix: str = "", embed: str = "patch_embed.proj") -> Shapes:
    """Return a Swin-T with the names of `block` for its parts; `merging` has a {} for the stage that it follows."""
    shapes = {**both(f"{prefix}{embed}", 96, 3, 4, 4), **norm(f"{prefix}patch_embed.norm", 96)}
    for stage, (depth, channels, heads) in enumerate(zip(DEPTHS, CHANNELS, HEADS, strict=True)):
        for index in range(depth):
            name = {part: f"{prefix}{block['block'].format(stage, index)}.{name}" for part, name in block.items()}
            shapes |= norm(name["norm1"], channels) | norm(name["norm2"], channels)
            shapes |= both(name["qkv"], 3 * channels, channels) | both(name["proj"], channels, channels)
            shapes |= both(name["in"], 4 * channels, channels) | both(name["out"], channels, 4 * channels)
            shapes[name["table"] + "_bias_table"] = ((2 * WINDOW - 1) ** 2, heads)
            shapes[name["table"] + "_index"] = (WINDOW**2, WINDOW**2)
        if stage < 3:
            merging_name = f"{prefix}{merging.format(stage)}"
            shapes |= norm(f"{merging_name}.norm", 4 * channels) | {
                f"{merging_name}.reduction.weight": (2 * channels, 4 * channels)
            }
    return shapes


OFFICIAL_BLOCK = {
    "block": "layers.{}.blocks.{}",
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "table": "attn.relative_position",
    "norm2": "norm2",
    "in": "mlp.fc1",
    "out": "mlp.fc2",
}
MMDET_BLOCK = {
    "block": "stages.{}.blocks.{}",
    "norm1": "norm1",
    "qkv": "attn.w_msa.qkv",
    "proj": "attn.w_msa.proj",
    "table": "attn.w_msa.relative_position",
    "norm2": "norm2",
    "in": "ffn.layers.0.0",
    "out": "ffn.layers.1",
}


def output_norms(prefix: str) -> Shapes:
    shapes: Shapes = {}
    for stage, channels in enumerate(CHANNELS):
        shapes |= norm(f"{prefix}norm{stage}", channels)
    return shapes


def attention(name: str) -> Shapes:
    packed = {f"{name}.in_proj_weight": (3 * HIDDEN, HIDDEN), f"{name}.in_proj_bias": (3 * HIDDEN,)}
    return packed | both(f"{name}.out_proj", HIDDEN, HIDDEN)


def mmdet(version: int, config: ModelConfig) -> Shapes:
    """Return the MaskFormer of mmdetection 2.x or 3.x."""
    encoder = config.encoder_layers > 0
    if config.backbone == "resnet50":
        channels = (256, 512, 1024, 2048)
        shapes = {f"backbone.{name}": shape for name, shape in resnet50().items() if not name.startswith("fc.")}
    else:
        channels = CHANNELS
        shapes = swin(MMDET_BLOCK, "stages.{}.downsample", "backbone.", "patch_embed.projection")
        shapes |= output_norms("backbone.")
    head, pixel = "panoptic_head", "panoptic_head.pixel_decoder"

    def conv_module(name: str, *shape: int) -> Shapes:
        return {f"{name}.conv.weight": shape, **norm(f"{name}.gn", HIDDEN)}

    for level in range(3):
        shapes |= conv_module(f"{pixel}.lateral_convs.{level}", HIDDEN, channels[level], 1, 1)
        shapes |= conv_module(f"{pixel}.output_convs.{level}", HIDDEN, HIDDEN, 3, 3)
    shapes |= both(f"{pixel}.mask_feature", HIDDEN, HIDDEN, 3, 3)
    if encoder:
        shapes |= both(f"{pixel}.encoder_in_proj", HIDDEN, 2048, 1, 1)
        shapes |= conv_module(f"{pixel}.encoder_out_proj", HIDDEN, HIDDEN, 3, 3)
    else:
        shapes |= both(f"{head}.decoder_input_proj", HIDDEN, channels[3], 1, 1)
        shapes |= conv_module(f"{pixel}.last_feat_conv", HIDDEN, channels[3], 3, 3)
    attentions = {2: ("attentions.0", "attentions.1"), 3: ("self_attn", "cross_attn")}[version]
    feedforward = {2: "ffns.0", 3: "ffn"}[version]
    layers = [(f"{head}.transformer_decoder.layers.{index}", 2) for index in range(config.decoder_layers)]
    layers += [(f"{pixel}.encoder.layers.{index}", 1) for index in range(config.encoder_layers)]
    for layer, count in layers:
        for name in attentions[:count]:
            shapes |= attention(f"{layer}.{name}.attn")
        shapes |= both(f"{layer}.{feedforward}.layers.0.0", FEEDFORWARD, HIDDEN)
        shapes |= both(f"{layer}.{feedforward}.layers.1", HIDDEN, FEEDFORWARD)
        for index in range(count + 1):
            shapes |= norm(f"{layer}.norms.{index}", HIDDEN)
    shapes |= norm(f"{head}.transformer_decoder.post_norm", HIDDEN)
    shapes[f"{head}.query_embed.weight"] = (QUERIES, HIDDEN)
    shapes |= both(f"{head}.cls_embed", CLASSES + 1, HIDDEN)
    for index in (0, 2, 4):
        shapes |= both(f"{head}.mask_embed.{index}", HIDDEN, HIDDEN)
    return shapes


def detectron2_resnet(prefix: str) -> Shapes:
    """Return detectron2's ResNet-50, whose batch norms hang below their convolutions and do not count."""
    shapes: Shapes = {}
    for name, shape in resnet50().items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        new = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        new = re.sub(r"bn(\d)", r"conv\1.norm", new).replace("downsample.0", "shortcut")
        new = new.replace("downsample.1", "shortcut.norm")
        shapes[prefix + (new if new.startswith("res") else f"stem.{new}")] = shape
    return shapes


def detectron2(config: ModelConfig, old: bool = False) -> Shapes:
    """Return the original MaskFormer; `old` is the version before the pixel decoder was a separate module."""
    encoder = config.encoder_layers > 0
    if config.backbone == "resnet50":
        channels, shapes = (256, 512, 1024, 2048), detectron2_resnet("backbone.")
    else:
        channels = CHANNELS
        shapes = swin(OFFICIAL_BLOCK, "layers.{}.downsample", "backbone.") | output_norms("backbone.")
    pixel = "sem_seg_head" if old else "sem_seg_head.pixel_decoder"
    predictor = "sem_seg_head.predictor"
    for level in range(1, 4):
        shapes |= {f"{pixel}.adapter_{level}.weight": (HIDDEN, channels[level - 1], 1, 1)}
        shapes |= norm(f"{pixel}.adapter_{level}.norm", HIDDEN)
    for level in range(1, 5):
        width = channels[3] if level == 4 and not encoder else HIDDEN
        shapes |= {f"{pixel}.layer_{level}.weight": (HIDDEN, width, 3, 3)}
        shapes |= norm(f"{pixel}.layer_{level}.norm", HIDDEN)
    shapes |= both(f"{pixel}.mask_features", HIDDEN, HIDDEN, 3, 3)
    shapes |= both(f"{pixel if encoder else predictor}.input_proj", HIDDEN, channels[3], 1, 1)
    layers = [(f"{predictor}.transformer.decoder.layers.{index}", 2) for index in range(config.decoder_layers)]
    layers += [(f"{pixel}.transformer.encoder.layers.{index}", 1) for index in range(config.encoder_layers)]
    for layer, count in layers:
        for name in ("self_attn", "multihead_attn")[:count]:
            shapes |= attention(f"{layer}.{name}")
        shapes |= both(f"{layer}.linear1", FEEDFORWARD, HIDDEN) | both(f"{layer}.linear2", HIDDEN, FEEDFORWARD)
        for index in range(1, count + 2):
            shapes |= norm(f"{layer}.norm{index}", HIDDEN)
    shapes |= norm(f"{predictor}.transformer.decoder.norm", HIDDEN)
    shapes[f"{predictor}.query_embed.weight"] = (QUERIES, HIDDEN)
    shapes |= both(f"{predictor}.class_embed", CLASSES + 1, HIDDEN)
    for index in range(3):
        shapes |= both(f"{predictor}.mask_embed.layers.{index}", HIDDEN, HIDDEN)
    return shapes | {"criterion.empty_weight": (CLASSES + 1,)}
