"""What the report of an evaluation says and shows, from two disturbed copies of the ground truth as predictions."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskformer.analysis.bootstrap import pq_difference
from maskformer.analysis.image import analyze_image
from maskformer.analysis.lost_quality import CAUSES, SIZES
from maskformer.analysis.summary import summarize
from maskformer.coco_format import encode_ids
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pixels import decode_panoptic
from pipelines.data.reading import read_files
from pipelines.evaluation import report
from pipelines.evaluation.report_page import content
from pipelines.evaluation.result import EvaluationResult
from pipelines.evaluation.score import ScoredImage


def disturbed(samples: PackedSet, folder: Path, shift: int) -> EvaluationResult:
    """Return the evaluation of the ground truth, moved by more and more pixels from image to image."""
    (folder / "predictions").mkdir(parents=True)
    images: list[ScoredImage] = []
    for number, entry in enumerate(samples.index.to_pylist()):
        panoptic, _ = read_files(samples.shards[entry["shard"]], entry, "panoptic", "panoptic")
        ids = decode_panoptic(panoptic)
        kept = [segment for segment in entry["segments"] if not segment["iscrowd"]]
        moved = np.roll(np.where(np.isin(ids, [s["id"] for s in kept]), ids, 0), shift * number // 2, axis=1)
        segments = [{"id": s["id"], "category_id": s["category_id"], "score": 0.9} for s in kept]
        name = f"{entry['image_id']}.png"
        Image.fromarray(encode_ids(moved)).save(folder / "predictions" / name)
        analysis = analyze_image((moved, segments), (ids, entry["segments"]), samples.taxonomy, entry["image_id"])
        images.append(ScoredImage(name, segments, analysis))
    return EvaluationResult(
        analysis=summarize([image.analysis for image in images], samples.taxonomy, draws=200),
        images=images,
        output=str(folder),
        png_folder=str(folder / "predictions"),
        data=samples,
    )


@pytest.fixture
def pair(packs: dict[str, str], tmp_path: Path) -> tuple[EvaluationResult, EvaluationResult]:
    samples = open_pack(packs["val"])
    return disturbed(samples, tmp_path / "one", shift=1), disturbed(samples, tmp_path / "other", shift=2)


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[content.Content]:
    """Record what the page is made from."""
    pages: list[content.Content] = []
    make = report.page

    def record(found: content.Content) -> bytes:
        pages.append(found)
        return make(found)

    monkeypatch.setattr(report, "page", record)
    return pages


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_worst_and_the_best_images_with_their_pictures_and_numbers(
    pair: tuple[EvaluationResult, EvaluationResult], written: list[content.Content], ray_session: str
) -> None:
    one, other = pair
    file = Path(report.write_report(one, images=4, training=[(10, 0.1), (20, 0.3)], cpus=0.5))
    assert file == Path(one.output) / "report.html"
    (page,) = written
    by_pq = sorted(one.per_image, key=lambda image_id: one.per_image[image_id].pq)
    assert [image.image_id for image in page.images] == [*by_pq[:2], *by_pq[-2:]]
    assert page.summary.all.pq.value == one.quality.pq
    interval = page.summary.all.pq.interval
    assert interval is not None
    assert interval.low < one.quality.pq < interval.high
    assert page.lost["all"].total.total == pytest.approx(1 - one.quality.pq, abs=1e-9)
    assert page.lost["things"].total.total == pytest.approx(1 - one.quality.things.pq, abs=1e-9)
    assert page.lost["stuff"].total.total == pytest.approx(1 - one.quality.stuff.pq, abs=1e-9)
    for row in page.classes:
        assert row.loss.total == pytest.approx(1 - row.pq, abs=1e-9)
    for image in page.images:
        shapes = {Image.open(io.BytesIO(jpeg)).size for jpeg in image.pictures.values()}
        assert len(image.pictures) == 4
        assert len(shapes) == 1
        assert {page.classes[each.class_index].name for each in image.classes} <= set(one.taxonomy.names)
    worst = page.images[0]
    assert worst.errors != worst.input
    assert worst.prediction != worst.truth
    assert worst.loss.total == pytest.approx(1 - worst.pq, abs=1e-9)

    difference = pq_difference(other.per_image_counts, one.per_image_counts, one.taxonomy)
    report.write_report(one, images=4, other=other, difference=difference, cpus=0.5)
    compared = written[1]
    pq = compared.summary.all.pq
    assert pq.compared is not None
    assert pq.compared.other == other.quality.pq
    assert pq.compared.difference is not None
    assert pq.compared.difference.low < pq.value - other.quality.pq < pq.compared.difference.high
    by_image = {i: one.per_image[i].pq - other.per_image[i].pq for i in one.per_image}
    ordered = sorted(by_image, key=lambda image_id: by_image[image_id])
    assert [image.image_id for image in compared.images] == [*ordered[:2], *ordered[-2:]]
    assert all(len(image.pictures) == 5 for image in compared.images)
    assert json.dumps(other.output)[1:-1] in compared.other


def test_the_page_knows_the_causes_and_sizes_of_the_analysis() -> None:
    assert set(content.CAUSES) == set(CAUSES)
    assert set(content.LossBySize.__dataclass_fields__) == set(SIZES)
