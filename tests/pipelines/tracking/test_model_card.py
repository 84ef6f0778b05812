"""The model card: the numbers of the evaluation, within MLflow's limit, and no markup from foreign names."""

import re

import pytest
import torch

from maskformer.analysis.bootstrap import Interval
from maskformer.panoptic_quality import PanopticQuality
from maskformer.taxonomy import Taxonomy
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.train import TrainConfig
from pipelines.tracking.evaluations import EvaluatedData
from pipelines.tracking.model_card import LONGEST, model_card

DATA = EvaluatedData(name="val|2017", hash="a1" * 32)


def card(names: list[str], intervals: dict[str, Interval]) -> str:
    taxonomy = Taxonomy.from_coco([{"id": n + 1, "name": name, "isthing": n % 2} for n, name in enumerate(names)])
    quality = PanopticQuality(taxonomy)
    ids, segments = torch.ones(2, 2, dtype=torch.int32).numpy(), [{"id": 1, "category_id": 1}]
    quality.update((ids, segments), (ids, segments), 1)
    saved = SavedModel("/runs/run", 12, {"weight": torch.zeros(2_500_000)}, TrainConfig(recipe="demo"), taxonomy)
    return model_card(saved, DATA, quality.result(), intervals)


def test_the_numbers_of_the_evaluation_are_in_it() -> None:
    found = card(["sky", "disc"], {"all": Interval(1.0, 0.875, 1.0, 0.9)})
    for part in (
        "step 12, 2.5 M parameters",
        "val\\|2017, 1 images",
        "a1" * 32,
        "Things (1): disc.",
        "Stuff (1): sky.",
    ):
        assert part in found
    assert "| percent | PQ | 90 % interval | SQ | RQ | classes |" in found
    assert "| all | 100.0 | 87.5 to 100.0 | 100.0 | 100.0 | 1 |" in found
    assert "| things |" not in found  # there are none in the data
    assert "interval" not in card(["sky", "disc"], {})


@pytest.mark.parametrize("name", ["<img src=x>", "[a](http://b)", "a|c", "**b**", "`c`"])
def test_foreign_names_are_text(name: str) -> None:
    found = card([name, "disc"], {})
    assert found.isascii() or found.encode()
    (line,) = [line for line in found.splitlines() if line.startswith("Stuff (1): ")]
    assert not re.search(r"(?<!\\)[<>\[\]|*`]", line)


def test_many_categories_fit() -> None:
    found = card([f"category number {n} with a long name" for n in range(1000)], {})
    assert len(found) <= LONGEST
    assert re.search(r"Things \(500\): .* and \d+ more\.", found)
    assert re.search(r"Stuff \(500\): .* and \d+ more\.", found)
    assert found.endswith("This card grants none.")
