"""The network: its published size, its shapes, and its parts against slow or independent definitions."""

import dataclasses
import math
from functools import partial

import jaxtyping
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from maskformer.backbone import Bottleneck, FrozenBatchNorm2d, ResNet, Swin
from maskformer.config import DEMO, R50, SWIN_T, ModelConfig
from maskformer.model import build_model
from maskformer.pixel_decoder import PixelDecoder
from maskformer.small_backbone import SmallBackbone
from maskformer.transformer import sine_positions

TINY = ModelConfig(
    backbone="small",
    num_classes=5,
    num_queries=6,
    hidden_dim=32,
    num_heads=4,
    feedforward_dim=48,
    encoder_layers=1,
    decoder_layers=2,
)
TINY_PLAIN = dataclasses.replace(TINY, encoder_layers=0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def size_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# ---- size


def test_r50_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = build_model(R50)
    assert {name: size_of(part) for name, part in model.named_children()} == {
        "backbone": 23_508_032,
        "pixel_decoder": 11_826_688,
        "query_embedding": 25_600,
        "transformer_decoder": 9_473_024,
        "class_head": 34_438,
        "mask_head": 197_376,
    }
    assert size_of(model) == 45_065_158
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 45_012_038
    assert sum(p.numel() for p in model.backbone.parameters() if p.requires_grad) == 23_454_912


def test_the_plain_pixel_decoder_has_the_published_number_of_parameters() -> None:
    """The one of Swin-L. mmdetection counts the projection of the memory apart."""
    with torch.device("meta"):
        decoder = PixelDecoder((192, 384, 768, 1536), dataclasses.replace(R50, encoder_layers=0))
    assert size_of(decoder.projection) == 393_472
    assert size_of(decoder) - size_of(decoder.projection) == 6_246_144


def test_the_small_backbone_is_small() -> None:
    assert size_of(SmallBackbone()) < 500_000


# ---- shapes


@pytest.mark.parametrize("size", [(64, 64), (65, 97), (33, 1), (127, 63)])
def test_every_halving_rounds_up(size: tuple[int, int]) -> None:
    def halved(side: int, times: int) -> int:
        return side if times == 0 else halved(math.ceil(side / 2), times - 1)

    with torch.device("meta"):
        swin = Swin(8, (1, 1, 1, 1), (1, 1, 1, 1), window=4, drop_path=0.0)
        for backbone, halvings in (
            (ResNet(50), (2, 3, 4, 5)),
            (swin, (2, 3, 4, 5)),
            (SmallBackbone(), (1, 2, 3, 3)),
        ):
            features = backbone(torch.empty(2, 3, *size))
            assert [tuple(feature.shape) for feature in features] == [
                (2, channels, *(halved(side, times) for side in size))
                for channels, times in zip(backbone.channels, halvings, strict=True)
            ]


def test_r50_predicts_at_a_quarter_of_the_size() -> None:
    with torch.device("meta"):
        output = build_model(R50)(torch.empty(2, 3, 65, 97), torch.zeros(2, 65, 97, dtype=torch.bool))
    assert output.class_logits.shape == (6, 2, 100, 134)
    assert output.mask_logits.shape == (6, 2, 100, 17, 25)


def test_demo_predicts_at_half_of_the_size() -> None:
    output = build_model(DEMO)(torch.randn(1, 3, 37, 50))
    assert output.class_logits.shape == (DEMO.decoder_layers, 1, DEMO.num_queries, DEMO.num_classes + 1)
    assert output.mask_logits.shape == (DEMO.decoder_layers, 1, DEMO.num_queries, 19, 25)


# ---- backbone


def torchvision_resnet(depth: int) -> nn.Module:
    """Build torchvision's own, in evaluation mode and with statistics to apply."""
    build = {50: torchvision.models.resnet50, 101: torchvision.models.resnet101}[depth]
    reference = build(weights=None)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.2, 0.4)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.get_buffer("running_mean"))
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return reference.eval()


@pytest.mark.parametrize("depth", [50, 101])
def test_resnet_features_and_gradients_are_those_of_torchvision(depth: int) -> None:
    reference, backbone = torchvision_resnet(depth).double(), ResNet(depth).double()
    result = backbone.load_state_dict(reference.state_dict(), strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["fc.weight", "fc.bias"]

    images = torch.randn(2, 3, 40, 50, dtype=torch.float64)
    stages = [f"layer{number}" for number in range(1, 5)]
    expected = create_feature_extractor(reference, return_nodes=stages)(images)
    features = backbone.train()(images)
    for stage, actual in zip(stages, features, strict=True):
        torch.testing.assert_close(actual, expected[stage], rtol=1e-10, atol=1e-10)

    for stage, actual in zip(stages, features, strict=True):
        weight = torch.randn_like(actual) / actual.numel()
        (weight * actual).sum().backward(retain_graph=True)
        (weight * expected[stage]).sum().backward(retain_graph=True)
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad:
            gradient = reference.get_parameter(name).grad
            assert gradient is not None, name
            assert gradient.any(), name
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_a_resnet_starts_with_the_weights_of_torchvision() -> None:
    torch.manual_seed(7)
    reference = torchvision.models.resnet50(weights=None)
    torch.manual_seed(7)
    state = ResNet(50).state_dict()
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in state.items())


