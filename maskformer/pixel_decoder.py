"""The pixel decoder turns feature maps into one map of mask features and the memory that the queries attend to.

arXiv:2107.06278, section 3.4: a feature pyramid with GroupNorm. Optionally, transformer encoder layers refine the
coarsest map first ("+ 6 Enc" in the paper's tables, the default for ResNets on COCO panoptic).

Letters: B images, C channels (hidden_dim), H W padded image, h w finest map, N tokens of the coarsest map.
"""

import math

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from maskformer.config import ModelConfig
from maskformer.recompute import call_layers
from maskformer.transformer import EncoderLayer


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        # 32 groups for every published size; with the gcd a small model may have 48 or 80 channels.
        nn.GroupNorm(math.gcd(32, out_channels), out_channels),
    )


class PixelDecoder(nn.Module):
    """Feature pyramid over four maps, with `config.encoder_layers` transformer layers on the coarsest map (0: none)."""

    def __init__(self, channels: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        self.recompute = config.checkpoint_activations
        hidden = config.hidden_dim
        *finer, coarsest = channels
        self.projection = nn.Conv2d(coarsest, hidden, 1)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.top = _conv_norm(hidden if config.encoder_layers else coarsest, hidden, 3).append(nn.ReLU(inplace=True))
        # Coarse to fine, the order of use.
        self.laterals = nn.ModuleList(_conv_norm(width, hidden, 1) for width in reversed(finer))
        self.outputs = nn.ModuleList(_conv_norm(hidden, hidden, 3).append(nn.ReLU(inplace=True)) for _ in finer)
        self.mask_features = nn.Conv2d(hidden, hidden, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's Xavier: +-sqrt(3 / fan_in)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if config.initialization == "mmdetection":
            for name in ("laterals.0.0.weight", "outputs.0.0.weight"):
                nn.init.kaiming_normal_(self.get_parameter(name), mode="fan_out", nonlinearity="relu")

    def forward(
        self,
        features: list[Float[Tensor, "B _C _h _w"]],
        positions: Float[Tensor, "B N C"],
        ignored: Bool[Tensor, "B N"] | None,
    ) -> tuple[Float[Tensor, "B C h w"], Float[Tensor, "B N C"]]:
        """Return the mask features, at the size of the finest map, and the memory.

        Args:
            features: four maps, fine to coarse.
            positions: position encoding of the coarsest map, from `sine_positions`.
            ignored: True where a cell of the coarsest map is padding.
        """
        *finer, coarsest = features
        memory: Tensor = self.projection(coarsest).flatten(2).transpose(1, 2)
        memory = call_layers(self.encoder, memory, positions, ignored, recompute=self.recompute)
        if len(self.encoder) > 0:
            coarsest = memory.transpose(1, 2).view(*memory.shape[::2], *coarsest.shape[-2:])
        x = self.top(coarsest)
        for feature, lateral, output in zip(reversed(finer), self.laterals, self.outputs, strict=True):
            fine: Tensor = lateral(feature)
            fine += F.interpolate(x, size=fine.shape[-2:], mode="nearest")
            x = output(fine)
        return self.mask_features(x), memory
