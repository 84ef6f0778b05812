"""The folder of an evaluation: what is finished is kept, and nothing of others is deleted."""

from pathlib import Path

import numpy as np
import pytest

from maskformer.analysis.image import analyze_image
from maskformer.taxonomy import Taxonomy
from pipelines.errors import UserError
from pipelines.evaluation.folder import EvaluationFolder
from pipelines.evaluation.score import ScoredImage
from pipelines.storage import locate

TAXONOMY = Taxonomy.from_coco([{"id": 1, "name": "sky", "isthing": 0}])


def image(image_id: int) -> ScoredImage:
    ids, segments = np.ones((4, 4), int), [{"id": 1, "category_id": 1, "score": 0.5}]
    return ScoredImage(f"{image_id}.png", segments, analyze_image((ids, segments), (ids, segments), TAXONOMY, image_id))


def test_finished_images_are_found_again_after_a_kill_while_a_file_was_written(tmp_path: Path) -> None:
    folder = EvaluationFolder(locate(str(tmp_path)))
    assert folder.start({"step": 1}) == {}
    assert [each.image_id for each in folder.keep(iter([image(5), image(3)]))] == [5, 3]
    (tmp_path / "parts" / ".000000000007.jsonl.1f.tmp").write_text("{")
    (tmp_path / ".images.jsonl.2a.tmp").write_text("{")
    assert sorted(folder.start({"step": 1})) == [3, 5]
    assert [each.to_json() for each in folder.finished()] == [image(3).to_json(), image(5).to_json()]
    folder.finish(folder.finished(), {"pq": 1})
    assert not (tmp_path / "parts").exists()
    assert sorted(folder.start({"step": 1})) == [3, 5]


def test_another_evaluation_is_replaced_and_it_is_said_in_what_it_differs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = EvaluationFolder(locate(str(tmp_path)))
    folder.start({"step": 1, "data": "a"})
    list(folder.keep(iter([image(5)])))
    assert folder.start({"step": 2, "data": "a"}) == {}
    assert "is replaced: it is another in step." in caplog.text
    assert folder.finished() == []


def test_files_of_others_are_left_alone_even_if_they_have_our_names(tmp_path: Path) -> None:
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions.json").write_text("precious")
    with pytest.raises(UserError, match=r"has predictions, predictions\.json, which no evaluation"):
        EvaluationFolder(locate(str(tmp_path))).start({"step": 1})
    assert (tmp_path / "predictions.json").read_text() == "precious"


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = EvaluationFolder(locate(str(tmp_path)))
    folder.start({"step": 1})
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "000000000001.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"000000000001\.jsonl is damaged \(KeyError"):
        folder.start({"step": 1})
