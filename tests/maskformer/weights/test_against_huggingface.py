"""Equal weights give equal logits in transformers' MaskFormer, in both directions."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskformer import MaskFormer, ModelConfig, build_model, weights

transformers: Any = pytest.importorskip("transformers", reason="transformers is a test-only dependency")

STAGES = ["stage1", "stage2", "stage3", "stage4"]
BACKBONES = {
    "swin_t": lambda: transformers.SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, out_features=STAGES
    ),
    "resnet50": lambda: transformers.ResNetConfig(out_features=STAGES),
}
SMALL: dict[str, Any] = {"num_queries": 7, "hidden_dim": 64, "num_heads": 4, "feedforward_dim": 48, "decoder_layers": 2}


@pytest.fixture(scope="module", params=BACKBONES)
def theirs(request: pytest.FixtureRequest) -> nn.Module:
    decoder = {
        "model_type": "detr",
        "d_model": 64,
        "decoder_layers": 2,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "encoder_attention_heads": 4,
        "num_queries": 7,
    }
    names = ["cat", "dog", "cow", "pig", "sea"]
    config = transformers.MaskFormerConfig(
        fpn_feature_size=64,
        mask_feature_size=64,
        backbone_config=BACKBONES[request.param](),
        decoder_config=decoder,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    torch.manual_seed(0)
    model = transformers.MaskFormerForInstanceSegmentation(config).eval()
    # Initially every norm is the identity, and every bias and position table is zero.
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if "encoder.model.layernorm" in name or not tensor.is_floating_point() or "empty_weight" in name:
            continue
        if name.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.dim() == 1:
            nn.init.normal_(tensor, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
        elif "relative_position" in name:
            nn.init.normal_(tensor)
    return model


@pytest.fixture(scope="module")
def folder(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "theirs"
    theirs.save_pretrained(folder)  # pyright: ignore[reportCallIssue]  # of transformers, not of nn.Module
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> MaskFormer:
    file = weights.read(folder)
    config = weights.detect_config(file)
    state, report = weights.load(file, config)
    report.require_complete()
    assert all(name.endswith(("_index", "empty_weight", "model.layernorm.weight", "bias")) for name in report.unused)
    model = build_model(config).eval()
    model.load_state_dict(state)
    return model


def test_the_architecture_is_detected(ours: MaskFormer) -> None:
    assert dataclasses.replace(ours.config, drop_path=0.0) == ModelConfig(
        backbone=ours.config.backbone, num_classes=5, encoder_layers=0, **SMALL
    )


@torch.no_grad()
def deviation(ours: nn.Module, theirs: nn.Module, size: tuple[int, int]) -> list[float]:
    """Return the largest difference of class and mask logits, in their standard deviations."""
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    mine, other = ours(images), theirs(images)
    pairs = ((mine.class_logits, other.class_queries_logits), (mine.mask_logits, other.masks_queries_logits))
    return [float((native[-1] - their).abs().max() / their.std()) for native, their in pairs]


@pytest.mark.parametrize("size", [(33, 47), (17, 130), (64, 64)])
def test_the_logits_are_equal(size: tuple[int, int], ours: MaskFormer, theirs: nn.Module) -> None:
    assert max(deviation(ours, theirs, size)) < 1e-4  # measured: 1e-5


def test_their_names_in_memory_are_known_too(ours: MaskFormer, theirs: nn.Module) -> None:
    state, report = weights.load(dict(theirs.state_dict()), ours.config)
    assert report.format == "huggingface"
    native = ours.state_dict()
    assert state.keys() == native.keys()
    assert all(torch.equal(state[name], native[name]) for name in native)


def test_a_saved_model_loads_in_transformers_without_warnings(
    ours: MaskFormer, theirs: nn.Module, folder: Path, tmp_path: Path
) -> None:
    weights.save(ours, tmp_path / "ours", "huggingface")
    model, info = transformers.MaskFormerForInstanceSegmentation.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert {key: set(problems) for key, problems in info.items() if problems} == {}
    assert max(deviation(ours, model.eval(), (37, 50))) < 1e-4
    original, again = (weights.read(path).tensors for path in (folder, tmp_path / "ours"))
    assert original.keys() == again.keys()
    assert all(torch.equal(original[name], again[name]) for name in original)

    def sizes(config: Any) -> list[object]:
        decoder, backbone = config.decoder_config, config.backbone_config
        common = [config.num_labels, config.fpn_feature_size, config.mask_feature_size, list(backbone.depths)]
        return [*common, decoder.d_model, decoder.decoder_layers, decoder.decoder_attention_heads, decoder.num_queries]

    assert sizes(model.config) == sizes(theirs.config)


def test_their_image_processor_gets_the_native_sizes(ours: MaskFormer, tmp_path: Path) -> None:
    weights.save(ours, tmp_path / "ours", "huggingface")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    image = torch.randint(0, 256, (3, 60, 93), dtype=torch.uint8)
    pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 800, 1240)
    mean, std = (torch.tensor(values)[:, None, None] for values in (ours.config.pixel_mean, ours.config.pixel_std))
    expected = nn.functional.interpolate(image[None].float(), (800, 1240), mode="bilinear")
    torch.testing.assert_close(pixels[0], (expected[0] - mean) / std, atol=0.02, rtol=0)


def test_class_names_are_written_and_read(ours: MaskFormer, folder: Path, tmp_path: Path) -> None:
    assert weights.class_names(weights.read(folder)) == ("cat", "dog", "cow", "pig", "sea")
    weights.save(ours, tmp_path / "ours", "huggingface")
    labels = json.loads((tmp_path / "ours" / "config.json").read_text())["id2label"]
    assert labels["4"] == "LABEL_4"
