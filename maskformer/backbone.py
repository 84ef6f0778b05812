"""The published backbones, ResNet and Swin, which turn an image into four feature maps, fine to coarse.

A backbone is a module with `channels`, the channels of its four maps, and `forward(images) -> list of four maps`. Every
halving rounds up, for any image size: ceil(H / 2), then half of that, and so on.

Letters: B images, C channels, H W image, h w feature map (a different size for each map).
"""

from functools import partial

import torch
import torchvision  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet, swin_transformer  # pyright: ignore[reportMissingTypeStubs]  # it ships none

from maskformer.config import ModelConfig
from maskformer.recompute import call_layers


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalization that always applies its stored statistics and does not train.

    One image per device is too few to estimate statistics. The affine tensors stay parameters (without gradient), so
    the parameter names and their number match torchvision's checkpoints.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)  # pyright: ignore[reportUnknownMemberType]  # torch leaves `device` untyped
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode, even if the rest of the model trains."""
        return super().train(False)


def _conv_norm(x: Float[Tensor, "B _C _h _w"], conv: nn.Module, norm: nn.Module) -> Float[Tensor, "B _D _i _j"]:
    """Convolve and normalize in one convolution: a frozen norm is a factor and a shift of each output channel.

    There is no map between the two, neither to compute nor to keep for the backward pass.
    """
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, FrozenBatchNorm2d)  # statistics of the batch could not be known before the convolution
    mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
    # Under autocast these products stay float32, and only the convolution rounds their result.
    scale = norm.weight * (variance + norm.eps).rsqrt()
    weight = conv.weight * scale[:, None, None, None]
    return F.conv2d(x, weight, norm.bias - mean * scale, conv.stride, conv.padding, conv.dilation, conv.groups)


class Bottleneck(resnet.Bottleneck):
    """torchvision's residual block for `FrozenBatchNorm2d`, with fewer and smaller maps kept for the backward pass."""

    def forward(self, x: Float[Tensor, "B _C _h _w"]) -> Float[Tensor, "B _D _i _j"]:
        """Return the sum of the shortcut and three convolutions. `x` is not changed."""
        shortcut = x if self.downsample is None else _conv_norm(x, *self.downsample.children())
        # In place, since the backward pass of a convolution does not need the convolution's output.
        x = F.relu_(_conv_norm(x, self.conv1, self.bn1))
        x = F.relu_(_conv_norm(x, self.conv2, self.bn2))
        x = _conv_norm(x, self.conv3, self.bn3)
        x += shortcut
        return F.relu_(x)


