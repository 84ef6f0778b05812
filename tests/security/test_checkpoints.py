"""Hostile checkpoints end in a refusal or a correct result, within limits, and never run code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.security import checkpoint_attacks as attacks
from tests.security.checkpoint_attacks import Attack, load_model, load_state, open_model, read_weights
from tests.security.isolated import run

WEIGHTS = {
    **attacks.pickle_bombs(),
    **attacks.code(),
    **attacks.tensors(),
    **attacks.truncated(),
    **attacks.headers(),
    **attacks.paths(),
    **attacks.indexes(),
}
MODELS = {**attacks.models(), **attacks.registered(), **attacks.runs()}
STATES = attacks.states()
READ = {"a shape with zeros, and no values"}


def refused(function: Callable[[str], Any], attack: Attack, folder: Path) -> None:
    path = attack(folder)
    outcome = run(function, str(path))
    outcome.require_clean(str(folder))
    assert outcome.kind == "refused", outcome
    assert not (folder / "witness").exists()


@pytest.mark.parametrize("name", WEIGHTS)
def test_hostile_weights_are_refused(name: str, tmp_path: Path) -> None:
    refused(read_weights, WEIGHTS[name], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_hostile_models_are_refused(name: str, tmp_path: Path) -> None:
    refused(load_model, MODELS[name], tmp_path)


@pytest.mark.parametrize("name", attacks.runs())
def test_hostile_runs_are_refused_by_jobs(name: str, tmp_path: Path) -> None:
    refused(open_model, MODELS[name], tmp_path)


@pytest.mark.parametrize("name", STATES)
def test_hostile_states_are_refused(name: str, tmp_path: Path) -> None:
    refused(load_state, STATES[name], tmp_path)


def test_there_are_enough_attacks() -> None:
    assert len(WEIGHTS) + len(MODELS) + len(STATES) >= 120
