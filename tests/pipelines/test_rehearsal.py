"""What is rehearsed, where workers should go, and what the record of samples must show after a loss."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import rehearsal
from pipelines.config import TrainConfig, to_dict
from pipelines.errors import RunFailed
from pipelines.leaves import differing_leaves, leaves
from pipelines.recipes import DEMO, R50_MMDET, SWIN_L_MMDET
from pipelines.simulation import Node

GPU_NODE, DATA_NODE = Node(32, 8), Node(16)


@pytest.mark.parametrize("recipe", [R50_MMDET, SWIN_L_MMDET, DEMO], ids=lambda config: config.recipe)
def test_only_what_must_is_replaced(recipe: TrainConfig, tmp_path: Path) -> None:
    config = rehearsal.rehearsed(recipe, tmp_path)
    before, after = leaves(to_dict(recipe)), leaves(to_dict(config))
    changed = {name for name in before if before[name] != after[name]}
    small = ("model.", "data.augment.", "data.train", "weights", "run.name", "run.storage", "run.steps")
    smooth = (
        "run.sample_log",
        "scaling.",
        "checkpoint.every",
        "evaluation.every",
        "tracking.uri",
        "tracking.log_every",
    )
    assert {name for name in changed if not name.startswith(small + smooth)} == set()
    deciding = differing_leaves(to_dict(recipe), to_dict(config))
    assert all(leaf.startswith(small) for leaf in deciding)
    assert config.plan.global_batch == recipe.plan.global_batch
    assert all(str(tmp_path) in place for place in (config.data.train, config.run.storage, config.tracking.uri))


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
    plan = rehearsal.rehearsed(config, tmp_path).plan
    assert plan.workers == rehearsal.rehearsed_workers(config) == expected
    assert plan.workers * plan.micro_batch * plan.accumulation == global_batch


@pytest.mark.parametrize(
    ("config", "nodes", "expected"),
    [
        (SWIN_L_MMDET, [GPU_NODE] * 8 + [DATA_NODE] * 8, (8,) * 8),
        (R50_MMDET, [DATA_NODE, GPU_NODE, GPU_NODE], (8, 8)),
        (R50_MMDET, [Node(96, 4), Node(96, 8), Node(10, 8)], (8, 5, 3)),
        (DEMO, [Node(1), Node(4)], (2,)),
        (replace(DEMO, scaling=replace(DEMO.scaling, workers=6)), [Node(1), Node(2)], (4, 2)),
    ],
)
def test_workers_fill_one_node_after_another(config: TrainConfig, nodes: list[Node], expected: tuple[int, ...]) -> None:
    assert rehearsal.expected_placement(config, nodes) == expected


def line(step: int, rank: int, *positions: int) -> dict[str, Any]:
    return {"step": step, "rank": rank, "positions": list(positions), "image_ids": [100 + p for p in positions]}


def test_the_record_of_samples() -> None:
    config = replace(R50_MMDET, run=replace(R50_MMDET.run, steps=2, global_batch=4, micro_batch=1))
    whole = [line(0, 0, 0, 1), line(0, 1, 2, 3), line(1, 0, 4, 5), line(1, 1, 6, 7)]
    assert rehearsal.steps_redone(whole, config) == 0
    assert rehearsal.steps_redone([*whole[:3], *whole], config) == 2
    with pytest.raises(RunFailed, match=r"positions \[4, 5\] were never taken, \[\] too often"):
        rehearsal.steps_redone([*whole[:2], whole[3]], config)
    with pytest.raises(RunFailed, match=r"positions \[6\] were never taken, \[3\] too often"):
        rehearsal.steps_redone([*whole[:3], line(1, 1, 3, 7)], config)
    with pytest.raises(RunFailed, match="Worker 0 did step 1 again with other images"):
        rehearsal.steps_redone([*whole, {**line(1, 0, 4, 5), "image_ids": [104, 999]}], config)
