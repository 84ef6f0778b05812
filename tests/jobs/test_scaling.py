"""The arithmetic of the scaling study; nothing is measured here."""

import itertools
import statistics
from dataclasses import replace

import pytest

from jobs.bench.scaling import drawn_areas, expected_largest, operators, samples_per_task
from jobs.plan import IMAGES_PER_CPU
from pipelines.data.augment import AugmentConfig
from pipelines.recipes import DEMO


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_the_largest_of_some_draws_is_what_all_outcomes_give(draws):
    values = [3.0, 1.0, 7.0, 7.0, 2.0]
    outcomes = [max(drawn) for drawn in itertools.product(values, repeat=draws)]
    assert expected_largest(values, draws) == pytest.approx(statistics.mean(outcomes))


def test_areas_are_those_of_the_augmentation():
    config = AugmentConfig(short_sides=(48, 96), long_side=1333, crop_probability=0)
    assert set(drawn_areas(config)) == {48 * 64, 96 * 128}


@pytest.mark.parametrize("task", [0.001, 0.03, 0.2])
def test_so_many_images_keep_a_task_cheap_and_fewer_do_not(task):
    images = samples_per_task(task)
    share = [task / (task + n / IMAGES_PER_CPU) for n in (images, images - 1)]
    assert share[0] <= 0.05 + 1e-12 < share[1] + 1e-9


def test_every_layer_adds_the_same_operators_whatever_the_image():
    counts = [
        operators(replace(DEMO.model, decoder_layers=layers), size)
        for layers, size in ((2, (64, 64)), (3, (64, 64)), (4, (96, 128)))
    ]
    assert counts[2] - counts[1] == counts[1] - counts[0] > 10
