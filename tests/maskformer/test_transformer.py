"""The transformer against a slow one, written from the papers with plain loops and matrix products."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from maskformer.config import ModelConfig
from maskformer.transformer import DecoderLayer, EncoderLayer, TransformerDecoder, sine_positions

CONFIG = ModelConfig(
    num_queries=5, hidden_dim=16, num_heads=4, feedforward_dim=24, encoder_layers=1, decoder_layers=3, dropout=0.0
)


@pytest.fixture(autouse=True)
def _seeded_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def padding_of(height: int, width: int, *valid: tuple[int, int]) -> Tensor:
    padding = torch.ones(len(valid), height, width, dtype=torch.bool)
    for mask, (valid_height, valid_width) in zip(padding, valid, strict=True):
        mask[:valid_height, :valid_width] = False
    return padding


def randomize(module: nn.Module) -> None:
    """Give norms and biases values that a wrong order of operations would show."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


# ---- positions


def slow_positions(padding: Tensor, channels: int) -> Tensor:
    batch, height, width = padding.shape
    half = channels // 2
    result = torch.zeros(batch, height * width, channels)
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                up_to_here = sum(not padding[b, y, column] for y in range(row + 1))
                full_column = sum(not padding[b, y, column] for y in range(height))
                left_to_here = sum(not padding[b, row, x] for x in range(column + 1))
                full_row = sum(not padding[b, row, x] for x in range(width))
                y_scaled = up_to_here / (full_column + 1e-6) * 2 * math.pi
                x_scaled = left_to_here / (full_row + 1e-6) * 2 * math.pi
                for i in range(half):
                    wave = math.cos if i % 2 else math.sin
                    frequency = 10000 ** (2 * (i // 2) / half)
                    result[b, row * width + column, i] = wave(y_scaled / frequency)
                    result[b, row * width + column, half + i] = wave(x_scaled / frequency)
    return result


@pytest.mark.parametrize("channels", [8, 20])
def test_positions_follow_their_definition(channels: int) -> None:
    padding = padding_of(5, 7, (5, 7), (3, 4), (5, 1), (1, 1))
    positions = sine_positions(padding, channels)
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions.double(), slow_positions(padding, channels), rtol=0, atol=2e-6)


def test_positions_of_an_image_do_not_depend_on_its_padding() -> None:
    alone = sine_positions(padding_of(3, 4, (3, 4)), 16).view(1, 3, 4, 16)
    padded = sine_positions(padding_of(6, 9, (6, 9), (3, 4)), 16).view(2, 6, 9, 16)
    torch.testing.assert_close(padded[1, :3, :4], alone[0], rtol=0, atol=0)


def test_positions_stay_float32_under_autocast() -> None:
    padding = padding_of(40, 40, (40, 40))
    expected = sine_positions(padding, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(sine_positions(padding, 16), expected, rtol=0, atol=0)


# ---- layers


def slow_attention(
    attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, ignored: Tensor | None
) -> Tensor:
    """Attend image by image, head by head, leaving ignored keys out of the sum altogether."""
    width = query.shape[-1]
    head = width // attention.num_heads
    weight_q, weight_k, weight_v = attention.in_proj_weight.split(width)
    bias_q, bias_k, bias_v = attention.in_proj_bias.split(width)
    result = torch.empty_like(query)
    for b in range(len(query)):
        keep = torch.ones(key.shape[1], dtype=torch.bool) if ignored is None else ~ignored[b]
        q = query[b] @ weight_q.T + bias_q
        k = key[b][keep] @ weight_k.T + bias_k
        v = value[b][keep] @ weight_v.T + bias_v
        parts: list[Tensor] = []
        for start in range(0, width, head):
            part = slice(start, start + head)
            scores = (q[:, part] @ k[:, part].T / math.sqrt(head)).exp()
            parts.append(scores / scores.sum(1, keepdim=True) @ v[:, part])
        result[b] = torch.cat(parts, 1) @ attention.out_proj.weight.T + attention.out_proj.bias
    return result


def slow_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias


def slow_feedforward(feedforward: nn.Sequential, x: Tensor) -> Tensor:
    first, second = (layer for layer in feedforward if isinstance(layer, nn.Linear))
    return (x @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias


def test_encoder_layer_follows_its_definition() -> None:
    layer = EncoderLayer(CONFIG)
    randomize(layer)
    tokens, positions = torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    ignored = padding_of(3, 4, (3, 4), (2, 3)).flatten(1)

    query = tokens + positions
    x = slow_norm(
        layer.self_attention_norm, tokens + slow_attention(layer.self_attention, query, query, tokens, ignored)
    )
    expected = slow_norm(layer.feedforward_norm, x + slow_feedforward(layer.feedforward, x))

    torch.testing.assert_close(layer(tokens, positions, ignored), expected)


@pytest.mark.parametrize("padded", [True, False])
def test_decoder_follows_its_definition(padded: bool) -> None:
    decoder = TransformerDecoder(CONFIG)
    randomize(decoder)
    embedding, memory, positions = torch.randn(5, 16), torch.randn(2, 12, 16), torch.randn(2, 12, 16)
    ignored = padding_of(3, 4, (3, 4), (2, 3)).flatten(1) if padded else None

    query_positions = torch.stack([embedding, embedding])
    x = torch.zeros(2, 5, 16)
    expected: list[Tensor] = []
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attended = slow_attention(layer.self_attention, x + query_positions, x + query_positions, x, None)
        x = slow_norm(layer.self_attention_norm, x + attended)
        attended = slow_attention(layer.cross_attention, x + query_positions, memory + positions, memory, ignored)
        x = slow_norm(layer.cross_attention_norm, x + attended)
        x = slow_norm(layer.feedforward_norm, x + slow_feedforward(layer.feedforward, x))
        expected.append(slow_norm(decoder.norm, x))

    torch.testing.assert_close(decoder(embedding, memory, positions, ignored), torch.stack(expected))


def test_padded_tokens_do_not_change_the_result() -> None:
    """An image beside a larger one gives the queries and the memory it gives alone."""
    layer, decoder = EncoderLayer(CONFIG), TransformerDecoder(CONFIG)
    randomize(layer)
    randomize(decoder)
    embedding, image = torch.randn(5, 16), torch.randn(1, 3, 4, 16)

    def run(feature: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        positions, ignored = sine_positions(padding, 16), padding.flatten(1)
        memory = layer(feature.flatten(1, 2), positions, ignored)
        return memory.view_as(feature), decoder(embedding, memory, positions, ignored)

    memory_alone, queries_alone = run(image, padding_of(3, 4, (3, 4)))
    batch = torch.randn(2, 6, 5, 16) * 100
    batch[1, :3, :4] = image[0]
    memory, queries = run(batch, padding_of(6, 5, (6, 5), (3, 4)))

    torch.testing.assert_close(memory[1, :3, :4], memory_alone[0])
    torch.testing.assert_close(queries[:, 1], queries_alone[:, 0])


# ---- dropout and initialization


@pytest.mark.parametrize("everywhere", [0.0, 0.5])
@pytest.mark.parametrize("decoder_feedforward", [0.0, 0.5])
def test_dropout_is_applied_as_configured(everywhere: float, decoder_feedforward: float) -> None:
    config = ModelConfig(
        hidden_dim=16,
        num_heads=4,
        feedforward_dim=24,
        dropout=everywhere,
        decoder_feedforward_dropout=decoder_feedforward,
    )
    layer, decoder = EncoderLayer(config), TransformerDecoder(config)
    first = decoder.layers[0]
    assert isinstance(first, DecoderLayer)
    x = torch.randn(1, 50, 16)

    for attention in (layer.self_attention, first.self_attention, first.cross_attention):
        weights = attention(x, x, x)[1]  # normalized to 1 unless some were dropped
        assert torch.allclose(weights.sum(-1), torch.ones(1, 50)) == (everywhere == 0)
    for dropped, rate in (
        (layer.dropout(x + 9), everywhere),
        (first.dropout(x + 9), everywhere),
        (layer.feedforward(x), everywhere),
        (first.feedforward(x), decoder_feedforward),
    ):
        assert (dropped == 0).double().mean().item() == pytest.approx(rate, abs=0.1)
    for feedforward, rate in ((layer.feedforward, everywhere), (first.feedforward, decoder_feedforward)):
        hidden = feedforward[:3](x)
        assert ((hidden == 0) & (feedforward[:2](x) > 0)).any() == (rate > 0)


def test_dropout_sits_on_the_output_of_every_attention() -> None:
    config = ModelConfig(hidden_dim=16, num_heads=4, feedforward_dim=24, decoder_layers=1, dropout=0.5)
    layer, decoder = EncoderLayer(config), TransformerDecoder(config)
    calls: list[str] = []
    for name, module in (("encoder", layer), ("decoder", decoder.layers[0])):
        module.get_submodule("dropout").register_forward_hook(lambda *_, name=name: calls.append(name))
    x = torch.randn(1, 6, 16)
    decoder(torch.randn(5, 16), layer(x, x, None), x, None)
    assert calls == ["encoder", "decoder", "decoder"]


def test_every_matrix_starts_xavier_uniform() -> None:
    config = ModelConfig(hidden_dim=64, feedforward_dim=128, decoder_layers=1)
    for module in (EncoderLayer(config), TransformerDecoder(config)):
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2:
                bound = math.sqrt(6 / sum(parameter.shape))
                assert parameter.abs().max() <= bound, name
                assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
            elif "attention" in name and name.endswith("bias"):
                assert not parameter.any(), name
