"""A compiled network computes what the network computes, up to rounding."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from maskformer import LossConfig, MaskFormer, Targets, build_model, compute_losses
from maskformer.backbone import FrozenBatchNorm2d
from maskformer.config import DEMO, R50, ModelConfig

SMALLER = {"num_queries": 7, "hidden_dim": 32, "num_heads": 4, "feedforward_dim": 48, "decoder_layers": 2}


def step(network: MaskFormer, call: Any, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return logits, losses and all gradients of two images, one of which is padded."""
    height, width = size
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, height, width, generator=generator)
    padding = torch.zeros(2, height, width, dtype=torch.bool)
    padding[1, :, width - 20 :] = True
    targets = [Targets(torch.arange(3), torch.randint(0, 4, size, generator=generator)) for _ in range(2)]
    network.zero_grad(set_to_none=True)
    output = call(images, padding)
    losses = compute_losses(output, targets, LossConfig())
    losses.total.backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {"classes": output.class_logits, "masks": output.mask_logits, "total": losses.total, **gradients}


CONFIGS = {
    "small": replace(DEMO, encoder_layers=1),
    "R50": replace(R50, encoder_layers=1, dropout=0.0, **SMALLER),
}


def largest_error(config: ModelConfig, recompute: bool) -> float:
    """Return the largest relative error of a compiled network, over all tensors and two sizes of images."""
    torch.manual_seed(0)
    network = build_model(config).train()
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.3)  # without pretrained statistics, maps would grow
    compiled = build_model(replace(config, checkpoint_activations=recompute)).train()
    compiled.load_state_dict(network.state_dict())
    call = torch.compile(compiled, dynamic=False)  # as the workers do
    largest = 0.0
    for size in ((64, 96), (96, 80)):
        expected, found = step(network, network, size), step(compiled, call, size)
        assert found.keys() == expected.keys()
        scale = max(tensor.norm() for name, tensor in expected.items() if name.endswith("weight"))
        for name, tensor in expected.items():
            # Some gradients are zero but for rounding, such as that of a key's bias.
            error = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-3 * scale)
            largest = max(largest, error.item())
    return largest


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "recompute"), [("small", False), ("small", True), ("R50", False)])
def test_outputs_losses_and_gradients_are_those_of_the_network(name: str, recompute: bool) -> None:
    # In a process of its own, without the shape checks of the tests, which torch.compile cannot follow.
    command = [sys.executable, __file__, name, *(["recompute"] if recompute else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert 0 < float(result.stdout) < 1e-4


if __name__ == "__main__":
    print(largest_error(CONFIGS[sys.argv[1]], "recompute" in sys.argv))
