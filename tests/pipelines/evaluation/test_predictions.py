"""Scores of COCO panoptic results on disk. The oracle is panopticapi on the same files."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskformer.coco_format import encode_ids
from pipelines.data.manifest import open_pack
from pipelines.data.pixels import decode_panoptic
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.evaluation import EvaluationResult, evaluate_predictions
from pipelines.evaluation.compare import open_evaluation
from pipelines.evaluation.official import check_with_panopticapi

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]


def shifted_and_relabeled(ids: np.ndarray, segments: list[dict[str, Any]]) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Shift all segments by some pixels, and relabel a fifth of them."""
    rng = np.random.default_rng(ids.size)
    ids = np.roll(ids, int(rng.integers(1, 4)), axis=int(rng.integers(2)))
    return ids, [
        {**segment, "category_id": CATEGORIES[rng.integers(7)]["id"]} if rng.random() < 0.2 else segment
        for segment in segments
    ]


def write_results(
    folder: Path, truth: Path, disturb: Callable[[np.ndarray, list[dict[str, Any]]], Any] = lambda *side: side
) -> Path:
    """Write the ground truth, disturbed, as results of another program; return the JSON."""
    annotations = []
    (folder / "panoptic").mkdir(parents=True)
    for annotation in json.loads((truth / "panoptic_val.json").read_text())["annotations"]:
        ids = decode_panoptic((truth / "panoptic_val" / annotation["file_name"]).read_bytes())
        crowds = [segment["id"] for segment in annotation["segments_info"] if segment["iscrowd"]]
        segments = [{k: s[k] for k in ("id", "category_id")} for s in annotation["segments_info"] if not s["iscrowd"]]
        ids, segments = disturb(np.where(np.isin(ids, crowds), 0, ids), segments)
        Image.fromarray(encode_ids(ids)).save(folder / "panoptic" / annotation["file_name"])
        annotations.append({**annotation, "segments_info": segments})
    file = folder / "panoptic.json"
    file.write_text(json.dumps({"annotations": annotations}))
    return file


@pytest.fixture
def truth(packs: dict[str, str]) -> Path:
    return Path(packs["val"]).parent / "coco" / "annotations"


@pytest.fixture
def scored(packs: dict[str, str], tmp_path: Path) -> Callable[[Path], EvaluationResult]:
    return lambda file: evaluate_predictions(str(file), packs["val"], output=str(tmp_path / "out"), cpus=0.5)


def test_the_truth_is_perfect_and_disturbed_results_equal_panopticapi(
    truth: Path, tmp_path: Path, packs: dict[str, str], scored: Callable[[Path], EvaluationResult]
) -> None:
    perfect = scored(write_results(tmp_path / "perfect", truth))
    assert perfect.quality.pq == perfect.analysis.boundary.pq == perfect.analysis.mean_iou == 1.0
    assert perfect.analysis.mask_ap.ap == pytest.approx(1.0)
    file = write_results(tmp_path / "disturbed", truth, shifted_and_relabeled)
    result = scored(file.parent)
    assert 0.3 < result.quality.pq < 0.9
    check = check_with_panopticapi(result)
    assert check.difference <= 1e-12
    assert check.pq == pytest.approx(result.quality.pq, abs=1e-12)
    again = open_evaluation(str(tmp_path / "out"), open_pack(packs["val"]))
    assert again.metrics == result.metrics
    with pytest.raises(UserError, match="is on other data"):
        open_evaluation(str(tmp_path / "out"), open_pack(packs["train"]))

    # The check can fail.
    image = result.images[0]
    png = Path(result.png_folder) / image.file_name
    ids = decode_panoptic(png.read_bytes())
    first = image.segments_info[0]["id"]
    ids[: len(ids) // 2] = np.where(ids[: len(ids) // 2] == first, 0, ids[: len(ids) // 2])
    Image.fromarray(encode_ids(ids)).save(png)
    assert not check_with_panopticapi(result).agrees


def edited(file: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    return file


FAULTS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda d: d["annotations"].pop(0), r"1 images without a result \(image \d+\)"),
    (lambda d: d["annotations"].append({**d["annotations"][0]}), "1 images with more than one result"),
    (lambda d: d["annotations"].append({**d["annotations"][0], "image_id": 10**9}), "that the data does not have"),
    (lambda d: d["annotations"][0]["segments_info"].pop(0), "segments do not fit .*not in the segments_info"),
    (lambda d: d["annotations"][0]["segments_info"][0].update(category_id=999), "unknown category_id 999"),
    (lambda d: d["annotations"][0]["segments_info"][0].update(id="one"), "segments do not fit"),
    (lambda d: d["annotations"][0]["segments_info"][0].update(score=7), "score of a segment is a number in 0..1"),
    (lambda d: d["annotations"][1].update(file_name="../x.png"), "file names that are no path below the folder"),
    (lambda d: d["annotations"][1].update(file_name="\0.png"), "file names that are no path below the folder"),
    (lambda d: d["annotations"][0]["segments_info"][0].update(id=2**70), r"segments do not fit .*the largest 2\^63"),
    (
        lambda d: d["annotations"][1].update(file_name="away\x1b[2J.png"),
        r"PNGs that do not exist in .*away\\x1b\[2J.png",
    ),
    (lambda d: d.update(categories=COCO_LIKE), "other categories than the data: 1 instead of 7"),
    (lambda d: d.pop("annotations"), "not a JSON of COCO panoptic results"),
]
COCO_LIKE = [{"id": 1, "name": "kite", "isthing": 1}]


def test_every_fault_is_counted_and_nothing_is_scored(
    truth: Path, tmp_path: Path, scored: Callable[[Path], EvaluationResult]
) -> None:
    write_results(tmp_path / "good", truth)
    for number, (change, message) in enumerate(FAULTS):
        folder = tmp_path / f"bad-{number}"
        shutil.copytree(tmp_path / "good", folder)
        with pytest.raises(UserError) as error:
            scored(edited(folder / "panoptic.json", change))
        assert re.search(message, str(error.value)), str(error.value)
        assert not (tmp_path / "out" / "metrics.json").exists()

    pngs = sorted((tmp_path / "good" / "panoptic").iterdir())
    pngs[0].write_bytes(b"no picture")
    Image.open(pngs[1]).resize((5, 7)).save(pngs[1])
    with pytest.raises(UserError, match=r"1 PNGs that cannot be read .*1 PNGs of another size .*5 x 7 instead of"):
        scored(tmp_path / "good")
    with pytest.raises(UserError, match="There are no predictions at"):
        scored(tmp_path / "nothing")


def test_the_predictions_are_not_overwritten(packs: dict[str, str], truth: Path, tmp_path: Path) -> None:
    file = write_results(tmp_path / "results", truth)
    for output in (tmp_path / "results", tmp_path):
        with pytest.raises(UserError, match="has the predictions in it"):
            evaluate_predictions(str(file), packs["val"], output=str(output))
    assert file.exists()


def test_results_without_scores_are_scored(
    truth: Path, tmp_path: Path, scored: Callable[[Path], EvaluationResult]
) -> None:
    file = write_results(tmp_path / "results", truth)
    edited(file, lambda d: [s.update(score=None) for a in d["annotations"] for s in a["segments_info"]])
    result = scored(file)
    assert result.quality.pq == 1.0
    assert result.analysis.mask_ap.ap == pytest.approx(1.0)
    assert np.isnan(result.analysis.calibration.expected_error)
