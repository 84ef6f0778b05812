from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig
from maskformer.mask_losses import mask_losses
from maskformer.targets import Targets

CONFIG = LossConfig()
UNEQUAL = LossConfig(focal_alpha=0.4, focal_gamma=1.5)
LAYERS, IMAGES, QUERIES = 2, 2, 6

Pairs = list[tuple[Tensor, Tensor]]


def random_case(
    size: tuple[int, int] = (9, 14), map_size: tuple[int, int] = (3, 4), segments: tuple[int, ...] = (3, 1)
) -> tuple[Tensor, Pairs, list[Targets]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, IMAGES, QUERIES, *map_size, generator=generator, dtype=torch.float64) * 3
    pairs, targets = [], []
    for count in segments:
        matched = min(count, QUERIES)
        drawn = [
            torch.stack([torch.randperm(limit, generator=generator)[:matched] for _ in range(LAYERS)])
            for limit in (QUERIES, count)
        ]
        pairs.append((drawn[0], drawn[1]))
        plane = torch.randint(0, count + 1, size, generator=generator, dtype=torch.int32)
        targets.append(Targets(torch.zeros(count, dtype=torch.int64), plane))
    return logits, pairs, targets


def slow_losses(logits: Tensor, pairs: Pairs, targets: list[Targets], config: LossConfig) -> Tensor:
    """The definition with PyTorch's operators and autograd, all of full resolution at once."""
    by_image = []
    for image, ((queries, indices), target) in enumerate(zip(pairs, targets, strict=True)):
        layers = torch.arange(len(queries))[:, None]
        matched = logits[layers, image, queries].flatten(0, 1)
        full = F.interpolate(matched[:, None], target.size, mode="bilinear", align_corners=False)[:, 0]
        inside = target.selected(indices.flatten()).to(full.dtype)
        share = full.sigmoid()
        right = torch.where(inside == 1, share, 1 - share)
        alpha = config.focal_alpha * inside + (1 - config.focal_alpha) * (1 - inside)
        cross_entropy = F.binary_cross_entropy_with_logits(full, inside, reduction="none")
        focal = (alpha * (1 - right) ** config.focal_gamma * cross_entropy).mean(dim=(1, 2))
        common, total = (share * inside).sum(dim=(1, 2)), share.sum(dim=(1, 2)) + inside.sum(dim=(1, 2))
        dice = 1 - (2 * common + 1) / (total + 1)
        by_image.append(torch.stack([focal, dice]).view(2, *queries.shape).sum(dim=2))
    return torch.stack(by_image, dim=2)


