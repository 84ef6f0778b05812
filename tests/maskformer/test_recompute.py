"""Recomputed activations: less is kept for the backward pass, and no bit of losses or gradients changes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from maskformer import build_model
from maskformer.config import R50, SWIN_T, ModelConfig

SMALLER = {"num_queries": 7, "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 48, "decoder_layers": 2}
CONFIGS = [
    pytest.param(replace(R50, encoder_layers=2, dropout=0.1, **SMALLER), id="R50"),
    pytest.param(replace(SWIN_T, encoder_layers=2, dropout=0.1, drop_path=0.3, **SMALLER), id="Swin-T"),
]


def step(config: ModelConfig, bfloat16: bool = False) -> tuple[Tensor, dict[str, Tensor], int]:
    """Return a loss, all gradients, and the bytes kept for the backward pass."""
    torch.manual_seed(0)
    network = build_model(config).train()
    images = torch.randn(2, 3, 64, 96)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    padding = torch.zeros(2, 64, 96, dtype=torch.bool)
    padding[1, :, 60:] = True
    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = network(images, padding)
    after = torch.rand(3)  # what is drawn next must not change either
    loss = output.class_logits.float().square().mean() + output.mask_logits.float().square().mean() + after.sum()
    loss.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return loss.detach(), {**gradients, "drawn after": torch.rand(3)}, sum(kept.values())


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_losses_and_gradients_are_the_same_bits(config: ModelConfig, bfloat16: bool) -> None:
    expected, gradients, bytes_without = step(config, bfloat16)
    loss, recomputed, bytes_with = step(replace(config, checkpoint_activations=True), bfloat16)
    assert torch.equal(loss, expected)
    assert recomputed.keys() == gradients.keys()
    assert [name for name, gradient in gradients.items() if not torch.equal(recomputed[name], gradient)] == []
    assert bytes_with < 0.8 * bytes_without, (bytes_with, bytes_without)


def test_dropout_and_drop_path_are_drawn_in_this_test() -> None:
    """The test above would prove nothing about random draws that change nothing."""
    for name in ("dropout", "drop_path"):
        config: ModelConfig = CONFIGS[1].values[0]  # pyright: ignore[reportAssignmentType]  # pytest does not type it
        assert not torch.equal(step(config)[0], step(replace(config, **{name: 0.0}))[0]), name


@pytest.mark.parametrize("config", CONFIGS)
def test_evaluation_and_inference_recompute_nothing(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_model(replace(config, checkpoint_activations=True))

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a layer is to be recomputed")

    monkeypatch.setattr("maskformer.recompute.checkpoint", refuse)
    images = torch.randn(1, 3, 64, 64)
    network.eval()(images)
    with torch.no_grad():
        network.train()(images)
    with pytest.raises(AssertionError, match="is to be recomputed"):
        network(images)
