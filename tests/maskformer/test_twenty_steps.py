"""Twenty optimization steps against a slow training loop that shares nothing with ours but the network.

The loop is written from the definitions, in doubles: matching, losses, AdamW, clipping, which tensor learns how fast
and decays (the published ResNet-50 recipe), warm-up and drop. What differs is the float noise of ours.

T steps, L decoder layers, B images, Q queries, K classes (index K is "no object"), N segments, H W padded image,
h w the map of the mask logits.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from maskformer.config import LossConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from maskformer.criterion import compute_losses
from maskformer.model import MaskFormer, MaskFormerOutput, build_model
from maskformer.optim import build_optimizer, learning_rate_factor
from maskformer.targets import Targets

STEPS = 20
MODEL = ModelConfig(
    backbone="small",
    num_classes=5,
    num_queries=8,
    hidden_dim=32,
    num_heads=4,
    feedforward_dim=64,
    encoder_layers=1,
    decoder_layers=2,
    dropout=0.0,
)
# Four steps up from a tenth, eight steps at the full rate, eight at a tenth.
SCHEDULE = ScheduleConfig(warmup_steps=4, warmup_start_factor=0.1, milestone_epochs=(3.0,))
STEPS_PER_EPOCH = 4.0


class Batch(NamedTuple):
    images: Tensor
    """[B, 3, H, W], 0 in the padding."""
    padding: Tensor
    """[B, H, W] bool."""
    targets: list[Targets]


def random_batch(step: int) -> Batch:
    """Draw two images of different sizes; a segment's color is its class."""
    generator = torch.Generator().manual_seed(step)
    numbers = {5: (4, 0), 6: (0, 0)}.get(step, (4, 3))
    padding = torch.ones(2, 60, 64, dtype=torch.bool)
    padding[0, :, :47], padding[1, :43] = False, False
    images, targets = torch.randn(2, 3, 60, 64, generator=generator) * 0.3, list[Targets]()
    for image, number in enumerate(numbers):
        blocks = torch.randint(0, number + 1, (5, 6), generator=generator)
        index_map = blocks.repeat_interleave(12, 0).repeat_interleave(11, 1)[:, :64].masked_fill(padding[image], 0)
        classes = torch.randint(0, MODEL.num_classes, (number,), generator=generator)
        colors = torch.cat([torch.zeros(1), classes + 1.0]) / 3
        images[image, 0] += colors[index_map]
        images[image, 1] -= colors[index_map]
        targets.append(Targets(classes, index_map))
    return Batch(images.masked_fill(padding[:, None], 0.0), padding, targets)


# ---- the slow loop


def slow_losses(output: MaskFormerOutput, targets: list[Targets]) -> Tensor:
    """[L, 3]: classification, focal and dice, weighted."""
    num_masks = max(1, sum(len(target.classes) for target in targets))
    by_layer: list[Tensor] = []
    for class_logits, mask_logits in zip(*output, strict=True):
        class_sum, weight_sum, focal_sum, dice_sum = torch.zeros(4, dtype=torch.float64)
        for image, target in enumerate(targets):
            query_of = slow_matching(class_logits[image].detach(), mask_logits[image].detach(), target)
            wanted = [MODEL.num_classes] * MODEL.num_queries
            for index, query in query_of.items():
                wanted[query] = int(target.classes[index])
                logits = F.interpolate(mask_logits[image, query][None, None], target.masks.shape, mode="bilinear")[0, 0]
                inside = target.masks == index + 1
                focal_sum = focal_sum + focal_pixels(logits, inside).mean()
                dice_sum = dice_sum + dice(logits, inside)
            for query, class_index in enumerate(wanted):
                weight = 0.1 if class_index == MODEL.num_classes else 1.0
                probability = class_logits[image, query].exp() / class_logits[image, query].exp().sum()
                class_sum = class_sum - weight * probability[class_index].log()
                weight_sum = weight_sum + weight
        by_layer.append(torch.stack([class_sum / weight_sum, 20.0 * focal_sum / num_masks, 1.0 * dice_sum / num_masks]))
    return torch.stack(by_layer)


def slow_matching(class_logits: Tensor, mask_logits: Tensor, target: Targets) -> dict[int, int]:
    """Return the query of each target, from a cost per pair."""
    height, width = mask_logits.shape[-2:]
    full_height, full_width = target.masks.shape
    rows, columns = torch.arange(height) * full_height // height, torch.arange(width) * full_width // width
    index_map = target.masks[rows[:, None], columns]
    costs = torch.zeros(MODEL.num_queries, len(target.classes), dtype=torch.float64)
    for query in range(MODEL.num_queries):
        probability = class_logits[query].exp() / class_logits[query].exp().sum()
        for index, class_index in enumerate(target.classes.tolist()):
            inside = index_map == index + 1
            focal_cost = focal_pixels(mask_logits[query], inside).mean()
            costs[query, index] = 20.0 * focal_cost + dice(mask_logits[query], inside) - probability[class_index]
    queries, indices = linear_sum_assignment(costs.numpy())
    return dict(zip(indices.tolist(), queries.tolist(), strict=True))