def test_under_autocast_a_resnet_rounds_no_more_than_torchvision() -> None:
    reference, backbone, images = torchvision_resnet(50), ResNet(50), torch.randn(1, 3, 64, 64)
    backbone.load_state_dict(reference.state_dict(), strict=False)
    stages = [f"layer{number}" for number in range(1, 5)]
    peer = create_feature_extractor(reference, return_nodes=stages)
    exact = peer(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, rounded = backbone(images), peer(images)
    for feature, stage in zip(features, stages, strict=True):
        assert feature.dtype == torch.bfloat16
        error, usual = ((other.float() - exact[stage]).norm() for other in (feature, rounded[stage]))
        assert 0 < error < 1.5 * usual


def test_batch_statistics_never_move() -> None:
    backbone = ResNet(50).train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 53
    before = {name: value.clone() for name, value in backbone.named_buffers()}
    backbone(torch.randn(2, 3, 32, 32))[-1].square().mean().backward()
    for name, value in backbone.named_buffers():
        assert torch.equal(value, before[name]), name
    for norm in norms:
        assert isinstance(norm, FrozenBatchNorm2d)
        assert not norm.training
        assert norm.weight.grad is None
        assert norm.bias.grad is None
    assert not FrozenBatchNorm2d(3).training


# ---- pixel decoder


def slow_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Convolve as a sum of shifted matrix products."""
    reach = conv.kernel_size[0] // 2
    padded = nn.functional.pad(x, (reach, reach, reach, reach))
    height, width = x.shape[-2:]
    result = torch.zeros(len(x), conv.out_channels, height, width)
    for i in range(conv.kernel_size[0]):
        for j in range(conv.kernel_size[1]):
            shifted = padded[..., i : i + height, j : j + width]
            result += torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], shifted)
    return result if conv.bias is None else result + conv.bias[:, None, None]


def slow_conv_norm(block: nn.Module, x: Tensor, *, relu: bool) -> Tensor:
    conv, norm = block.get_submodule("0"), block.get_submodule("1")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.GroupNorm)
    assert conv.bias is None
    x = slow_conv(conv, x)
    groups = x.view(len(x), 32, -1)
    groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = groups.view_as(x) * norm.weight[:, None, None] + norm.bias[:, None, None]
    return x.clamp(min=0) if relu else x


def slow_upsample(x: Tensor, height: int, width: int) -> Tensor:
    rows = [i * x.shape[2] // height for i in range(height)]
    columns = [j * x.shape[3] // width for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("encoder_layers", [0, 2])
def test_pixel_decoder_follows_its_definition(encoder_layers: int) -> None:
    config = dataclasses.replace(TINY, hidden_dim=64, encoder_layers=encoder_layers)
    decoder = PixelDecoder((3, 5, 7, 9), config).eval()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    sizes = ((11, 18), (6, 9), (3, 5), (2, 3))
    features = [torch.randn(2, channels, *size) for channels, size in zip((3, 5, 7, 9), sizes, strict=True)]
    padding = torch.zeros(2, 2, 3, dtype=torch.bool)
    padding[1, :, 2] = True
    positions, ignored = sine_positions(padding, 64), padding.flatten(1)

    memory = slow_conv(decoder.projection, features[3])
    for layer in decoder.encoder:
        memory = layer(memory.flatten(2).transpose(1, 2), positions, ignored).transpose(1, 2).view(2, 64, 2, 3)
    x = slow_conv_norm(decoder.top, memory if encoder_layers else features[3], relu=True)
    for level, feature in enumerate((features[2], features[1], features[0])):
        lateral = slow_conv_norm(decoder.laterals[level], feature, relu=False)
        x = slow_conv_norm(decoder.outputs[level], lateral + slow_upsample(x, *feature.shape[-2:]), relu=True)

    mask_features, actual_memory = decoder(features, positions, ignored)
    torch.testing.assert_close(mask_features, slow_conv(decoder.mask_features, x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual_memory, memory.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


def test_every_convolution_of_the_pixel_decoder_starts_caffe2_xavier() -> None:
    config = dataclasses.replace(TINY, hidden_dim=64, initialization="original")
    decoder = PixelDecoder((64, 96, 128, 160), config)
    convolutions = [module for module in decoder.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 9
    for conv in convolutions:
        bound = math.sqrt(3 / conv.weight[0].numel())
        assert conv.weight.abs().max() <= bound
        assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert conv.bias is None or not conv.bias.any()


def test_mmdetection_leaves_both_res4_convolutions_wider() -> None:
    decoder = PixelDecoder((256, 512, 1024, 2048), ModelConfig(encoder_layers=0))
    lateral, output = decoder.get_parameter("laterals.0.0.weight"), decoder.get_parameter("outputs.0.0.weight")
    assert lateral.shape[1] == 1024
    assert (lateral.std().item(), output.std().item()) == pytest.approx((0.088, 0.0295), rel=0.01)
    others = decoder.get_parameter("laterals.1.0.weight"), decoder.get_parameter("outputs.1.0.weight")
    assert [weight.std().item() for weight in others] == pytest.approx([512**-0.5, (256 * 9) ** -0.5], rel=0.01)


# ---- complete model


def padded_batch() -> tuple[Tensor, Tensor]:
    padding = torch.zeros(2, 45, 70, dtype=torch.bool)
    padding[1, 31:] = True
    padding[1, :, 44:] = True
    return torch.randn(2, 3, 45, 70).masked_fill(padding[:, None], 0), padding


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN], ids=["encoder", "plain"])
def test_forward_joins_the_parts(config: ModelConfig) -> None:
    """One mask per query: the product of its embedding with every pixel's features."""
    model = build_model(config).eval()
    images, padding = padded_batch()
    coarse_height, coarse_width = 6, 9
    rows = torch.tensor([math.floor(i * 45 / coarse_height) for i in range(coarse_height)])
    columns = torch.tensor([math.floor(j * 70 / coarse_width) for j in range(coarse_width)])
    coarse = padding[:, rows][:, :, columns]
    assert coarse.any()

    positions = sine_positions(coarse, config.hidden_dim)
    pixels, memory = model.pixel_decoder(model.backbone(images), positions, coarse.flatten(1))
    segments = model.transformer_decoder(model.query_embedding.weight, memory, positions, coarse.flatten(1))
    output = model(images, padding)
    for layer in range(config.decoder_layers):
        for image in range(2):
            for query in range(config.num_queries):
                x = segments[layer, image, query]
                class_logits = model.class_head.weight @ x + model.class_head.bias
                torch.testing.assert_close(output.class_logits[layer, image, query], class_logits, rtol=1e-4, atol=1e-5)
                first, second, third = (part for part in model.mask_head if isinstance(part, nn.Linear))
                x = (first.weight @ x + first.bias).clamp(min=0)
                x = (second.weight @ x + second.bias).clamp(min=0)
                mask = ((third.weight @ x + third.bias)[:, None, None] * pixels[image]).sum(0)
                torch.testing.assert_close(output.mask_logits[layer, image, query], mask, rtol=1e-4, atol=1e-4)


def test_no_padding_is_padding_that_is_false_everywhere() -> None:
    model = build_model(TINY).eval()
    images = torch.randn(2, 3, 45, 70)
    expected = model(images, torch.zeros(2, 45, 70, dtype=torch.bool))
    for actual, wanted in zip(model(images), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 45, 71), (1, 45, 70)])
