"""Initial weights of a training."""

import io
from pathlib import Path

import pytest
import torch
import torchvision

from maskformer import ModelConfig, build_model, weights
from tests.maskformer.weights.foreign_names import (
    OFFICIAL_BLOCK,
    R50_SMALL,
    SWIN_SMALL,
    detectron2,
    fill,
    resnet50,
    swin,
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints"


def test_imagenet_is_the_resnet_of_torch_hub(hub: Path) -> None:
    reference = torchvision.models.resnet50()
    torch.save(reference.state_dict(), hub / "resnet50-0676ba61.pth")
    model = build_model(R50_SMALL)
    before = model.class_head.weight.clone()
    report = weights.initial_weights(model, "imagenet")
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in reference.state_dict().items() if "fc." not in name)
    assert torch.equal(model.class_head.weight, before)
    assert report.unused == ("fc.weight", "fc.bias")


def test_imagenet_is_the_official_swin(hub: Path) -> None:
    tensors = fill(swin(OFFICIAL_BLOCK, "layers.{}.downsample"))
    torch.save({"model": tensors}, hub / "swin_tiny_patch4_window7_224.pth")
    model = build_model(SWIN_SMALL)
    weights.initial_weights(model, "imagenet")
    loaded = model.backbone.state_dict()
    assert torch.equal(loaded["features.5.5.mlp.0.weight"], tensors["layers.2.blocks.5.mlp.fc1.weight"])
    assert torch.equal(loaded["norms.3.weight"], torch.ones(768))


@pytest.mark.parametrize(
    ("backbone", "file"),
    [
        ("resnet50", "resnet50-0676ba61.pth"),
        ("resnet101", "resnet101-63fe2227.pth"),
        ("swin_s", "swin_small_patch4_window7_224.pth"),
        ("swin_b", "swin_base_patch4_window12_384_22k.pth"),
        ("swin_l", "swin_large_patch4_window12_384_22k.pth"),
    ],
)
def test_an_empty_cache_names_the_file_and_its_url(backbone: str, file: str, hub: Path) -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(backbone=backbone))  # pyright: ignore[reportArgumentType]  # one of the literals
    with pytest.raises(ValueError, match=rf"are not at {hub}/{file}\. Download https://.*/{file} to this path"):
        weights.initial_weights(model, "imagenet")


def test_backbones_without_imagenet_weights() -> None:
    model = build_model(ModelConfig(backbone="small", hidden_dim=32, encoder_layers=0, decoder_layers=1))
    with pytest.raises(ValueError, match=r"no ImageNet weights for the backbone 'small'\. Use --weights none"):
        weights.initial_weights(model, "imagenet")


def test_a_complete_model_is_read_from_an_open_file() -> None:
    tensors = fill(detectron2(R50_SMALL))
    buffer = io.BytesIO()
    torch.save({"model": tensors}, buffer)
    buffer.seek(0)
    model = build_model(R50_SMALL)
    report = weights.initial_weights(model, buffer)
    assert report.missing == ()
    assert torch.equal(model.class_head.weight, tensors["sem_seg_head.predictor.class_embed.weight"])


def test_half_a_backbone_is_refused() -> None:
    tensors = {name: tensor for name, tensor in fill(resnet50()).items() if not name.startswith("layer4.2")}
    with pytest.raises(ValueError, match=r"does not fit the backbone resnet50: it lacks .*backbone\.layer4\.2\.conv1"):
        weights.initial_weights(build_model(R50_SMALL), tensors)


def test_uris_are_refused() -> None:
    with pytest.raises(ValueError, match="read from local files, got the URI s3://bucket/r50"):
        weights.initial_weights(build_model(R50_SMALL), "s3://bucket/r50.pth")
