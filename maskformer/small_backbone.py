"""The backbone `small` of the demo. Unlike those of `maskformer.backbone`, it does not need torchvision.

Letters: B images, C channels, H W image, h w feature map (a different size for each map).
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class SmallBackbone(nn.Module):
    """Four residual blocks at strides 2, 4, 8 and 8, for images of about 64 pixels on a CPU.

    It uses GroupNorm, because it is not pretrained and batches are small.
    """

    channels = (32, 64, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, self.channels[0], 3, stride=2, padding=1, bias=False), _norm(self.channels[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        previous = self.channels[0]
        for channels, stride in zip(self.channels, (1, 2, 2, 1), strict=True):
            shortcut = None
            if channels != previous:
                shortcut = nn.Sequential(nn.Conv2d(previous, channels, 1, stride=stride, bias=False), _norm(channels))
            self.stages.append(_Block(previous, channels, stride, shortcut))
            previous = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        """Return the outputs of the four stages."""
        x = self.stem(images)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class _Block(nn.Module):
    """A residual block of two convolutions; its parameters have the names of torchvision's `BasicBlock`."""

    def __init__(self, inputs: int, channels: int, stride: int, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = _norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = _norm(channels)
        self.downsample = shortcut

    def forward(self, x: Float[Tensor, "B _C _h _w"]) -> Float[Tensor, "B _D _i _j"]:
        found = F.relu_(self.bn1(self.conv1(x)))
        found = self.bn2(self.conv2(found))
        # After the convolutions, as in torchvision: the gradients of `x` are added in the reverse order.
        found += x if self.downsample is None else self.downsample(x)
        return F.relu_(found)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)
