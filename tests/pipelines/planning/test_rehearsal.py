"""What a rehearsal replaces, how many workers it has, and how it checks the log of samples after a node loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.overrides import differing_settings, flatten
from pipelines.config.recipes import DEMO, R50_MMDET, SWIN_L_MMDET
from pipelines.config.serialize import to_dict
from pipelines.config.train import TrainConfig
from pipelines.errors import RunFailedError
from pipelines.planning import rehearsal


@pytest.mark.parametrize("recipe", [R50_MMDET, SWIN_L_MMDET, DEMO], ids=lambda config: config.recipe)
def test_only_what_is_necessary_is_replaced(recipe: TrainConfig, tmp_path: Path) -> None:
    config = rehearsal.rehearsed(recipe, tmp_path)
    before, after = flatten(to_dict(recipe)), flatten(to_dict(config))
    changed = {name for name in before if before[name] != after[name]}
    small = ("model.", "data.augment.", "data.train", "weights", "run.name", "run.storage", "run.steps")
    local = (
        "run.sample_log",
        "scaling.",
        "checkpoint.every",
        "evaluation.every",
        "tracking.uri",
        "tracking.log_every",
    )
    assert {name for name in changed if not name.startswith(small + local)} == set()
    deciding = differing_settings(to_dict(recipe), to_dict(config))
    assert all(difference.startswith(small) for difference in deciding)
    assert config.batch_split.global_batch == recipe.batch_split.global_batch
    assert all(str(tmp_path) in location for location in (config.data.train, config.run.storage, config.tracking.uri))


@pytest.mark.parametrize(
    ("workers", "global_batch", "micro_batch", "expected"),
    [(16, 16, 1, 16), (64, 64, 1, 16), (2, 8, 4, 2), (36, 36, 1, 12), (17, 17, 1, 1), (4, 16, 1, 4)],
)
def test_as_many_workers_as_the_batch_allows(
    workers: int, global_batch: int, micro_batch: int, expected: int, tmp_path: Path
) -> None:
    config = replace(
        R50_MMDET,
        run=replace(R50_MMDET.run, global_batch=global_batch, micro_batch=micro_batch),
        scaling=replace(R50_MMDET.scaling, workers=workers),
    )
    split = rehearsal.rehearsed(config, tmp_path).batch_split
    assert split.workers == rehearsal.rehearsed_workers(config) == expected
    assert split.workers * split.micro_batch * split.accumulation == global_batch


def line(step: int, rank: int, *positions: int) -> dict[str, Any]:
    return {"step": step, "rank": rank, "positions": list(positions), "image_ids": [100 + p for p in positions]}


def test_the_log_of_samples() -> None:
    config = replace(R50_MMDET, run=replace(R50_MMDET.run, steps=2, global_batch=4, micro_batch=1))
    complete = [line(0, 0, 0, 1), line(0, 1, 2, 3), line(1, 0, 4, 5), line(1, 1, 6, 7)]
    assert rehearsal.steps_redone(complete, config) == 0
    assert rehearsal.steps_redone([*complete[:3], *complete], config) == 2
    with pytest.raises(RunFailedError, match=r"positions \[4, 5\] were never used, \[\] too often"):
        rehearsal.steps_redone([*complete[:2], complete[3]], config)
    with pytest.raises(RunFailedError, match=r"positions \[6\] were never used, \[3\] too often"):
        rehearsal.steps_redone([*complete[:3], line(1, 1, 3, 7)], config)
    with pytest.raises(RunFailedError, match="Worker 0 repeated step 1 with different images"):
        rehearsal.steps_redone([*complete, {**line(1, 0, 4, 5), "image_ids": [104, 999]}], config)