def with_gradients(losses: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The losses and a gradient in which each of them has another weight."""
    weights = torch.linspace(0.5, 2.0, losses.numel(), dtype=losses.dtype).view_as(losses)
    (gradient,) = torch.autograd.grad((losses * weights).sum(), logits)
    return losses.detach(), gradient


CASES = {
    "usual": {},
    "one image empty": {"segments": (4, 0)},
    "more segments than queries": {"segments": (9, 2)},
    "fraction of a stride": {"size": (13, 11), "map_size": (4, 3)},
    "same size": {"size": (4, 5), "map_size": (4, 5)},
    "smaller than the map": {"size": (3, 2), "map_size": (4, 5)},
    "one pixel": {"size": (1, 1), "map_size": (1, 1), "segments": (1, 1)},
    "one row": {"size": (1, 700), "map_size": (1, 175)},
    "several bands": {"size": (5, 600), "map_size": (2, 150)},
}


@pytest.mark.parametrize("config", [CONFIG, UNEQUAL, replace(CONFIG, focal_gamma=0.0)], ids=["usual", "unequal", "0"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_losses_and_gradients_equal_the_definition(case: str, config: LossConfig, piece: int):
    logits, pairs, targets = random_case(**CASES[case])
    logits.requires_grad_()
    expected = with_gradients(slow_losses(logits, pairs, targets, config), logits)
    found = with_gradients(mask_losses(logits, pairs, targets, config, piece=piece), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", ["usual", "several bands", "fraction of a stride"])
def test_float32_is_as_close_as_it_can_be(case: str):
    logits, pairs, targets = random_case(**CASES[case])
    expected = with_gradients(slow_losses(logits.requires_grad_(), pairs, targets, CONFIG), logits)
    single = logits.detach().float().requires_grad_()
    found = with_gradients(mask_losses(single, pairs, targets, CONFIG), single)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_gradients_pass_gradcheck():
    logits, pairs, targets = random_case(size=(6, 7), map_size=(2, 3))
    assert torch.autograd.gradcheck(lambda x: mask_losses(x, pairs, targets, CONFIG, piece=20), logits.requires_grad_())


def test_masks_may_overlap():
    logits, pairs, targets = random_case()
    overlapping = []
    for target in targets:
        masks = target.selected(torch.arange(len(target))) | (torch.arange(9 * 14).view(9, 14) % 5 == 0)
        overlapping.append(Targets(target.classes, masks))
    logits.requires_grad_()
    expected = with_gradients(slow_losses(logits, pairs, overlapping, CONFIG), logits)
    found = with_gradients(mask_losses(logits, pairs, overlapping, CONFIG, piece=40), logits)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [100.0, 1e4, 1e30, 1e38, 3e38])
def test_finite_at_any_finite_logit(scale: float):
    logits, pairs, targets = random_case()
    extreme = (scale * logits.sign()).float().requires_grad_()
    losses, gradient = with_gradients(mask_losses(extreme, pairs, targets, CONFIG), extreme)
    assert not losses.isnan().any()
    assert scale > 1e30 or losses.isfinite().all()  # a sum of the largest ones is infinite
    assert gradient.isfinite().all()
    if scale < 1e30:
        expected = slow_losses(extreme.detach().double(), pairs, targets, CONFIG)
        # Resizing in float32 moves logits by 1e-7 of the scale.
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-8 * scale)


def test_bfloat16_logits_get_the_losses_of_float32_and_gradients_of_their_own_type():
    logits, pairs, targets = random_case()
    low = logits.bfloat16().requires_grad_()
    full = logits.bfloat16().float().requires_grad_()
    losses, gradient = with_gradients(mask_losses(low, pairs, targets, CONFIG), low)
    expected, expected_gradient = with_gradients(mask_losses(full, pairs, targets, CONFIG), full)
    assert losses.dtype == torch.float32
    assert torch.equal(losses, expected)
    assert torch.equal(gradient, expected_gradient.bfloat16())


def test_repetitions_give_the_same_bits():
    logits, pairs, targets = random_case(segments=(6, 5))
    single = logits.float().requires_grad_()
    runs = [with_gradients(mask_losses(single, pairs, targets, CONFIG, piece=50), single) for _ in range(5)]
    for losses, gradient in runs[1:]:
        assert torch.equal(losses, runs[0][0])
        assert torch.equal(gradient, runs[0][1])


def test_a_second_derivative_is_refused():
    logits, pairs, targets = random_case()
    losses = mask_losses(logits.requires_grad_(), pairs, targets, CONFIG)
    (gradient,) = torch.autograd.grad(losses.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_keeps_nothing_of_full_resolution():
    """Only two gradients of the size of each matched map are saved, whatever the size of the image."""
    logits, pairs, targets = random_case(size=(90, 140))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        mask_losses(logits.requires_grad_(), pairs, targets, CONFIG)
    matched = sum(queries.numel() for queries, _ in pairs)
    assert sum(tensor.numel() for tensor in saved) == 2 * matched * 3 * 4


@pytest.mark.parametrize("threads", [1, 2])
def test_autocast_changes_nothing(threads: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits, pairs, targets = random_case()
    single = logits.float().requires_grad_()
    expected = with_gradients(mask_losses(single, pairs, targets, CONFIG, piece=50), single)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(mask_losses(single, pairs, targets, CONFIG, piece=50), single)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_right_decision_costs_as_little_as_in_float64():
    """Absolutely: where the loss is tiny, float32 may round it to 0."""
    logits, pairs, targets = random_case(size=(4, 5), map_size=(4, 5))
    for margin in (1.0, 5.0, 12.0, 25.0):
        right = torch.full_like(logits, -margin)
        for image, (queries, indices) in enumerate(pairs):
            for layer in range(LAYERS):
                masks = targets[image].selected(indices[layer])
                right[layer, image, queries[layer]] = torch.where(masks, margin, -margin).double()
        expected = slow_losses(right, pairs, targets, CONFIG)
        found = mask_losses(right.float(), pairs, targets, CONFIG)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=3e-7)
