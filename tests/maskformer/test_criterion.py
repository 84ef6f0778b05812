import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig
from maskformer.criterion import compute_losses
from maskformer.matcher import match
from maskformer.model import MaskFormerOutput
from maskformer.targets import Targets

CONFIG = LossConfig()
UNEQUAL = LossConfig(
    classification_weight=2.0, focal_weight=7.0, dice_weight=3.0, no_object_weight=0.3, focal_alpha=0.4, focal_gamma=1.5
)
NUM_CLASSES, NUM_QUERIES, NUM_LAYERS = 5, 6, 3


def random_targets(seed: int, num_targets: int) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, NUM_CLASSES, (num_targets,), generator=generator)
    return Targets(classes, torch.randint(0, num_targets + 1, (9, 14), generator=generator, dtype=torch.int32))


def random_output(num_images: int, scale: float = 3.0, seed: int = 0) -> MaskFormerOutput:
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(NUM_LAYERS, num_images, NUM_QUERIES, NUM_CLASSES + 1, generator=generator) * scale
    mask_logits = torch.randn(NUM_LAYERS, num_images, NUM_QUERIES, 3, 4, generator=generator) * scale
    return MaskFormerOutput(class_logits.requires_grad_(), mask_logits.requires_grad_())


BATCHES = {
    "usual": [random_targets(1, 3), random_targets(2, 1)],
    "one image empty": [random_targets(1, 0), random_targets(2, 4)],
    "all empty": [random_targets(1, 0), random_targets(2, 0)],
    "more targets than queries": [random_targets(1, 9), random_targets(2, 2)],
    "as many as queries": [random_targets(1, 6)],
}


def log_sigmoid(logit: float) -> float:
    return -math.log1p(math.exp(-logit)) if logit > 0 else logit - math.log1p(math.exp(logit))


def slow_losses(
    output: MaskFormerOutput, targets: list[Targets], config: LossConfig, num_masks: float | None = None
) -> list[list[float]]:
    """[L][classification, focal, dice], weighted: one layer, image, query and pixel after the other, in doubles."""
    if num_masks is None:
        num_masks = max(1, sum(min(len(target.classes), NUM_QUERIES) for target in targets))
    by_layer = []
    for class_logits, mask_logits in zip(output.class_logits.detach(), output.mask_logits.detach(), strict=True):
        class_sum = weight_sum = focal_sum = dice_sum = 0.0
        pairs = match(class_logits, mask_logits, targets, config)
        for image, (target, (queries, indices)) in enumerate(zip(targets, pairs, strict=True)):
            index_of = dict(zip(queries.tolist(), indices.tolist(), strict=True))
            height, width = target.masks.shape[-2:]
            size = (height, width)
            full = F.interpolate(mask_logits[image : image + 1].double(), size, mode="bilinear", align_corners=False)[0]
            for query in range(NUM_QUERIES):
                row = class_logits[image, query].double().tolist()
                wanted, weight = NUM_CLASSES, config.no_object_weight
                if query in index_of:
                    wanted, weight = int(target.classes[index_of[query]]), 1.0
                highest = max(row)
                log_sum = highest + math.log(sum(math.exp(logit - highest) for logit in row))
                class_sum += weight * (log_sum - row[wanted])
                weight_sum += weight
                if query not in index_of:
                    continue
                pixel_sum = share_sum = target_sum = common = 0.0
                for i in range(height):
                    for j in range(width):
                        if target.masks.ndim == 3:
                            inside = bool(target.masks[index_of[query], i, j])
                        else:
                            inside = int(target.masks[i, j]) == index_of[query] + 1
                        logit = float(full[query, i, j])
                        log_right = log_sigmoid(logit if inside else -logit)
                        alpha = config.focal_alpha if inside else 1 - config.focal_alpha
                        pixel_sum += alpha * (1 - math.exp(log_right)) ** config.focal_gamma * -log_right
                        share = math.exp(log_sigmoid(logit))
                        share_sum += share
                        target_sum += inside
                        common += share * inside
                focal_sum += pixel_sum / (height * width)
                dice_sum += 1 - (2 * common + 1) / (share_sum + target_sum + 1)
        by_layer.append(
            [
                config.classification_weight * class_sum / weight_sum,
                config.focal_weight * focal_sum / num_masks,
                config.dice_weight * dice_sum / num_masks,
            ]
        )
    return by_layer


