"""Parameter groups against the published table, learning rates against exact fractions."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from maskformer.config import DEMO, R50, ModelConfig, OptimizerConfig, ScheduleConfig
from maskformer.model import build_model
from maskformer.optim import AveragedWeights, build_optimizer, learning_rate_factor, parameter_groups

# ---- groups


def test_r50_groups_are_the_published_ones() -> None:
    with torch.device("meta"):
        model = build_model(R50)
    tensors: Counter[tuple[float, float]] = Counter()
    for group in parameter_groups(model, OptimizerConfig()):
        tensors[round(group["lr"], 12), group["weight_decay"]] += len(group["params"])
    assert tensors == {(1e-5, 1e-4): 53, (1e-4, 1e-4): 139, (1e-4, 0.0): 77}


@pytest.mark.parametrize("config", [R50, DEMO], ids=["r50", "demo"])
def test_each_trainable_parameter_is_in_one_group(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = build_model(config)
    groups = parameter_groups(model, OptimizerConfig())
    listed = Counter(id(parameter) for group in groups for parameter in group["params"])
    assert listed == {id(parameter): 1 for parameter in model.parameters() if parameter.requires_grad}
    assert all(group["params"] for group in groups)


def test_every_group_follows_its_own_settings() -> None:
    model = build_model(DEMO)
    config = OptimizerConfig(
        lr=2.0,
        backbone_lr_multiplier=0.25,
        weight_decay=0.1,
        norm_weight_decay=0.2,
        backbone_norm_weight_decay=0.4,
        query_weight_decay=0.3,
    )
    groups = {group["name"]: group for group in build_optimizer(model, config).param_groups}
    assert {name: (group["lr"], group["initial_lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "backbone": (0.5, 0.5, 0.1),
        "backbone norms": (0.5, 0.5, 0.4),
        "heads": (2.0, 2.0, 0.1),
        "head norms": (2.0, 2.0, 0.2),
        "queries": (2.0, 2.0, 0.3),
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    listed = {name: [names[id(parameter)] for parameter in group["params"]] for name, group in groups.items()}
    assert listed["queries"] == ["query_embedding.weight"]
    assert all(name.startswith("backbone.") for name in listed["backbone"] + listed["backbone norms"])
    assert not any(name.startswith("backbone.") for name in listed["heads"] + listed["head norms"])
    assert all(model.get_parameter(name).dim() == 1 for name in listed["backbone norms"] + listed["head norms"])
    assert all(model.get_parameter(name).dim() == 4 for name in listed["backbone"])
    assert "class_head.bias" in listed["heads"]


def test_groups_with_equal_settings_are_one() -> None:
    """Every parameter keeps the rate and the decay that it has if all groups differ."""
    model = build_model(DEMO)
    distinct = OptimizerConfig(norm_weight_decay=0.2, backbone_norm_weight_decay=0.4, query_weight_decay=0.3)
    equal = OptimizerConfig(backbone_lr_multiplier=1.0, norm_weight_decay=0.0, query_weight_decay=0.0)
    groups = {group["name"]: group for group in parameter_groups(model, equal)}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()} == {
        "backbone, heads": (1e-4, 1e-4),
        "backbone norms, head norms, queries": (1e-4, 0.0),
    }
    for name, group in groups.items():
        apart = [part for part in parameter_groups(model, distinct) if part["name"] in name.split(", ")]
        assert [id(p) for p in group["params"]] == [id(p) for part in apart for p in part["params"]]


def test_a_state_of_other_groups_is_refused() -> None:
    """The state has no names of parameters, only their order, which depends on the groups."""
    model = build_model(DEMO)
    apart = build_optimizer(model, OptimizerConfig(norm_weight_decay=0.2, query_weight_decay=0.3)).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        build_optimizer(model, OptimizerConfig()).load_state_dict(apart)


def test_a_step_without_gradient_only_decays() -> None:
    model = build_model(DEMO)
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1, backbone_lr_multiplier=0.5, weight_decay=0.2))
    shrinks = {
        parameter: 1 - group["lr"] * group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    before = {parameter: parameter.detach().clone() for parameter in shrinks}
    for parameter in shrinks:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert {round(shrink, 6) for shrink in shrinks.values()} == {0.98, 0.99, 1.0}
    for parameter, shrink in shrinks.items():
        torch.testing.assert_close(parameter.detach(), before[parameter] * shrink)


def test_adamw_gets_its_betas_and_eps() -> None:
    optimizer = build_optimizer(build_model(DEMO), OptimizerConfig(betas=(0.8, 0.95), eps=1e-5))
    assert all(group["betas"] == (0.8, 0.95) and group["eps"] == 1e-5 for group in optimizer.param_groups)


# ---- schedule


def test_default_drops_after_epoch_50() -> None:
    steps = 118_287 // 16
    factors = [learning_rate_factor(step, 75 * steps, float(steps), ScheduleConfig()) for step in range(75 * steps)]
    assert factors == [1.0] * (50 * steps) + [0.1] * (25 * steps)


def test_a_milestone_is_the_first_step_that_begins_after_its_epoch() -> None:
    """With N images and a global batch G, step s begins after s * G images."""
    for images in range(1, 60):
        for batch in range(1, 20):
            for epochs in (1.0, 2.0, 3.0, 7.0, 10.0):
                config = ScheduleConfig(milestone_epochs=(epochs,))
                first = math.ceil(Fraction(int(epochs) * images, batch))
                assert learning_rate_factor(first, 10_000, images / batch, config) == 0.1
                assert learning_rate_factor(first - 1, 10_000, images / batch, config) == 1.0


def test_each_milestone_takes_a_tenth() -> None:
    config = ScheduleConfig(milestone_epochs=(0.5, 2.0, 3.0))
    factors = [learning_rate_factor(step, 20, 4.0, config) for step in (0, 1, 2, 7, 8, 11, 12, 19)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_warmup_follows_the_published_formula() -> None:
    config = ScheduleConfig(warmup_steps=1500, milestone_epochs=(250.0,))
    for step in (0, 1, 750, 1499):
        published = 1 - (1 - step / 1500) * (1 - 1e-6)
        assert learning_rate_factor(step, 554_400, 1848.0, config) == pytest.approx(published, rel=1e-12)
    assert learning_rate_factor(1500, 554_400, 1848.0, config) == 1.0


def test_warmup_multiplies_the_drop() -> None:
    config = ScheduleConfig(warmup_steps=100, warmup_start_factor=0.5, milestone_epochs=(1.0,))
    assert learning_rate_factor(50, 200, 10.0, config) == pytest.approx(0.75 * 0.1)


def test_cosine_falls_from_the_end_of_the_warmup_to_zero() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, warmup_start_factor=0.0)
    factors = [learning_rate_factor(step, 110, 5.0, config) for step in range(111)]
    assert factors[:11] == pytest.approx([step / 10 for step in range(11)])
    assert factors[10:] == pytest.approx([math.cos(math.pi * part / 200) ** 2 for part in range(101)])
    assert factors[110] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", ["step", "cosine"])
def test_a_run_shorter_than_its_warmup_has_a_rate(kind: Literal["step", "cosine"]) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=10, warmup_start_factor=0.0)
    assert learning_rate_factor(3, 5, 5.0, config) == pytest.approx(0.3)


# ---- refusals


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OptimizerConfig(lr=0.0), r"optimizer\.lr must be positive, got 0"),
        (lambda: OptimizerConfig(lr=math.nan), r"optimizer\.lr must be positive, got nan"),
        (lambda: OptimizerConfig(eps=0.0), r"optimizer\.eps"),
        (lambda: OptimizerConfig(backbone_lr_multiplier=-1.0), r"optimizer\.backbone_lr_multiplier"),
        (lambda: OptimizerConfig(weight_decay=-0.1), r"optimizer\.weight_decay"),
        (lambda: OptimizerConfig(norm_weight_decay=math.inf), r"optimizer\.norm_weight_decay"),
        (lambda: OptimizerConfig(query_weight_decay=-0.1), r"optimizer\.query_weight_decay"),
        (lambda: OptimizerConfig(clip_norm=-0.01), r"optimizer\.clip_norm"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer\.betas must lie in \[0, 1\)"),
        (lambda: ScheduleConfig(warmup_steps=-1), r"schedule\.warmup_steps"),
        (lambda: ScheduleConfig(warmup_start_factor=1.5), r"schedule\.warmup_start_factor"),
        (lambda: ScheduleConfig(milestone_epochs=(0.0,)), r"schedule\.milestone_epochs"),
        (lambda: ScheduleConfig(milestone_epochs=(60.0, 50.0)), r"schedule\.milestone_epochs .* got \(60\.0, 50\.0\)"),
        (lambda: ScheduleConfig(milestone_epochs=(50.0, 50.0)), r"schedule\.milestone_epochs"),
    ],
)
def test_invalid_values_are_refused(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# ---- averaged weights


class _Network(nn.Module):
    """Has a trained, a frozen and a buffer of each kind, as a backbone with frozen norms does."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(37, 5, dtype=dtype)
        self.frozen = nn.Linear(3, 2, dtype=dtype).requires_grad_(False)
        self.norm = nn.BatchNorm1d(5, dtype=dtype)


