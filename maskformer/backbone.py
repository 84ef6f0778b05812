"""Backbones: an image becomes four feature maps, fine to coarse.

A backbone is a module with `channels` (of its four maps) and `forward(images) -> list of four maps`. Every halving
rounds up, whatever the size of the image: ceil(H / 2), then half of that, and so on.

Letters: B images, C channels, H W image, h w feature map (each its own).
"""

from functools import partial

import torchvision  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock  # pyright: ignore[reportMissingTypeStubs]  # torchvision ships none

from maskformer.config import ModelConfig


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that always applies its stored statistics and does not learn.

    One image per device is too few for statistics. The affine tensors stay parameters (without gradient), so that
    the names and the size of the network are those of torchvision's checkpoints.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)  # pyright: ignore[reportUnknownMemberType]  # torch leaves `device` untyped
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in evaluation mode, whatever the rest of the model does."""
        return super().train(False)


class ResNet50(nn.Module):
    """torchvision's ResNet-50 without its classifier: strides 4, 8, 16 and 32. All convolutions train.

    Parameter names are torchvision's.
    """

    channels = (256, 512, 1024, 2048)

    def __init__(self) -> None:
        super().__init__()
        resnet = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
        self.conv1 = resnet.conv1
        self.bn1 = resnet.bn1
        self.relu = resnet.relu
        self.maxpool = resnet.maxpool
        self.layer1 = resnet.layer1
        self.layer2 = resnet.layer2
        self.layer3 = resnet.layer3
        self.layer4 = resnet.layer4

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B _C _h _w"]]:
        """Return res2, res3, res4 and res5."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        res2 = self.layer1(x)
        res3 = self.layer2(res2)
        res4 = self.layer3(res3)
        res5 = self.layer4(res4)
        return [res2, res3, res4, res5]


class SmallBackbone(nn.Module):
    """Four residual blocks at strides 2, 4, 8 and 8, for pictures of some 64 pixels on a CPU.

    GroupNorm, because nothing is pretrained and batches are small.
    """

    channels = (32, 64, 96, 128)

    def __init__(self) -> None:
        super().__init__()
        norm = partial(nn.GroupNorm, 8)
        self.stem = nn.Sequential(
            nn.Conv2d(3, self.channels[0], 3, stride=2, padding=1, bias=False), norm(self.channels[0]), nn.ReLU()
        )
        self.stages = nn.ModuleList()
        previous = self.channels[0]
        for channels, stride in zip(self.channels, (1, 2, 2, 1), strict=True):
            shortcut = None
            if channels != previous:
                shortcut = nn.Sequential(nn.Conv2d(previous, channels, 1, stride=stride, bias=False), norm(channels))
            self.stages.append(BasicBlock(previous, channels, stride, shortcut, norm_layer=norm))
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


def build_backbone(config: ModelConfig) -> ResNet50 | SmallBackbone:
    """Build the backbone that the configuration names, with random weights."""
    return {"resnet50": ResNet50, "small": SmallBackbone}[config.backbone]()