class ResNet(nn.Module):
    """torchvision's ResNet-50 or -101 without its classifier, strides 4, 8, 16 and 32. All convolutions train.

    Parameter names are torchvision's.
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self, depth: int, recompute: bool = False) -> None:
        """Draw random weights.

        Args:
            recompute: compute every block again in the backward pass instead of keeping its activations.
        """
        super().__init__()
        self.recompute = recompute
        blocks = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3]}[depth]
        whole = resnet.ResNet(Bottleneck, blocks, norm_layer=FrozenBatchNorm2d)
        self.conv1 = whole.conv1
        self.bn1 = whole.bn1
        self.maxpool = whole.maxpool
        self.layer1 = whole.layer1
        self.layer2 = whole.layer2
        self.layer3 = whole.layer3
        self.layer4 = whole.layer4

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        """Return res2, res3, res4 and res5."""
        x = self.maxpool(F.relu_(_conv_norm(images, self.conv1, self.bn1)))
        features: list[Tensor] = []
        for blocks in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = call_layers(blocks, x, recompute=self.recompute)
            features.append(x)
        return features


class ShiftedWindowAttention(swin_transformer.ShiftedWindowAttention):
    """torchvision's window attention, except that it also shifts a map no larger than one window.

    torchvision omits the shift for such maps, as the published classifier does. The published detectors always shift.
    """

    def define_relative_position_index(self) -> None:
        """Exclude the index from checkpoints; it follows from the window size."""
        super().define_relative_position_index()
        self._non_persistent_buffers_set.add("relative_position_index")

    def forward(self, x: Float[Tensor, "B h w C"]) -> Float[Tensor, "B h w C"]:
        """Attend within windows, shifted by `shift_size`."""
        height, width = x.shape[1:3]
        window_height, window_width = self.window_size
        if not any(self.shift_size) or (height > window_height and width > window_width):
            return super().forward(x)
        # The shift and its mask are applied here, so torchvision's function gets a shift of 0 and one bias per window.
        x = F.pad(x, (0, 0, 0, -width % window_width, 0, -height % window_height))
        bias = self.get_relative_position_bias() + self._shift_mask(x.shape[1], x.shape[2], x.device)
        x = swin_transformer.shifted_window_attention(
            x.roll([-shift for shift in self.shift_size], (1, 2)),
            self.qkv.weight,
            self.proj.weight,
            bias.repeat(len(x), 1, 1, 1),
            self.window_size,
            self.num_heads,
            shift_size=[0, 0],
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            qkv_bias=self.qkv.bias,
            proj_bias=self.proj.bias,
            training=self.training,
        )
        return x.roll(self.shift_size, (1, 2))[:, :height, :width]

    def _shift_mask(self, height: int, width: int, device: torch.device) -> Float[Tensor, "windows 1 cells cells"]:
        """Return -100 for pairs of cells that share a window only because of the roll, 0 elsewhere."""
        regions = torch.zeros(height, width, device=device)
        for axis, (size, window, shift) in enumerate(
            zip((height, width), self.window_size, self.shift_size, strict=True)
        ):
            index = torch.arange(size, device=device)
            # The last window holds rows (columns) that belong together, then those rolled in from the opposite side.
            region = (index >= size - window).long() + (index >= size - shift).long()
            regions = 3 * regions + (region[:, None] if axis == 0 else region)
        down, across = self.window_size
        windows = regions.view(height // down, down, width // across, across).transpose(1, 2).flatten(2).flatten(0, 1)
        return (windows[:, None, :] != windows[:, :, None]).float()[:, None] * -100.0


class Swin(nn.Module):
    """torchvision's Swin transformer without its classifier, strides 4, 8, 16 and 32.

    Besides the shift (`ShiftedWindowAttention`), it differs from torchvision in two ways, like the published detectors:
    an image whose size is no multiple of the patch size is padded instead of cropped, and each output has its own norm.
    Parameter names are torchvision's, `features.*`, plus `norms.*`.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window: int,
        drop_path: float,
        recompute: bool = False,
    ) -> None:
        """Draw random weights.

        Args:
            depths: blocks of each stage; `num_heads` likewise.
            window: side of a window in patches.
            drop_path: rate of the last block.
            recompute: compute every block again in the backward pass instead of keeping its activations.
        """
        super().__init__()
        self.recompute = recompute
        self.channels = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.features = torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=embed_dim,
            depths=list(depths),
            num_heads=list(num_heads),
            window_size=[window, window],
            stochastic_depth_prob=drop_path,
            block=partial(swin_transformer.SwinTransformerBlock, attn_layer=ShiftedWindowAttention),
        ).features
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for channels in self.channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        """Return the outputs of the four stages, before patch merging."""
        height, width = images.shape[-2:]
        x = F.pad(images, (0, -width % 4, 0, -height % 4))
        features: list[Tensor] = []
        # The layers alternate: patch embedding, stage, patch merging, stage, and so on.
        for index, layer in enumerate(self.features):
            if index % 2 == 0:
                x = layer(x)
            else:
                x = call_layers(layer.children(), x, recompute=self.recompute)
                features.append(self.norms[index // 2](x).permute(0, 3, 1, 2))
        return features


def build_backbone(config: ModelConfig) -> ResNet | Swin:
    """Build the backbone `config.backbone`, which is not `small`, with random weights."""
    recompute = config.checkpoint_activations
    match config.backbone:
        case "resnet50":
            return ResNet(50, recompute)
        case "resnet101":
            return ResNet(101, recompute)
        case "swin_t":
            return Swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, config.drop_path, recompute)
        case "swin_s":
            return Swin(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, config.drop_path, recompute)
        case "swin_b":
            return Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 12, config.drop_path, recompute)
        case "swin_l":
            return Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12, config.drop_path, recompute)
        case "small":
            raise ValueError("The backbone `small` is in maskformer.small_backbone. Use build_model.")
