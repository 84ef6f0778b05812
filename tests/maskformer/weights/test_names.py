"""The tables of names against complete checkpoints written from the foreign sources, and the layout of the values."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import PatchMerging

from maskformer import ModelConfig, build_model, weights
from maskformer.weights.architecture import recognize
from maskformer.weights.mmdet import MMDET_2, MMDET_3
from maskformer.weights.names import Layout
from maskformer.weights.reading import Weights
from tests.maskformer.weights.foreign_names import (
    OFFICIAL_BLOCK,
    R50_SMALL,
    SWIN_SMALL,
    Shapes,
    detectron2,
    detectron2_resnet,
    fill,
    mmdet,
    norm,
    resnet50,
    swin,
)


def expected(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build_model(config).state_dict()


COMPLETE = {
    "mmdet 3.x": (mmdet(3, R50_SMALL), R50_SMALL),
    "mmdet 2.x": (mmdet(2, R50_SMALL), R50_SMALL),
    "mmdet 3.x, Swin": (mmdet(3, SWIN_SMALL), SWIN_SMALL),
    "mmdet 2.x, Swin": (mmdet(2, SWIN_SMALL), SWIN_SMALL),
    "detectron2": (detectron2(R50_SMALL), R50_SMALL),
    "detectron2, old": (detectron2(R50_SMALL, old=True), R50_SMALL),
    "detectron2, Swin": (detectron2(SWIN_SMALL), SWIN_SMALL),
}


@pytest.mark.parametrize("name", COMPLETE)
def test_every_tensor_of_a_complete_checkpoint_has_a_native_name(name: str) -> None:
    shapes, config = COMPLETE[name]
    tensors = fill(shapes)
    assert weights.detect_config(tensors) == config
    state, report = weights.load(tensors, config)
    assert report.format == name.split(",")[0]
    assert report.missing == ()
    assert {name for name in report.unused if not name.endswith(("position_index", "empty_weight"))} == set()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in expected(config).items()
    }
    # No value was lost or taken twice, whatever it is called.
    unused = sum(tensors[name].double().sum() for name in report.unused)
    counters = sum(tensor.sum() for name, tensor in state.items() if name.endswith("num_batches_tracked"))
    total = sum(tensor.double().sum() for name, tensor in tensors.items() if not name.endswith("num_batches_tracked"))
    assert sum(tensor.double().sum() for tensor in state.values()) - counters == pytest.approx(float(total - unused))


REPRESENTATIVES = {
    "mmdet 3.x": {
        "backbone.layer2.1.bn2.running_var": "backbone.layer2.1.bn2.running_var",
        "panoptic_head.pixel_decoder.encoder_in_proj.weight": "pixel_decoder.projection.weight",
        "panoptic_head.pixel_decoder.encoder_out_proj.conv.weight": "pixel_decoder.top.0.weight",
        "panoptic_head.pixel_decoder.lateral_convs.2.conv.weight": "pixel_decoder.laterals.0.0.weight",
        "panoptic_head.pixel_decoder.output_convs.0.gn.bias": "pixel_decoder.outputs.2.1.bias",
        "panoptic_head.pixel_decoder.encoder.layers.1.self_attn.attn.in_proj_bias": (
            "pixel_decoder.encoder.1.self_attention.in_proj_bias"
        ),
        "panoptic_head.pixel_decoder.encoder.layers.0.norms.1.bias": "pixel_decoder.encoder.0.feedforward_norm.bias",
        "panoptic_head.transformer_decoder.layers.1.cross_attn.attn.out_proj.bias": (
            "transformer_decoder.layers.1.cross_attention.out_proj.bias"
        ),
        "panoptic_head.transformer_decoder.layers.0.norms.1.bias": (
            "transformer_decoder.layers.0.cross_attention_norm.bias"
        ),
        "panoptic_head.transformer_decoder.layers.0.norms.2.bias": "transformer_decoder.layers.0.feedforward_norm.bias",
        "panoptic_head.transformer_decoder.post_norm.weight": "transformer_decoder.norm.weight",
        "panoptic_head.mask_embed.2.weight": "mask_head.2.weight",
    },
    "mmdet 2.x": {
        "panoptic_head.transformer_decoder.layers.0.attentions.0.attn.in_proj_weight": (
            "transformer_decoder.layers.0.self_attention.in_proj_weight"
        ),
        "panoptic_head.transformer_decoder.layers.0.attentions.1.attn.in_proj_weight": (
            "transformer_decoder.layers.0.cross_attention.in_proj_weight"
        ),
        "panoptic_head.transformer_decoder.layers.1.ffns.0.layers.1.weight": (
            "transformer_decoder.layers.1.feedforward.3.weight"
        ),
    },
    "mmdet 3.x, Swin": {
        "backbone.stages.2.blocks.5.attn.w_msa.qkv.weight": "backbone.features.5.5.attn.qkv.weight",
        "backbone.stages.1.blocks.0.ffn.layers.0.0.bias": "backbone.features.3.0.mlp.0.bias",
        "backbone.norm3.weight": "backbone.norms.3.weight",
        "panoptic_head.decoder_input_proj.bias": "pixel_decoder.projection.bias",
        "panoptic_head.pixel_decoder.last_feat_conv.conv.weight": "pixel_decoder.top.0.weight",
    },
    "detectron2": {
        "backbone.stem.conv1.norm.running_mean": "backbone.bn1.running_mean",
        "backbone.res4.5.conv3.norm.weight": "backbone.layer3.5.bn3.weight",
        "backbone.res2.0.shortcut.norm.bias": "backbone.layer1.0.downsample.1.bias",
        "sem_seg_head.pixel_decoder.adapter_3.weight": "pixel_decoder.laterals.0.0.weight",
        "sem_seg_head.pixel_decoder.layer_4.norm.bias": "pixel_decoder.top.1.bias",
        "sem_seg_head.pixel_decoder.layer_1.weight": "pixel_decoder.outputs.2.0.weight",
        "sem_seg_head.pixel_decoder.input_proj.bias": "pixel_decoder.projection.bias",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.linear2.weight": (
            "pixel_decoder.encoder.1.feedforward.3.weight"
        ),
        "sem_seg_head.predictor.transformer.decoder.layers.0.multihead_attn.out_proj.weight": (
            "transformer_decoder.layers.0.cross_attention.out_proj.weight"
        ),
        "sem_seg_head.predictor.transformer.decoder.layers.1.norm3.bias": (
            "transformer_decoder.layers.1.feedforward_norm.bias"
        ),
        "sem_seg_head.predictor.mask_embed.layers.2.weight": "mask_head.4.weight",
    },
    "detectron2, old": {
        "sem_seg_head.adapter_1.norm.weight": "pixel_decoder.laterals.2.1.weight",
        "sem_seg_head.mask_features.weight": "pixel_decoder.mask_features.weight",
    },
    "detectron2, Swin": {
        "backbone.layers.0.downsample.reduction.weight": "backbone.features.2.reduction.weight",
        "backbone.layers.3.blocks.1.mlp.fc2.bias": "backbone.features.7.1.mlp.3.bias",
        "backbone.norm0.bias": "backbone.norms.0.bias",
        "sem_seg_head.predictor.input_proj.weight": "pixel_decoder.projection.weight",
    },
}


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_representatives_arrive_unchanged(name: str) -> None:
    shapes, config = COMPLETE[name]
    tensors = fill(shapes)
    state, _ = weights.load(tensors, config)
    for foreign, native in REPRESENTATIVES[name].items():
        assert torch.equal(state[native], tensors[foreign]), native


def test_both_layouts_of_mmdet_give_the_same_model() -> None:
    old, new = mmdet(2, R50_SMALL), mmdet(3, R50_SMALL)
    assert list(old.values()) == list(new.values())  # the same order, so the same seed draws the same model
    old_state, _ = weights.load(fill(old), R50_SMALL)
    new_state, _ = weights.load(fill(new), R50_SMALL)
    assert old_state.keys() == new_state.keys()
    assert all(torch.equal(old_state[name], new_state[name]) for name in new_state)


def test_counters_missing_in_detectron2_start_at_zero() -> None:
    state, report = weights.load(fill(detectron2(R50_SMALL)), R50_SMALL)
    counters = [tensor for name, tensor in state.items() if name.endswith("num_batches_tracked")]
    assert len(counters) == 53
    assert all(torch.equal(counter, torch.tensor(0)) for counter in counters)
    assert report.reshaped == ()


def test_patch_merging_of_mmdet_computes_the_same() -> None:
    """mmdetection gathers the four pixels by nn.Unfold."""
    torch.manual_seed(0)
    channels, height, width = 96, 6, 4
    tensors = fill(mmdet(3, SWIN_SMALL))
    state, report = weights.load(tensors, SWIN_SMALL)
    images = torch.randn(2, channels, height, width)

    foreign_prefix = "backbone.stages.0.downsample."
    gathered = F.unfold(images, kernel_size=2, stride=2).transpose(1, 2)
    gathered = F.layer_norm(
        gathered, (4 * channels,), tensors[f"{foreign_prefix}norm.weight"], tensors[f"{foreign_prefix}norm.bias"]
    )
    theirs = F.linear(gathered, tensors[f"{foreign_prefix}reduction.weight"])

    merging = PatchMerging(channels, nn.LayerNorm)
    prefix = "backbone.features.2."
    merging.load_state_dict(
        {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    )
    ours = merging(images.permute(0, 2, 3, 1)).flatten(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-5)
    assert {name for name in report.reshaped if name.startswith(prefix)} == {
        f"{prefix}norm.weight",
        f"{prefix}norm.bias",
        f"{prefix}reduction.weight",
    }


def classifier(shapes: Shapes, head: str, channels: int) -> Shapes:
    return {**shapes, f"{head}.weight": (1000, channels), f"{head}.bias": (1000,)}


OFFICIAL = classifier({**swin(OFFICIAL_BLOCK, "layers.{}.downsample"), **norm("norm", 768)}, "head", 768)
BACKBONES = {
    "torchvision": (resnet50(), R50_SMALL),
    "Swin": ({**OFFICIAL, "layers.0.blocks.1.attn_mask": (64, 49, 49)}, SWIN_SMALL),
    "timm": (
        classifier(
            {
                # The merging belongs to the stage after it.
                name.replace("layers.2.down", "layers.3.down")
                .replace("layers.1.down", "layers.2.down")
                .replace("layers.0.down", "layers.1.down"): shape
                for name, shape in swin(OFFICIAL_BLOCK, "layers.{}.downsample").items()
            },
            "head.fc",
            768,
        ),
        SWIN_SMALL,
    ),
    "detectron2 backbone": (classifier(detectron2_resnet(""), "stem.fc", 2048), R50_SMALL),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_backbone_gives_every_native_tensor_but_the_output_norms(name: str) -> None:
    shapes, config = BACKBONES[name]
    state, report = weights.load(fill(shapes), config)
    native = [
        native
        for native in expected(config)
        if native.startswith("backbone.") and not native.startswith("backbone.norms.")
    ]
    assert report.format == name
    assert list(state) == native
    assert set(report.missing) == expected(config).keys() - set(native)
    assert all(
        unused.startswith(("fc.", "head.", "norm.", "stem.fc.")) or unused.endswith(("_index", "attn_mask"))
        for unused in report.unused
    )


@pytest.mark.parametrize(("name", "first"), [("Swin", 0), ("timm", 1)])
def test_the_merging_is_between_the_right_stages(name: str, first: int) -> None:
    tensors = fill(BACKBONES[name][0])
    state, _ = weights.load(tensors, SWIN_SMALL)
    for stage in range(3):
        theirs = tensors[f"layers.{stage + first}.downsample.reduction.weight"]
        assert torch.equal(state[f"backbone.features.{2 * stage + 2}.reduction.weight"], theirs)


def test_torchvision_swin() -> None:
    """The native names are those of torchvision."""
    native = {name: tensor for name, tensor in expected(SWIN_SMALL).items() if name.startswith("backbone.features.")}
    tensors = fill({name.removeprefix("backbone."): tuple(tensor.shape) for name, tensor in native.items()})
    state, report = weights.load({**tensors, "norm.weight": torch.ones(768)}, SWIN_SMALL)
    assert report.format == "torchvision"
    assert {name.removeprefix("backbone.") for name in state} == tensors.keys()


@pytest.mark.parametrize("layout", [MMDET_2, MMDET_3], ids=lambda layout: layout.name)
@pytest.mark.parametrize("config", [R50_SMALL, SWIN_SMALL], ids=lambda config: config.backbone)
def test_every_native_tensor_has_one_name_in_mmdet(layout: Layout, config: ModelConfig) -> None:
    """Otherwise export would depend on the order of the rows."""
    for name in expected(config):
        rows = [row for row in layout.rows if row.native_regex.fullmatch(name)]
        assert sum(row.encoder in (None, config.encoder_layers > 0) for row in rows) == 1, name


def test_an_incomplete_attention_is_refused() -> None:
    names = [f"model.transformer_module.decoder.layers.0.self_attn.{letter}_proj.weight" for letter in "qk"]
    with pytest.raises(ValueError, match=r"The state dict has .*q_proj.weight.* but not all of query, key and value"):
        weights.load({name: torch.zeros(32, 32) for name in names}, SWIN_SMALL)


@pytest.mark.parametrize(
    "shapes",
    [
        {"backbone.stages.0.downsample.norm.weight": (10,)},
        {
            f"model.transformer_module.decoder.layers.0.self_attn.{part}_proj.weight": (8, 8 + (part == "v"))
            for part in "qkv"
        },
    ],
)
def test_shapes_that_cannot_be_rearranged_are_refused(shapes: Shapes) -> None:
    with pytest.raises(ValueError, match=rf"does not fit the model: {next(iter(shapes))}.* with the shape \((10|8)"):
        weights.load(fill(shapes), SWIN_SMALL)


def test_two_names_for_one_tensor_are_refused() -> None:
    names = ("sem_seg_head.mask_features.weight", "sem_seg_head.pixel_decoder.mask_features.weight")
    with pytest.raises(ValueError, match=r"pixel_decoder\.mask_features\.weight twice, as sem_seg_head"):
        weights.load({name: torch.zeros(1) for name in names}, R50_SMALL)


def test_export_is_the_inverse_of_import() -> None:
    tensors = fill({name: shape for name, shape in mmdet(3, SWIN_SMALL).items() if not name.endswith("_index")})
    state, _ = weights.load(tensors, SWIN_SMALL)
    again = MMDET_3.to_foreign(state, encoder=False)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no tensor of a MaskFormer or of its backbones; its names begin with encoder"):
        recognize(Weights("The file", {"encoder.weight": torch.zeros(1)}))
