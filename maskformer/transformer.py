"""The transformer of MaskFormer: sine positions, encoder layer, decoder layer, decoder.

arXiv:2107.06278, section 3.4; the layers are DETR's (arXiv:2005.12872, appendix A.4): the norm comes after the
residual sum, and positions are added to queries and keys, never to values. Dropout is applied where mmdetection 2.25
applies it.

Letters: L decoder layers, B images, Q queries, C channels, h w feature map, N tokens (h * w).
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskformer.config import ModelConfig

_TEMPERATURE = 10000.0


def sine_positions(padding: Bool[Tensor, "B h w"], channels: int) -> Float[Tensor, "B h*w C"]:
    """Encode the position of every cell in the valid part of its image: half of the `channels` for y, then half for x.

    Row and column are counted from 1 and scaled to (0, 2 pi] by the size without padding, so an image gets the same
    positions alone and in a padded batch. Sine and cosine alternate over geometrically decreasing frequencies. The
    result is always float32, because bfloat16 does not distinguish neighboring rows of a large map.

    Args:
        padding: True where a cell is padding.
    """
    valid = (~padding).float()
    half = channels // 2
    frequency = _TEMPERATURE ** (-torch.arange(0, half, 2, device=padding.device, dtype=torch.float32) / half)
    axes: list[Tensor] = []
    for dim in (1, 2):
        count = valid.cumsum(dim)
        # If a whole column (row) is padding, its last count is 0; 1e-6 makes its positions 0 instead of NaN.
        scaled = count / (count.narrow(dim, -1, 1) + 1e-6) * (2 * math.pi)
        angle = scaled[..., None] * frequency
        axes.append(torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2))
    return torch.cat(axes, dim=-1).flatten(1, 2)


def _feedforward(config: ModelConfig, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(config.hidden_dim, config.feedforward_dim),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(config.feedforward_dim, config.hidden_dim),
        nn.Dropout(dropout),
    )


def _attention(config: ModelConfig) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(config.hidden_dim, config.num_heads, config.dropout, batch_first=True)


def _attend(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None
) -> Tensor:
    # need_weights=False lets PyTorch choose a fused kernel.
    return attention(query, key, value, key_padding_mask=ignored, need_weights=False)[0]


def _with_position(content: Tensor, position: Tensor) -> Tensor:
    # Under autocast the content may be bfloat16; the position is rounded only here, where it is added.
    return content + position.to(content.dtype)


def _initialize(module: nn.Module) -> None:
    """Draw every matrix from Xavier uniform, as DETR does, the packed query-key-value projection as one matrix."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


class EncoderLayer(nn.Module):
    """Self-attention over the cells of a feature map, then a feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config)
        self.self_attention_norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = _feedforward(config, config.dropout)
        self.feedforward_norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        _initialize(self)

    def forward(
        self,
        tokens: Float[Tensor, "B N C"],
        positions: Float[Tensor, "B N C"],
        ignored: Bool[Tensor, "B N"] | None,
    ) -> Float[Tensor, "B N C"]:
        """Refine the tokens. No token attends to those where `ignored` is True, but they are updated as well."""
        x = tokens
        query = _with_position(x, positions)
        x = self.self_attention_norm(x + self.dropout(_attend(self.self_attention, query, query, x, ignored)))
        return self.feedforward_norm(x + self.feedforward(x))


class DecoderLayer(nn.Module):
    """Self-attention over the queries, cross-attention to the image, then a feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attention = _attention(config)
        self.self_attention_norm = nn.LayerNorm(config.hidden_dim)
        self.cross_attention = _attention(config)
        self.cross_attention_norm = nn.LayerNorm(config.hidden_dim)
        self.feedforward = _feedforward(config, config.decoder_feedforward_dropout)
        self.feedforward_norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        queries: Float[Tensor, "B Q C"],
        query_positions: Float[Tensor, "B Q C"],
        keys: Float[Tensor, "B N C"],
        memory: Float[Tensor, "B N C"],
        ignored: Bool[Tensor, "B N"] | None,
    ) -> Float[Tensor, "B Q C"]:
        """Refine the queries. `keys` is the memory plus its positions, the same for every layer."""
        x = queries
        query = _with_position(x, query_positions)
        x = self.self_attention_norm(x + self.dropout(_attend(self.self_attention, query, query, x, None)))
        query = _with_position(x, query_positions)
        x = self.cross_attention_norm(x + self.dropout(_attend(self.cross_attention, query, keys, memory, ignored)))
        return self.feedforward_norm(x + self.feedforward(x))


class TransformerDecoder(nn.Module):
    """The stack of decoder layers, which returns the output of every layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)
        _initialize(self)

    def forward(
        self,
        query_positions: Float[Tensor, "Q C"],
        memory: Float[Tensor, "B N C"],
        positions: Float[Tensor, "B N C"],
        ignored: Bool[Tensor, "B N"] | None,
    ) -> Float[Tensor, "L B Q C"]:
        """Turn learned query positions into segment embeddings, one set per layer.

        The queries start at zero. One shared norm is applied to the output of every layer; the next layer takes the
        output before this norm.
        """
        keys = _with_position(memory, positions)
        batch_positions = query_positions.expand(memory.shape[0], -1, -1)
        queries = torch.zeros_like(batch_positions)
        outputs: list[Tensor] = []
        for layer in self.layers:
            queries = layer(queries, batch_positions, keys, memory, ignored)
            outputs.append(self.norm(queries))
        return torch.stack(outputs)
