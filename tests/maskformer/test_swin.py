"""Swin against Hugging Face's backbone for MaskFormer, at sizes where torchvision's own would differ."""

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import MaskFormerSwinConfig
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinBackbone

from maskformer import SWIN_B, SWIN_L, SWIN_S, SWIN_T, ModelConfig, build_model
from maskformer.backbone import ShiftedWindowAttention, Swin

DEPTHS, HEADS, WINDOW = (2, 2, 2, 2), (1, 2, 2, 4), 4

IN_A_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.0": "intermediate.dense",
    "mlp.3": "output.dense",
}


def peer() -> MaskFormerSwinBackbone:
    config = MaskFormerSwinConfig(embed_dim=16, depths=list(DEPTHS), num_heads=list(HEADS), window_size=WINDOW)
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    backbone = MaskFormerSwinBackbone(config).eval()
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.3)
    return backbone


def weights_of(backbone: MaskFormerSwinBackbone) -> dict[str, Tensor]:
    """Rename by hand: the tables of maskformer.weights have separate tests."""
    theirs, ours = backbone.state_dict(), {}
    for kind in ("weight", "bias"):
        ours[f"features.0.0.{kind}"] = theirs[f"model.embeddings.patch_embeddings.projection.{kind}"]
        ours[f"features.0.2.{kind}"] = theirs[f"model.embeddings.norm.{kind}"]
        for stage, depth in enumerate(DEPTHS):
            ours[f"norms.{stage}.{kind}"] = theirs[f"hidden_states_norms.{stage}.{kind}"]
            for index in range(depth):
                native, foreign = f"features.{2 * stage + 1}.{index}", f"model.encoder.layers.{stage}.blocks.{index}"
                for name, their_name in IN_A_BLOCK.items():
                    ours[f"{native}.{name}.{kind}"] = theirs[f"{foreign}.{their_name}.{kind}"]
                parts = [theirs[f"{foreign}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
                ours[f"{native}.attn.qkv.{kind}"] = torch.cat(parts)
                table = "relative_position_bias_table"
                ours[f"{native}.attn.{table}"] = theirs[f"{foreign}.attention.self.{table}"]
            if stage < 3:
                native, foreign = f"features.{2 * stage + 2}", f"model.encoder.layers.{stage}.downsample"
                ours[f"{native}.norm.{kind}"] = theirs[f"{foreign}.norm.{kind}"]
                ours[f"{native}.reduction.weight"] = theirs[f"{foreign}.reduction.weight"]
    return ours


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (16, 16), (17, 130), (130, 17), (4, 5), (1, 1), (71, 90)])
def test_features_are_those_of_the_peer(size: tuple[int, int]) -> None:
    """Odd sizes are padded, and windows are shifted on maps that one window covers in one direction or both."""
    torch.manual_seed(0)
    theirs = peer()
    ours = Swin(16, DEPTHS, HEADS, WINDOW, drop_path=0.0).eval()
    ours.load_state_dict(weights_of(theirs))
    images = torch.randn(2, 3, *size)
    for feature, expected in zip(ours(images), theirs(images).feature_maps, strict=True):
        torch.testing.assert_close(feature, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize(
    ("config", "backbone"), [(SWIN_T, 27_520_698), (SWIN_S, 48_838_602), (SWIN_B, 86_880_376), (SWIN_L, 195_201_204)]
)
def test_parameters(config: ModelConfig, backbone: int) -> None:
    """Swin-L's number is the published one; all have the common parts of the plain pyramid."""
    with torch.device("meta"):
        model = build_model(config)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sizes["backbone"] == backbone
    assert all(parameter.requires_grad for parameter in model.parameters())
    if config is SWIN_L:
        assert sum(sizes.values()) == 211_571_258
        assert sizes["pixel_decoder"] == 6_246_144 + 393_472


def test_drop_path_rises_linearly_over_all_blocks() -> None:
    with torch.device("meta"):
        model = build_model(SWIN_L)
    rates = [module.p for module in model.modules() if isinstance(module, StochasticDepth)]
    assert rates == pytest.approx([0.3 * block / 23 for block in range(24)])


def test_windows_are_shifted_in_every_other_block() -> None:
    with torch.device("meta"):
        model = build_model(SWIN_L)
    shifts = [m.shift_size for m in model.modules() if isinstance(m, ShiftedWindowAttention)]
    assert shifts == [[0, 0], [6, 6]] * 12
