"""The losses of every decoder layer, and their gradients, against those of Hugging Face transformers.

Its criterion gets our logits, one layer at a time. Its own intermediate outputs would be others: they lack the final
norm, and the first of them comes before any layer.

L decoder layers, B images, Q queries, K classes (index K is "no object"), N segments, H W padded image.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers.models.maskformer.modeling_maskformer import MaskFormerHungarianMatcher, MaskFormerLoss

from maskformer.config import LossConfig, ModelConfig
from maskformer.criterion import compute_losses
from maskformer.matcher import match_layers
from maskformer.model import MaskFormerOutput, build_model
from maskformer.targets import Targets

NUM_LAYERS, NUM_QUERIES, NUM_CLASSES = 6, 100, 133
CONFIG = LossConfig()
# Its criterion returns classification, focal and dice without their weights; its matcher takes the weights.
WEIGHTS = torch.tensor([1.0, 20.0, 1.0])
PEER = MaskFormerLoss(
    num_labels=NUM_CLASSES,
    matcher=MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0),
    weight_dict={},
    eos_coef=0.1,
)

CASES: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "several images": ((64, 96), (5, 1, 12)),
    "odd sizes": ((61, 83), (4, 9)),
    "smaller than a cell of the mask logits": ((3, 70), (2, 3)),
    "one image empty": ((48, 53), (3, 0, 7)),
    "all images empty": ((32, 40), (0, 0)),
    "as many as queries": ((40, 64), (100, 2)),
}


def random_targets(generator: torch.Generator, size: tuple[int, int], num_targets: int) -> Targets:
    """Draw blocks of 5 x 7 pixels, which no stride divides, above padding at the bottom and the right."""
    height, width = size
    blocks = torch.randint(0, num_targets + 1, (-(-height // 5), -(-width // 7)), generator=generator)
    index_map = blocks.repeat_interleave(5, dim=0).repeat_interleave(7, dim=1)[:height, :width].int()
    if num_targets % 2:
        index_map[height * 3 // 4 :], index_map[:, width * 2 // 3 :] = 0, 0
    return Targets(torch.randint(0, NUM_CLASSES, (num_targets,), generator=generator), index_map)


def random_case(
    size: tuple[int, int], segments: Sequence[int], scale: float = 3.0
) -> tuple[MaskFormerOutput, list[Targets]]:
    generator = torch.Generator().manual_seed(len(segments) * size[1])
    targets = [random_targets(generator, size, num_targets) for num_targets in segments]
    shape = (NUM_LAYERS, len(segments), NUM_QUERIES)
    class_logits = torch.randn(*shape, NUM_CLASSES + 1, generator=generator) * scale
    mask_logits = torch.randn(*shape, *(-(-side // 4) for side in size), generator=generator) * scale
    return MaskFormerOutput(class_logits.requires_grad_(), mask_logits.requires_grad_()), targets


def labels(targets: Sequence[Targets]) -> tuple[list[Tensor], list[Tensor]]:
    """Return each image's masks [N, H, W] as floats and its classes [N], made without the code under test."""
    masks = [
        torch.stack([target.masks == number for number in range(1, len(target.classes) + 1)]).float()
        if len(target.classes)
        else torch.zeros(0, *target.masks.shape[-2:])
        for target in targets
    ]
    return masks, [target.classes for target in targets]


def peer_losses(output: MaskFormerOutput, targets: Sequence[Targets]) -> Tensor:
    """[L, 3]: classification, focal and dice, weighted."""
    by_layer: list[Tensor] = []
    for class_logits, mask_logits in zip(*output, strict=True):
        losses = PEER(mask_logits, class_logits, *labels(targets))
        by_layer.append(torch.stack([losses[f"loss_{name}"] for name in ("cross_entropy", "mask", "dice")]))
    return torch.stack(by_layer) * WEIGHTS


def assert_same_assignment(output: MaskFormerOutput, targets: Sequence[Targets]) -> None:
    ours = match_layers(*output, targets, CONFIG)
    for layer, (class_logits, mask_logits) in enumerate(zip(*output, strict=True)):
        for mine, theirs in zip(ours, PEER.matcher(mask_logits, class_logits, *labels(targets)), strict=True):
            assert all(torch.equal(a[layer], b) for a, b in zip(mine, theirs, strict=True))


def relative_difference(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected; 0 where both are 0."""
    return float((value - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


@pytest.mark.parametrize("scale", [0.3, 3.0, 15.0], ids=["undecided", "usual", "saturated"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_random_logits(case: str, scale: float) -> None:
    output, targets = random_case(*CASES[case], scale)
    assert_same_assignment(output, targets)

    ours, theirs = compute_losses(output, targets, CONFIG), peer_losses(output, targets)
    torch.testing.assert_close(ours.by_layer, theirs, rtol=1e-5, atol=0)

    gradients = torch.autograd.grad(ours.total, output)
    expected = torch.autograd.grad(theirs.sum(), output)
    for layer in range(NUM_LAYERS):
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert relative_difference(gradient[layer], wanted[layer]) <= 1e-4


def test_more_segments_than_queries_divide_by_all_of_them() -> None:
    """Ours divides by the masks it matches, as mmdetection 2.25 does; Hugging Face counts them all."""
    output, targets = random_case((60, 100), (112, 5))
    assert_same_assignment(output, targets)
    theirs = peer_losses(output, targets)
    torch.testing.assert_close(compute_losses(output, targets, CONFIG, 117).by_layer, theirs, rtol=1e-5, atol=0)
    ratio = torch.tensor([1, 117 / 105, 117 / 105])
    torch.testing.assert_close(compute_losses(output, targets, CONFIG).by_layer, theirs * ratio, rtol=1e-5, atol=0)


def test_gradients_of_every_parameter_of_a_small_model() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="small", hidden_dim=32, num_heads=4, feedforward_dim=64, encoder_layers=1, dropout=0.0
    )
    model = build_model(config)
    size = (45, 59)
    padding = torch.zeros(2, *size, dtype=torch.bool)
    padding[0, 37:], padding[1, :, 41:] = True, True
    images = torch.randn(2, 3, *size).masked_fill(padding[:, None], 0.0)
    generator = torch.Generator().manual_seed(0)
    targets = [random_targets(generator, size, num_targets) for num_targets in (7, 3)]
    output = model(images, padding)
    assert_same_assignment(output, targets)

    ours, theirs = compute_losses(output, targets, CONFIG), peer_losses(output, targets)
    assert ours.by_layer.numel() == 18
    torch.testing.assert_close(ours.by_layer, theirs, rtol=1e-5, atol=0)

    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(ours.total, parameters, retain_graph=True)
    expected = torch.autograd.grad(theirs.sum(), parameters)
    for name, gradient, wanted in zip(names, gradients, expected, strict=True):
        assert relative_difference(gradient, wanted) <= 1e-4, name
