import itertools
import math

import pytest
import torch
from torch import Tensor

from maskformer.config import LossConfig
from maskformer.matcher import NonFiniteLogitsError, match, match_layers, matching_costs
from maskformer.targets import Targets

CONFIG = LossConfig()
UNEQUAL = LossConfig(classification_weight=2.0, focal_weight=7.0, dice_weight=3.0, focal_alpha=0.4, focal_gamma=1.5)


def random_case(seed: int, num_queries: int, num_targets: int, layers: int = 1, scale: float = 3.0):
    """Class logits [L,1,Q,6], mask logits [L,1,Q,4,5] and targets of size 8x10."""
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn(layers, 1, num_queries, 6, generator=generator) * scale
    mask_logits = torch.randn(layers, 1, num_queries, 4, 5, generator=generator) * scale
    classes = torch.randint(0, 5, (num_targets,), generator=generator)
    index_map = torch.randint(0, num_targets + 1, (8, 10), generator=generator, dtype=torch.int32)
    return class_logits, mask_logits, Targets(classes, index_map)


def slow_costs(class_logits: Tensor, mask_logits: Tensor, targets: Targets, config: LossConfig) -> list[list[float]]:
    """One image, one layer, in doubles and loops, written from the definition."""
    num_queries, height, width = mask_logits.shape
    full_height, full_width = targets.masks.shape[-2:]
    costs = [[0.0] * len(targets) for _ in range(num_queries)]
    for query in range(num_queries):
        exponentials = [math.exp(logit) for logit in class_logits[query].tolist()]
        for index, class_index in enumerate(targets.classes.tolist()):
            focal_sum = share_sum = target_sum = common = 0.0
            for i, j in itertools.product(range(height), range(width)):
                source = targets.masks[..., i * full_height // height, j * full_width // width]
                inside = bool(source[index]) if targets.masks.ndim == 3 else int(source) == index + 1
                share = 1 / (1 + math.exp(-float(mask_logits[query, i, j])))
                if inside:
                    focal_sum += config.focal_alpha * (1 - share) ** config.focal_gamma * -math.log(share)
                else:
                    focal_sum += (1 - config.focal_alpha) * share**config.focal_gamma * -math.log(1 - share)
                share_sum += share
                target_sum += inside
                common += share * inside
            costs[query][index] = (
                config.classification_weight * -exponentials[class_index] / sum(exponentials)
                + config.focal_weight * focal_sum / (height * width)
                + config.dice_weight * (1 - (2 * common + 1) / (share_sum + target_sum + 1))
            )
    return costs


@pytest.mark.parametrize("config", [CONFIG, UNEQUAL], ids=["published", "unequal"])
@pytest.mark.parametrize("as_masks", [False, True])
def test_costs_equal_the_slow_definition(config: LossConfig, as_masks: bool):
    for seed in range(5):
        class_logits, mask_logits, targets = random_case(seed, num_queries=4, num_targets=3)
        if as_masks:
            overlapping = targets.selected(torch.arange(3)) | (torch.arange(80).view(8, 10) % 7 == seed)
            targets = Targets(targets.classes, overlapping)
        ((costs,), _) = matching_costs(class_logits, mask_logits, [targets], config)
        expected = torch.tensor(slow_costs(class_logits[0, 0], mask_logits[0, 0], targets, config))
        torch.testing.assert_close(costs[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("piece", [1, 7, 13, 200])
def test_pieces_of_any_size_give_the_same_costs(piece: int, monkeypatch: pytest.MonkeyPatch):
    class_logits, mask_logits, targets = random_case(0, num_queries=4, num_targets=3, layers=2)
    whole = matching_costs(class_logits, mask_logits, [targets], CONFIG)
    monkeypatch.setattr("maskformer.pieces._CPU_PIECE", piece)
    pieces = matching_costs(class_logits, mask_logits, [targets], CONFIG)
    torch.testing.assert_close(pieces[0][0], whole[0][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_targets"), [(4, 4), (6, 3), (3, 5), (5, 1), (1, 3)])
def test_the_assignment_is_the_cheapest_of_all(num_queries: int, num_targets: int):
    for seed in range(8):
        class_logits, mask_logits, targets = random_case(seed, num_queries, num_targets, scale=1.0)
        costs = slow_costs(class_logits[0, 0], mask_logits[0, 0], targets, CONFIG)
        pairs = min(num_queries, num_targets)
        cheapest = min(
            sum(costs[query][index] for query, index in zip(queries, indices, strict=True))
            for queries in itertools.combinations(range(num_queries), pairs)
            for indices in itertools.permutations(range(num_targets), pairs)
        )
        ((queries, indices),) = match(class_logits[0], mask_logits[0], [targets], CONFIG)
        assert queries.dtype == indices.dtype == torch.int64
        assert len(queries) == len(set(indices.tolist())) == pairs
        assert queries.tolist() == sorted(set(queries.tolist()))
        total = sum(costs[query][index] for query, index in zip(queries.tolist(), indices.tolist(), strict=True))
        assert total == pytest.approx(cheapest, abs=1e-5)


def test_each_layer_and_image_is_matched_separately():
    cases = [random_case(seed, num_queries=6, num_targets=seed, layers=3) for seed in range(4)]
    class_logits = torch.cat([case[0] for case in cases], dim=1)
    mask_logits = torch.cat([case[1] for case in cases], dim=1)
    together = match_layers(class_logits, mask_logits, [case[2] for case in cases], CONFIG)
    assert any(not torch.equal(indices[0], indices[1]) for _, indices in together)
    for image, (case_class_logits, case_mask_logits, targets) in enumerate(cases):
        for layer in range(3):
            ((queries, indices),) = match(case_class_logits[layer], case_mask_logits[layer], [targets], CONFIG)
            assert torch.equal(together[image][0][layer], queries)
            assert torch.equal(together[image][1][layer], indices)


def test_an_image_without_targets_has_no_pairs():
    class_logits, mask_logits, targets = random_case(0, num_queries=3, num_targets=0)
    ((queries, indices),) = match(class_logits[0], mask_logits[0], [targets], CONFIG)
    assert queries.shape == indices.shape == (0,)
    assert queries.dtype == torch.int64


def test_costs_stay_apart_at_large_logits():
    """Logarithms of float32 probabilities would saturate at 17 and make these equal."""
    mask_logits = torch.tensor([-100.0, -50.0, 50.0, 100.0])[:, None, None].expand(4, 2, 2)[None, None]
    targets = Targets(torch.tensor([0]), torch.ones(2, 2, dtype=torch.int32))
    ((costs,), _) = matching_costs(torch.zeros(1, 1, 4, 6), mask_logits, [targets], LossConfig(dice_weight=0.0))
    expected = [20 * 0.25 * 100 - 1 / 6, 20 * 0.25 * 50 - 1 / 6, -1 / 6, -1 / 6]
    torch.testing.assert_close(costs[0, :, 0], torch.tensor(expected))


def test_autocast_and_low_precision_do_not_change_the_costs():
    class_logits, mask_logits, targets = random_case(0, num_queries=5, num_targets=4)
    class_logits, mask_logits = class_logits.bfloat16(), mask_logits.bfloat16()
    ((expected,), _) = matching_costs(class_logits.float(), mask_logits.float(), [targets], CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        ((costs,), _) = matching_costs(class_logits, mask_logits, [targets], CONFIG)
    assert costs.dtype == torch.float32
    assert torch.equal(costs, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["class_logits", "mask_logits"])
@pytest.mark.parametrize("num_targets", [0, 2])
def test_refuses_logits_that_are_not_finite(value: float, name: str, num_targets: int):
    cases = [random_case(seed, num_queries=3, num_targets=num_targets, layers=4) for seed in range(2)]
    logits = {
        "class_logits": torch.cat([case[0] for case in cases], dim=1),
        "mask_logits": torch.cat([case[1] for case in cases], dim=1),
    }
    logits[name][2, 1, 0, 1] = value
    with pytest.raises(ValueError, match=f"The {name} of image 1 in the batch are not finite at decoder layer 2"):
        match_layers(logits["class_logits"], logits["mask_logits"], [case[2] for case in cases], CONFIG)


def test_refuses_logits_that_are_too_large_for_costs():
    class_logits, mask_logits, targets = random_case(0, num_queries=3, num_targets=2)
    with pytest.raises(NonFiniteLogitsError, match="The matching costs of image 0 in the batch are not finite"):
        match(class_logits[0], mask_logits[0].sign() * 3e38, [targets], CONFIG)


def test_refuses_targets_that_do_not_fit_the_logits():
    class_logits, mask_logits, targets = random_case(0, num_queries=3, num_targets=2)
    with pytest.raises(ValueError, match="got 2 for 1 images"):
        match(class_logits[0], mask_logits[0], [targets, targets], CONFIG)
    foreign = Targets(torch.tensor([1, 5]), targets.masks)
    with pytest.raises(ValueError, match="5 classes, got a target of class 5 in image 0"):
        match(class_logits[0], mask_logits[0], [foreign], CONFIG)