@pytest.mark.parametrize("config", [CONFIG, UNEQUAL], ids=["published", "unequal"])
@pytest.mark.parametrize("batch", BATCHES)
def test_losses_equal_the_slow_definition(batch: str, config: LossConfig):
    targets = BATCHES[batch]
    for num_masks in (None, 2.5):
        output = random_output(len(targets))
        losses = compute_losses(output, targets, config, num_masks)
        expected = torch.tensor(slow_losses(output, targets, config, num_masks))
        torch.testing.assert_close(losses.by_layer, expected, rtol=2e-5, atol=1e-6)
        classification, focal, dice = expected.sum(dim=0)
        torch.testing.assert_close(losses.classification, classification, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(losses.focal, focal, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(losses.dice, dice, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(losses.total, expected.sum(), rtol=2e-5, atol=1e-6)


def test_all_layers_in_one_pass_equal_layer_by_layer():
    targets = BATCHES["usual"]
    output = random_output(2)
    together = compute_losses(output, targets, CONFIG)
    together.total.backward()
    for layer in range(NUM_LAYERS):
        one = MaskFormerOutput(*(logits.detach()[layer : layer + 1].requires_grad_() for logits in output))
        alone = compute_losses(one, targets, CONFIG)
        alone.total.backward()
        torch.testing.assert_close(together.by_layer[layer], alone.by_layer[0])
        for logits, logits_alone in zip(output, one, strict=True):
            torch.testing.assert_close(gradient(logits)[layer], gradient(logits_alone)[0])


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_an_index_map_equals_its_masks():
    planes = BATCHES["more targets than queries"]
    masks = [Targets(target.classes, target.selected(torch.arange(len(target)))) for target in planes]
    output = random_output(2)
    assert torch.equal(compute_losses(output, planes, CONFIG).by_layer, compute_losses(output, masks, CONFIG).by_layer)


def test_masks_may_overlap():
    masks = torch.zeros(2, 9, 14, dtype=torch.bool)
    masks[0, 2:7], masks[1, :, 4:9] = True, True
    targets = [Targets(torch.tensor([1, 2]), masks)]
    output = random_output(1)
    losses = compute_losses(output, targets, CONFIG)
    torch.testing.assert_close(
        losses.by_layer, torch.tensor(slow_losses(output, targets, CONFIG)), rtol=2e-5, atol=1e-6
    )


@pytest.mark.parametrize("batch", ["one image empty", "all empty"])
def test_images_without_targets_give_every_output_a_gradient(batch: str):
    targets = BATCHES[batch]
    output = random_output(2)
    losses = compute_losses(output, targets, CONFIG)
    losses.total.backward()
    assert gradient(output.class_logits).abs().sum(dim=-1).gt(0).all()
    assert torch.equal(gradient(output.mask_logits)[:, 0], torch.zeros(NUM_LAYERS, NUM_QUERIES, 3, 4))
    if batch == "all empty":
        assert (losses.focal, losses.dice) == (0, 0)
        assert losses.total == losses.classification


@pytest.mark.parametrize("batch", BATCHES)
def test_gradients_equal_finite_differences_of_the_slow_definition(batch: str):
    targets = BATCHES[batch]
    output = random_output(len(targets), scale=1.0)
    compute_losses(output, targets, CONFIG).total.backward()
    # Differences of doubles around one class and one mask logit; small enough to leave the matching as it is.
    step = 1e-4
    for which, position in ((0, (1, 0, 2, 3)), (1, (2, 0, 0, 1, 2)), (1, (0, 0, 4, 2, 0))):
        totals = []
        for sign in (1, -1):
            moved = [logits.detach().double() for logits in output]
            moved[which][position] += sign * step
            totals.append(sum(map(sum, slow_losses(MaskFormerOutput(*moved), targets, CONFIG))))
        difference = (totals[0] - totals[1]) / (2 * step)
        assert gradient(output[which])[position].item() == pytest.approx(difference, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("scale", [100.0, 1e4])
@pytest.mark.parametrize("config", [CONFIG, LossConfig(focal_gamma=0.0)], ids=["published", "gamma 0"])
def test_gradients_are_finite_at_extreme_logits(scale: float, config: LossConfig):
    for sign in (1, -1):
        output = random_output(2)
        extreme = MaskFormerOutput(*((sign * scale * logits.detach().sign()).requires_grad_() for logits in output))
        losses = compute_losses(extreme, BATCHES["usual"], config)
        losses.total.backward()
        assert losses.by_layer.isfinite().all()
        assert gradient(extreme.class_logits).isfinite().all()
        assert gradient(extreme.mask_logits).isfinite().all()
        assert gradient(extreme.mask_logits).abs().sum() > 0


def test_autocast_does_not_change_the_losses():
    output = random_output(2)
    low = MaskFormerOutput(*(logits.detach().bfloat16().requires_grad_() for logits in output))
    expected = compute_losses(MaskFormerOutput(*(logits.float() for logits in low)), BATCHES["usual"], CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        losses = compute_losses(low, BATCHES["usual"], CONFIG)
    assert losses.by_layer.dtype == torch.float32
    assert torch.equal(losses.by_layer, expected.by_layer)


def test_micro_batches_with_a_common_divisor_add_up_to_the_full_batch():
    """The trainer relies on it: mask losses divided by the mean number of masks average to those of the full batch."""
    targets = [*BATCHES["usual"], *BATCHES["one image empty"]]
    output = random_output(4)
    full = compute_losses(output, targets, CONFIG)
    num_masks = sum(len(target) for target in targets) / 2
    halves = [
        compute_losses(MaskFormerOutput(*(logits[:, part] for logits in output)), targets[part], CONFIG, num_masks)
        for part in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close((halves[0].focal + halves[1].focal) / 2, full.focal)
    torch.testing.assert_close((halves[0].dice + halves[1].dice) / 2, full.dice)


def test_a_no_object_weight_of_zero_without_targets_is_no_loss():
    losses = compute_losses(random_output(2), BATCHES["all empty"], LossConfig(no_object_weight=0.0))
    assert losses.total == 0


@pytest.mark.parametrize("num_masks", [0.0, -1.0, math.nan])
def test_refuses_a_divisor_that_is_not_positive(num_masks: float):
    with pytest.raises(ValueError, match="num_masks must be positive"):
        compute_losses(random_output(2), BATCHES["usual"], CONFIG, num_masks)


def test_refuses_logits_that_are_not_finite():
    output = random_output(2)
    output.mask_logits.data[1, 0, 2, 1, 1] = math.nan
    with pytest.raises(ValueError, match=r"mask_logits of image 0 .* layer 1"):
        compute_losses(output, BATCHES["usual"], CONFIG)
