"""Checkpoints are written in the background: copied first, the newest kept, failures raised."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints.state import TrainingState, load, save, step_folder, steps_saved
from pipelines.config.recipes import DEMO
from pipelines.errors import UserError
from pipelines.storage import Location, locate
from pipelines.training.saver import BackgroundWriter, snapshot

CONFIG = replace(DEMO, checkpoint=replace(DEMO.checkpoint, keep=2))
TAXONOMY = Taxonomy(COCO.categories[:7])


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


def state(step: int) -> TrainingState:
    return TrainingState(step, {"weight": torch.full((3,), float(step))}, {})


def test_only_the_newest_are_kept(run: Location) -> None:
    writer = BackgroundWriter(run, CONFIG, TAXONOMY)
    kept = []
    for step in (5, 10, 15, 20):
        writer.submit(state(step))
        writer.wait()
        kept.append(steps_saved(run))
    assert kept == [[5], [5, 10], [10, 15], [15, 20]]
    for step in (15, 20):
        loaded = load(step_folder(run, step))
        assert (loaded.step, loaded.model["weight"].tolist()) == (step, [step] * 3)


def test_an_earlier_checkpoint_is_not_deleted_for_later_ones(run: Location) -> None:
    """After damage, a run resumes from an older checkpoint; the damaged later ones must not replace the new ones."""
    for step in (5, 10, 15, 20):
        save(step_folder(run, step), state(step), CONFIG, TAXONOMY)
    writer = BackgroundWriter(run, CONFIG, TAXONOMY)
    writer.submit(state(10))
    writer.wait()
    assert steps_saved(run) == [5, 10, 15, 20]


@pytest.mark.parametrize("call", [lambda writer: writer.wait(), lambda writer: writer.submit(state(10))])
def test_a_failed_save_is_raised_at_the_next_call(tmp_path: Path, call: Callable[[BackgroundWriter], None]) -> None:
    (tmp_path / "file").write_bytes(b"")
    writer = BackgroundWriter(locate(tmp_path / "file"), CONFIG, TAXONOMY)
    writer.submit(state(5))
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        call(writer)


def test_a_snapshot_does_not_follow_the_training() -> None:
    weights = torch.zeros(2)
    copied = snapshot({"a": [weights, 1], "b": (weights,)})
    weights += 1
    assert (type(copied["a"]), type(copied["b"]), copied["a"][1]) == (list, tuple, 1)
    assert copied["a"][0].tolist() == copied["b"][0].tolist() == [0.0, 0.0]
