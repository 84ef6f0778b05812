"""evaluate(). The oracle is the official panopticapi on the files it writes and on the original ground truth."""

import contextlib
import importlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from panopticapi.evaluation import PQStat, pq_compute_single_core
from PIL import Image

from maskformer import PanopticConfig, build_model
from maskformer.taxonomy import COCO
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.evaluation import EvaluationResult, evaluate
from pipelines.evaluation.evaluate import score_the_truth
from pipelines.evaluation.score import ScoredImage

NUM_IMAGES = 12
module = importlib.import_module("pipelines.evaluation.evaluate")  # the package has the function under this name


@pytest.fixture
def saved(tiny: TrainConfig, packs: dict[str, str]) -> SavedModel:
    """Return an untrained model that keeps every query as a segment."""
    torch.manual_seed(0)
    config = replace(tiny, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.0))
    return SavedModel("in memory", 0, build_model(config.model).state_dict(), config, open_pack(packs["val"]).taxonomy)


@pytest.fixture
def run(packs: dict[str, str], saved: SavedModel, tmp_path: Path, ray_session: str) -> Callable[..., EvaluationResult]:
    return lambda name, **options: evaluate(saved, packs["val"], output=str(tmp_path / name), cpus=0.5, **options)


def assert_equal_to_official(result: EvaluationResult, packs: dict[str, str]) -> None:
    annotations = Path(packs["val"]).parent / "coco" / "annotations"
    truth = json.loads((annotations / "panoptic_val.json").read_text())["annotations"]
    predictions = json.loads((Path(result.output) / "predictions.json").read_text())["annotations"]
    by_id = {annotation["image_id"]: annotation for annotation in predictions}
    assert len(by_id) == len(predictions) == len(truth) == NUM_IMAGES
    pairs = [(annotation, by_id[annotation["image_id"]]) for annotation in truth]
    categories = {category["id"]: category for category in CATEGORIES}
    with contextlib.redirect_stdout(io.StringIO()):
        statistics: PQStat = pq_compute_single_core(
            0, pairs, annotations / "panoptic_val", Path(result.output) / "predictions", categories
        )
    for group, isthing in (("all", None), ("things", True), ("stuff", False)):
        expected, _ = statistics.pq_average(categories, isthing)
        for name in ("pq", "sq", "rq"):
            assert result.metrics[f"{name}/{group}"] == pytest.approx(expected[name], abs=1e-12)


def files(result: EvaluationResult) -> dict[str, bytes]:
    return {
        str(path.relative_to(result.output)): path.read_bytes()
        for path in Path(result.output).rglob("*")
        if path.is_file() and path.name != "metrics.json"  # which names the folder
    }


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_each_image_is_evaluated_once_as_by_panopticapi(
    run: Callable[..., EvaluationResult], packs: dict[str, str], monkeypatch: pytest.MonkeyPatch
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
    assert sum(alone.metrics[name] for name in alone.metrics if name.startswith("lost/")) == pytest.approx(
        1 - alone.quality.pq, abs=1e-9
    )

    # The number of predictors does not change any file.
    assert files(run("with three", predictors=3)) == files(alone)

    # What was finished before an interrupt is not done again, and the result is the same.
    whole, asked = module.score_images, []

    def interrupted(saved: SavedModel, samples: PackedSet, **options: Any) -> Iterator[ScoredImage]:
        asked.append(len(samples))
        yield from islice(whole(saved, samples, **options), 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "score_images", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run("interrupted")
        with pytest.raises(KeyboardInterrupt):
            run("interrupted")
        assert not (Path(alone.output).parent / "interrupted" / "metrics.json").exists()
    assert files(run("interrupted")) == files(alone)
    assert asked == [NUM_IMAGES, NUM_IMAGES - 5]
    monkeypatch.setattr(module, "score_images", interrupted)
    assert run("interrupted").metrics == alone.metrics, "a complete evaluation is read from its folder"
    assert alone.model is not None
    other = replace(alone.model, config=replace(alone.model.config, panoptic=PanopticConfig()))
    with pytest.raises(KeyboardInterrupt):  # another evaluation starts anew
        evaluate(other, packs["val"], output=str(Path(alone.output).parent / "interrupted"), cpus=0.5)
    assert asked[2:] == [NUM_IMAGES]


def test_other_categories_are_refused(saved: SavedModel, packs: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 133 categories, which are not the 7"):
        evaluate(replace(saved, taxonomy=COCO), packs["val"], output=str(tmp_path))


@pytest.mark.ray
def test_foreign_files_are_not_deleted(
    saved: SavedModel, packs: dict[str, str], tmp_path: Path, ray_session: str
) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"has predictions, thesis\.tex, which no evaluation"):
        evaluate(saved, packs["val"], output=str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "thesis.tex"]


def test_ground_truth_that_does_not_fit_itself_is_refused_before_a_model_runs(packs: dict[str, str]) -> None:
    samples = open_pack(packs["val"])
    score_the_truth(samples)
    rows = samples.index.to_pylist()
    rows[0]["segments"][0]["id"] += 1
    changed = replace(samples, index=pa.Table.from_pylist(rows, schema=samples.index.schema))
    with pytest.raises(UserError, match=r"Row 0 of .* is not consistent"):
        score_the_truth(changed)
