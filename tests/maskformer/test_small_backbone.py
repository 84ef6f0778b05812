"""The block of the small backbone is torchvision's BasicBlock, without torchvision."""

from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock

from maskformer.small_backbone import SmallBackbone, _Block


def shortcut(stride: int) -> nn.Sequential | None:
    return None if stride == 1 else nn.Sequential(nn.Conv2d(16, 16, 1, stride=stride, bias=False), nn.GroupNorm(8, 16))


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_that_of_torchvision(stride: int) -> None:
    torch.manual_seed(0)
    ours = _Block(16, 16, stride, shortcut(stride))
    torch.manual_seed(0)
    theirs = BasicBlock(16, 16, stride, shortcut(stride), norm_layer=partial(nn.GroupNorm, 8))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)  # the same random numbers in the same order
    x = torch.randn(2, 16, 9, 7)
    left, right = (module(x.clone()) for module in (ours, theirs))
    assert torch.equal(left, right)
    # Three gradients of the input are added here, as in the network, where other layers use the features too: the bits
    # depend on their order.
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((ours, theirs), inputs, strict=True):
        shared = leaf * 1.0
        (module(shared).square().sum() + shared.sin().sum()).backward()
    assert torch.equal(*(leaf.grad for leaf in inputs))  # pyright: ignore[reportArgumentType]
    for mine, other in zip(
        torch.autograd.grad(left.sum(), list(ours.parameters())),
        torch.autograd.grad(right.sum(), list(theirs.parameters())),
        strict=True,
    ):
        assert torch.equal(mine, other)


def test_all_parameters_are_trained() -> None:
    features = SmallBackbone()(torch.randn(1, 3, 32, 48))
    assert [feature.shape[1] for feature in features] == [32, 64, 96, 128]