def focal_pixels(logits: Tensor, inside: Tensor) -> Tensor:
    share = 1 / (1 + (-logits).exp())
    return torch.where(inside, -0.25 * (1 - share) ** 2 * share.log(), -0.75 * share**2 * (1 - share).log())


def dice(logits: Tensor, inside: Tensor) -> Tensor:
    share = 1 / (1 + (-logits).exp())
    return 1 - (2 * share[inside].sum() + 1) / (share.sum() + inside.sum() + 1)


class Numbers(NamedTuple):
    """AdamW's numbers, as the published recipe has them unless a test says otherwise."""

    lr: float = 1e-4
    weight_decay: float = 1e-4
    eps: float = 1e-8


def rule(name: str, tensors: Mapping[str, Tensor], numbers: Numbers) -> tuple[float, float]:
    """Return a tensor's learning rate and weight decay: the backbone x0.1; norms and query embedding undecayed."""
    lr = numbers.lr * 0.1 if name.startswith("backbone.") else numbers.lr
    # Only a norm has a weight that is a vector, and its bias lies beside it.
    weight = tensors.get(name.rpartition(".")[0] + ".weight")
    is_norm = weight is not None and weight.dim() == 1
    return lr, 0.0 if is_norm or name == "query_embedding.weight" else numbers.weight_decay


def slow_factor(step: int) -> float:
    return (0.1 + 0.9 * step / 4 if step < 4 else 1.0) * (0.1 if step >= 12 else 1.0)


def slow_training(model: MaskFormer, batches: list[Batch], numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
    """Train in doubles; return the losses [T, L, 3] and the weights at the end."""
    model = copy.deepcopy(model).double()
    tensors = dict(model.named_parameters())
    first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    history: list[Tensor] = []
    for step, (images, padding, targets) in enumerate(batches):
        losses = slow_losses(model(images.double(), padding), targets)
        history.append(losses.detach())
        gradients = torch.autograd.grad(losses.sum(), list(tensors.values()), materialize_grads=True)
        norm = sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
            gradient = gradient * min(1.0, 0.01 / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean = first[name] / (1 - 0.9 ** (step + 1))
            deviation = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
            lr, decay = rule(name, tensors, numbers)
            lr *= slow_factor(step)
            tensor.data = tensor.data - lr * decay * tensor.data - lr * mean / (deviation + numbers.eps)
    return torch.stack(history), {name: tensor.detach() for name, tensor in tensors.items()}


# ---- the training code


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: on tensors this small a second thread only waits, for long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def training(model: MaskFormer, batches: list[Batch], config: OptimizerConfig) -> Tensor:
    """Train as a single worker does; return the losses [T, L, 3]."""
    optimizer = build_optimizer(model, config)
    history: list[Tensor] = []
    for step, (images, padding, targets) in enumerate(batches):
        factor = learning_rate_factor(step, STEPS, STEPS_PER_EPOCH, SCHEDULE)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        losses = compute_losses(model(images, padding), targets, LossConfig())
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        history.append(losses.by_layer.detach())
    return torch.stack(history)


NUMBERS = {
    "published": Numbers(),
    # Steps and decay of a size that shows in the losses; an eps that does not hide by how much gradients are clipped.
    "large": Numbers(lr=1e-3, weight_decay=0.3, eps=1e-5),
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
def test_twenty_steps_follow_the_slow_loop(numbers: Numbers) -> None:
    torch.manual_seed(1)
    model = build_model(MODEL)
    before = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    batches = [random_batch(step) for step in range(STEPS)]
    expected_losses, expected_weights = slow_training(model, batches, numbers)
    config = OptimizerConfig() if numbers == Numbers() else OptimizerConfig(**numbers._asdict())
    losses = training(model, batches, config)

    torch.testing.assert_close(losses.double(), expected_losses, rtol=1e-4, atol=0)
    for name, tensor in model.named_parameters():
        expected = expected_weights[name]
        difference, change = (expected - tensor.detach()).norm(), (expected - before[name]).norm()
        # The losses would not show a wrong rule for a small tensor. A float32 weight rounds every step, hence 1e-6.
        assert difference <= 1e-2 * change + 1e-6 * expected.norm(), name
