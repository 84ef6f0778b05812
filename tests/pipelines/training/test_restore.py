"""A training state that does not fit the network: one clear error, whatever torch raises."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.training.worker import fitting, load_optimizer


def trained() -> tuple[nn.Module, torch.optim.AdamW]:
    network = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return network, optimizer


def other_shape(state: dict[str, Any]) -> None:
    state["state"][0]["exp_avg"] = torch.zeros(5, 5)


def no_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


def group_of_text(state: dict[str, Any]) -> None:
    state["param_groups"] = ["a"]


def more_parameters(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"] = [0, 1, 2]


@pytest.mark.parametrize("spoil", [other_shape, no_groups, group_of_text, more_parameters])
def test_an_optimizer_state_that_does_not_fit(spoil: Any) -> None:
    _, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    spoil(state)
    with (
        pytest.raises(UserError, match=r"newest checkpoint of /runs/a does not fit") as caught,
        fitting(locate("/runs/a")),
    ):
        load_optimizer(optimizer, state)
    assert str(caught.value).isprintable()


def test_weights_of_another_network() -> None:
    network, _ = trained()
    with pytest.raises(UserError, match=r"does not fit"), fitting(locate("/runs/a")):
        network.load_state_dict({"weight": torch.zeros(1)})


def test_a_state_that_fits_is_loaded() -> None:
    _, optimizer = trained()
    _, other = trained()
    with fitting(locate("/runs/a")):
        load_optimizer(other, optimizer.state_dict())
    assert torch.equal(
        other.state[other.param_groups[0]["params"][0]]["exp_avg"],
        optimizer.state[optimizer.param_groups[0]["params"][0]]["exp_avg"],
    )