def trained(network: nn.Module, steps: int, seed: int) -> Iterator[nn.Module]:
    """Change every tensor of the network, step by step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            else:
                tensor += 1
        yield network


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
@pytest.mark.parametrize("decay", [0.9999, 0.9, 0.25])
def test_averages_are_those_of_the_definition(dtype: torch.dtype, tolerance: float, decay: float) -> None:
    """After T steps, the average is decay^T w_0 + (1 - decay) sum_t decay^(T - t) w_t."""
    torch.manual_seed(0)
    network = _Network(dtype)
    averaged = AveragedWeights(network, decay)
    assert bits(averaged.state_dict()) == bits(network.state_dict())
    history = [{name: tensor.clone() for name, tensor in network.state_dict().items()}]
    for after in trained(network, 20, 1):
        averaged.update(after)
        history.append({name: tensor.clone() for name, tensor in after.state_dict().items()})
    found = averaged.state_dict()
    assert found.keys() == network.state_dict().keys()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            weights = [decay**20, *((1 - decay) * decay ** (20 - step) for step in range(1, 21))]
            expected = sum(w * past[name].double() for w, past in zip(weights, history, strict=True))
            assert isinstance(expected, Tensor)
            torch.testing.assert_close(found[name].double(), expected, rtol=tolerance, atol=tolerance)
    for name in ("frozen.weight", "frozen.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
        assert torch.equal(found[name], network.state_dict()[name])


def test_averages_continue_bit_for_bit_from_their_tensors() -> None:
    torch.manual_seed(0)
    network = _Network(torch.float32)
    averaged = AveragedWeights(network, 0.99)
    saved = None
    for step, after in enumerate(trained(network, 10, 1)):
        averaged.update(after)
        if saved is not None:
            saved[0].update(after)
        if step == 4:
            tensors = {name: tensor.clone() for name, tensor in averaged.state_dict().items()}
            saved = (AveragedWeights(_Network(torch.float32), 0.99), averaged)
            saved[0].load_state_dict(tensors)
    assert saved is not None
    assert bits(saved[0].state_dict()) == bits(averaged.state_dict())
    with pytest.raises(KeyError, match=r"frozen\.weight"):
        averaged.load_state_dict({name: t for name, t in averaged.state_dict().items() if name != "frozen.weight"})


def test_averaged_weights_are_lent_to_a_model_and_the_trained_ones_returned() -> None:
    torch.manual_seed(0)
    network = _Network(torch.float32)
    averaged = AveragedWeights(network, 0.9)
    for after in trained(network, 3, 1):
        averaged.update(after)
    with torch.no_grad():
        network.linear.weight[0, :2] = torch.tensor([float("nan"), -0.0])
    parameters = list(network.parameters())
    own, average = bits(network.state_dict()), bits(averaged.state_dict())
    assert own != average
    with averaged.swapped(network):
        assert bits(network.state_dict()) == average
    assert bits(network.state_dict()) == own
    with pytest.raises(ZeroDivisionError), averaged.swapped(network):
        raise ZeroDivisionError
    assert bits(network.state_dict()) == own
    assert bits(averaged.state_dict()) == average
    # The optimizer and the gradient reduction hold these very objects.
    assert all(now is before for now, before in zip(network.parameters(), parameters, strict=True))
