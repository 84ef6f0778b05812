"""evaluate(). The oracle is the official panopticapi on the files it writes and on the original ground truth."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from panopticapi.evaluation import PQStat, pq_compute_single_core
from PIL import Image

from maskformer import PanopticConfig, build_model
from maskformer.preprocess import resize_image, resized_shape
from maskformer.taxonomy import COCO
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.pixels import decode_image, decode_panoptic
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.evaluation import EvaluationResult, evaluate, predict

NUM_IMAGES = 12
Answer = tuple[np.ndarray, list[dict[str, Any]]]


@pytest.fixture
def saved(tiny: TrainConfig, packs: dict[str, str]) -> SavedModel:
    """Return an untrained model that keeps every query as a segment."""
    torch.manual_seed(0)
    config = replace(tiny, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.0))
    return SavedModel("in memory", 0, build_model(config.model).state_dict(), config, open_pack(packs["val"]).taxonomy)


@pytest.fixture
def run(packs: dict[str, str], saved: SavedModel, tmp_path: Path, ray_session: str) -> Callable[..., EvaluationResult]:
    return lambda name, **options: evaluate(saved, packs["val"], output=str(tmp_path / name), cpus=0.5, **options)


def official(result: EvaluationResult, packs: dict[str, str]) -> PQStat:
    annotations = Path(packs["val"]).parent / "coco" / "annotations"
    truth = json.loads((annotations / "panoptic_val.json").read_text())["annotations"]
    predictions = json.loads((Path(result.output) / "predictions.json").read_text())["annotations"]
    by_id = {annotation["image_id"]: annotation for annotation in predictions}
    assert len(by_id) == len(predictions) == len(truth) == NUM_IMAGES
    pairs = [(annotation, by_id[annotation["image_id"]]) for annotation in truth]
    categories = {category["id"]: category for category in CATEGORIES}
    with contextlib.redirect_stdout(io.StringIO()):
        return pq_compute_single_core(
            0, pairs, annotations / "panoptic_val", Path(result.output) / "predictions", categories
        )


def assert_equal_to_official(result: EvaluationResult, packs: dict[str, str]) -> None:
    categories = {category["id"]: category for category in CATEGORIES}
    statistics = official(result, packs)
    for group, isthing in (("all", None), ("things", True), ("stuff", False)):
        expected, _ = statistics.pq_average(categories, isthing)
        for name in ("pq", "sq", "rq"):
            assert result.metrics[f"{name}/{group}"] == pytest.approx(expected[name], abs=1e-12)


def files(result: EvaluationResult) -> dict[str, bytes]:
    return {
        str(path.relative_to(result.output)): path.read_bytes()
        for path in Path(result.output).rglob("*")
        if path.is_file()
    }


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_each_image_is_evaluated_once_as_by_panopticapi(
    run: Callable[..., EvaluationResult], packs: dict[str, str]
) -> None:
    alone = run("alone")
    assert_equal_to_official(alone, packs)
    truth = Path(packs["val"]).parent / "coco" / "annotations" / "panoptic_val"
    pngs = sorted((Path(alone.output) / "predictions").iterdir())
    assert [png.name for png in pngs] == sorted(png.name for png in truth.iterdir())
    for png in pngs:
        assert Image.open(png).size == Image.open(truth / png.name).size
    assert sum(values.fp for values in alone.quality.per_class.values()) > NUM_IMAGES, "the model predicted little"
    assert alone.per_image.keys() == set(open_pack(packs["val"]).image_ids.tolist())
    summary = json.loads((Path(alone.output) / "metrics.json").read_text())
    assert (summary["num_images"], summary["metrics"]) == (NUM_IMAGES, alone.metrics)

    # The number of predictors does not change any file.
    assert files(run("pair", predictors=2)) == files(alone)


def informed(packs: dict[str, str], saved: SavedModel, disturb: Callable[[Answer], Answer]) -> type[predict._Predictor]:
    """Return a predictor that returns the disturbed ground truth instead of the output of the model."""
    size, answers = saved.config.evaluation, {}
    for row in (row for shard in open_pack(packs["val"]).shards for row in pq.read_table(shard).to_pylist()):
        shape = resized_shape(row["height"], row["width"], size.short_side, size.long_side)
        resized = resize_image(decode_image(row["image"]), shape).tobytes()
        ids = decode_panoptic(row["panoptic"])
        segments = [{"id": s["id"], "category_id": s["category_id"]} for s in row["segments"]]
        answers[resized] = disturb((ids, segments))

    class Informed(predict._Predictor):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.taxonomy = self._segment.taxonomy
            self._segment = self

        def segment_resized(self, image: np.ndarray, original: tuple[int, int]) -> Answer:
            ids, segments = answers[image.tobytes()]
            assert ids.shape == original
            return ids, segments

    return Informed


def shifted_and_relabeled(answer: Answer) -> Answer:
    """Shift all segments by some pixels, and relabel a fifth of them."""
    ids, segments = answer
    rng = np.random.default_rng(ids.size)
    ids = np.roll(ids, int(rng.integers(1, 4)), axis=int(rng.integers(2)))
    relabeled = [
        {**segment, "category_id": CATEGORIES[rng.integers(7)]["id"]} if rng.random() < 0.2 else segment
        for segment in segments
    ]
    return ids, relabeled


@pytest.mark.ray
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("disturb", "lowest", "highest"), [(lambda answer: answer, 1.0, 1.0), (shifted_and_relabeled, 0.3, 0.9)]
)
def test_known_answers_have_the_pq_of_panopticapi(
    run: Callable[..., EvaluationResult],
    packs: dict[str, str],
    saved: SavedModel,
    monkeypatch: pytest.MonkeyPatch,
    disturb: Callable[[Answer], Answer],
    lowest: float,
    highest: float,
) -> None:
    monkeypatch.setattr(predict, "_Predictor", informed(packs, saved, disturb))
    result = run("informed")
    assert_equal_to_official(result, packs)
    for group in ("all", "things", "stuff"):
        assert lowest <= result.metrics[f"pq/{group}"] <= highest


def test_other_categories_are_refused(saved: SavedModel, packs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 133 categories, which are not the 7"):
        evaluate(replace(saved, taxonomy=COCO), packs["val"], output=str(tmp_path))


def test_foreign_files_are_not_deleted(saved: SavedModel, packs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"has thesis\.tex, which no evaluation wrote"):
        evaluate(saved, packs["val"], output=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "thesis.tex"]