def test_padding_of_another_size_is_refused(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # Users do not have the shape checks of the tests, which would refuse it first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"padding must have .* \(2, 45, 70\), got"):
        build_model(TINY)(torch.randn(2, 3, 45, 70), torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN, R50], ids=["encoder", "plain", "r50"])
@pytest.mark.parametrize("padded", [True, False])
def test_every_trainable_parameter_gets_a_gradient(config: ModelConfig, padded: bool) -> None:
    model = build_model(config).train()
    images, padding = padded_batch()
    output = model(images, padding if padded else None)
    (output.class_logits.square().mean() + output.mask_logits.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("config", [TINY, TINY_PLAIN], ids=["encoder", "plain"])
def test_bfloat16_autocast_gives_nearly_the_same(config: ModelConfig) -> None:
    model = build_model(config).eval()
    images, padding = padded_batch()
    expected = model(images, padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images, padding)
    for actual, wanted in zip(output, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - wanted).abs().mean() < 0.05 * wanted.abs().mean()
    (output.class_logits.float().square().mean() + output.mask_logits.float().square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("config", [R50, SWIN_T], ids=["R50", "Swin-T"])
def test_maps_are_channels_last_all_the_way_and_weights_are_not(config: ModelConfig) -> None:
    """Each change of the layout would be a copy, and checkpoints have contiguous weights."""
    model = build_model(config)
    seen: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        seen[name] = inputs[0]

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm | Bottleneck):
            module.register_forward_pre_hook(partial(note, name))
    model(torch.randn(2, 3, 64, 96))
    assert len([name for name in seen if name.startswith("pixel_decoder.")]) == 1 + 7 * 2 + 1
    assert any(name.startswith("backbone.") for name in seen)
    for name, tensor in seen.items():
        assert tensor.is_contiguous(memory_format=torch.channels_last), name
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_query_embedding_starts_standard_normal() -> None:
    weight = build_model(dataclasses.replace(TINY, num_queries=200)).query_embedding.weight
    assert weight.mean().item() == pytest.approx(0, abs=0.05)
    assert weight.std().item() == pytest.approx(1, abs=0.05)
