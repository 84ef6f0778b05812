"""The arithmetic of the performance model; nothing is measured here."""

import re
from dataclasses import replace

import pytest

from pipelines.config.hardware import IMAGES_PER_CPU_WITHOUT_RAY, Hardware
from pipelines.config.recipes import DEMO, R50_MMDET
from pipelines.planning.performance import OVERHEADS, operators, samples_per_task, step_model


@pytest.mark.parametrize("task", [0.001, 0.03, 0.2])
def test_fewer_images_per_task_exceed_the_overhead_limit(task: float) -> None:
    images = samples_per_task(task)
    share = [task / (task + n / IMAGES_PER_CPU_WITHOUT_RAY) for n in (images, images - 1)]
    assert share[0] <= 0.05 + 1e-12 < share[1] + 1e-9


def test_every_layer_adds_the_same_operators_for_any_image_size() -> None:
    counts = [
        operators(replace(DEMO.model, decoder_layers=layers), size)
        for layers, size in ((2, (64, 64)), (3, (64, 64)), (4, (96, 128)))
    ]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 10


def test_the_terms_of_a_step_add_up() -> None:
    config = replace(R50_MMDET, model=replace(DEMO.model, num_classes=133))
    text = step_model(config, Hardware(), OVERHEADS)
    rows = [re.fullmatch(r"(.*?) +([\d.]+) +(\d+)% +([\d.]+) +(\d+)%", line) for line in text.splitlines()]
    terms = [[float(row[column]) for column in (2, 4)] for row in rows if row]
    *parts, total = terms
    assert len(parts) == 9
    for end in (0, 1):
        assert sum(part[end] for part in parts) == pytest.approx(total[end], abs=0.05 * len(parts) + 0.05)
    assert total[0] < total[1]
