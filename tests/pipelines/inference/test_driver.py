"""predict(). The oracle is the Segmenter that was saved; on Ray every file equals that of this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from maskformer import Segmenter, Taxonomy
from maskformer.coco_format import decode_ids
from pipelines.config.predict import PredictConfig, PredictScaling, WriteConfig
from pipelines.config.publish import ThresholdConfig
from pipelines.config.train import TrainConfig
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.inference import PredictResult, predict
from pipelines.inference.inputs import Inputs
from pipelines.inference.stages import Read
from pipelines.storage import locate
from tests.checkpoints import saved

TAXONOMY = Taxonomy.from_coco(CATEGORIES)


@pytest.fixture
def model(tiny: TrainConfig, tmp_path: Path) -> Segmenter:
    return saved(tiny, TAXONOMY, tmp_path / "run")


@pytest.fixture
def run(model: Segmenter, tmp_path: Path) -> Callable[..., PredictResult]:
    """Return a function that predicts what is named, below `tmp_path`."""

    def predicted(*inputs: str, output: str = "out", **options: Any) -> PredictResult:
        folder = output if "://" in output else str(tmp_path / output)
        named = tuple(each if "://" in each else str(tmp_path / each) for each in inputs)
        checkpoint = options.pop("checkpoint", str(tmp_path / "run"))
        return predict(PredictConfig(checkpoint=checkpoint, input=named, output=folder, **options))

    return predicted


def picture(seed: int, size: tuple[int, int] = (40, 52)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8))


def fill(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        picture(number, (30 + number % 7, 44)).save(folder / f"{number:02d}.png")


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_right(folder: Path, model: Segmenter, sources: dict[str, Any]) -> None:
    """Compare the results of a folder with those of a model on the pictures by name."""
    results = json.loads((folder / "predictions.json").read_text())
    assert Taxonomy.from_coco(results["categories"]) == model.taxonomy
    assert [image["file_name"] for image in results["images"]] == sorted(sources)
    assert [image["id"] for image in results["images"]] == list(range(1, len(sources) + 1))
    for image, annotation in zip(results["images"], results["annotations"], strict=True):
        ids, segments = model.segment(sources[image["file_name"]])
        assert (image["height"], image["width"]) == ids.shape
        assert annotation["image_id"] == image["id"]
        png = Image.open(folder / "panoptic" / annotation["file_name"])
        assert np.array_equal(decode_ids(np.asarray(png)), ids)
        assert len(segments) > 1
        assert annotation["segments_info"] == json.loads(json.dumps(segments))
        overlay = Image.open(folder / "overlays" / f"{image['file_name']}.jpg")
        assert overlay.width * ids.shape[0] == overlay.height * ids.shape[1]
        assert min(overlay.size) >= min(320, 8 * min(ids.shape))


def test_a_few_pictures(run: Callable[..., PredictResult], model: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(0).save(tmp_path / "in" / "a.jpg", exif=exif)
    picture(1).save(tmp_path / "in" / "a.png")
    picture(2).convert("L").save(tmp_path / "in" / "sub" / "b\n\x1b[31m.png")
    sources = {
        "a.jpg": tmp_path / "in" / "a.jpg",
        "a.png": tmp_path / "in" / "a.png",
        "sub/b%0A%1B[31m.png": tmp_path / "in" / "sub" / "b\n\x1b[31m.png",
    }
    result = run("in", "in/a.png")  # one is named twice
    assert (result.done, result.before, result.failed) == (3, 0, [])
    assert_right(tmp_path / "out", model, sources)
    assert Image.open(tmp_path / "out" / "panoptic" / "a.jpg.png").size == (40, 52)  # upright
    assert not (tmp_path / "out" / "failed.json").exists()

    # The same command does nothing more, and one with more pictures only those.
    before = files(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "overlays").rglob("*.jpg")}
    assert run("in").before == 3
    assert files(tmp_path / "out") == before
    picture(3).save(tmp_path / "in" / "c.png")
    result = run("in")
    assert (result.done, result.before) == (1, 3)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert_right(tmp_path / "out", model, {**sources, "c.png": tmp_path / "in" / "c.png"})


def test_pictures_of_extreme_shapes(run: Callable[..., PredictResult], model: Segmenter, tmp_path: Path) -> None:
    """A JPEG cannot be wider than 65,500 pixels."""
    picture(0, (2, 66_000)).save(tmp_path / "wide.png")
    picture(1, (1, 1)).save(tmp_path / "one.png")
    assert run("wide.png", "one.png").failed == []
    assert Image.open(tmp_path / "out" / "panoptic" / "wide.png.png").size == (66_000, 2)
    assert Image.open(tmp_path / "out" / "overlays" / "wide.png.jpg").width <= 16_384


def test_only_what_is_asked_for_is_written(run: Callable[..., PredictResult], tmp_path: Path) -> None:
    fill(tmp_path / "in", 1)
    run("in", output="pngs", write=WriteConfig(overlays=False, json=False))
    assert set(files(tmp_path / "pngs")) == {"panoptic/00.png.png", "settings.json", "records/0-merged.jsonl"}
    run("in", output="overlays", write=WriteConfig(pngs=False))
    assert set(files(tmp_path / "overlays")) == {
        "overlays/00.png.jpg", "predictions.json", "settings.json", "records/0-merged.jsonl"
    }  # fmt: skip


def test_a_corrupt_file_is_counted_and_tried_again(
    run: Callable[..., PredictResult], model: Segmenter, tmp_path: Path
) -> None:
    fill(tmp_path / "in", 3)
    whole = (tmp_path / "in" / "01.png").read_bytes()
    (tmp_path / "in" / "01.png").write_bytes(whole[:200])
    result = run("in", "none.png")
    assert result.done == 2
    assert [failure["name"] for failure in result.failed] == ["in/01.png", "none.png"]
    assert "in/01.png cannot be decoded" in result.failed[0]["reason"]
    assert "does not exist" in result.failed[1]["reason"]
    assert json.loads((tmp_path / "out" / "failed.json").read_text()) == result.failed
    (tmp_path / "in" / "01.png").write_bytes(whole)
    picture(9).save(tmp_path / "none.png")
    result = run("in", "none.png")
    assert (result.done, result.before, result.failed) == (2, 2, [])
    assert not (tmp_path / "out" / "failed.json").exists()
    names = ["in/00.png", "in/01.png", "in/02.png", "none.png"]
    assert_right(tmp_path / "out", model, {name: tmp_path / name for name in names})


def test_other_results_are_not_mixed(run: Callable[..., PredictResult], tiny: TrainConfig, tmp_path: Path) -> None:
    fill(tmp_path / "in", 1)
    run("in")
    before = files(tmp_path / "out")
    saved(tiny, TAXONOMY, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"results of another model, .*/run/.*; this one is .*/other/.* new --output"):
        run("in", checkpoint=str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other settings: score_threshold 0\.0 -> 0\.5"):
        run("in", panoptic=ThresholdConfig(score_threshold=0.5))
    with pytest.raises(UserError, match="overlays True -> False"):
        run("in", write=WriteConfig(overlays=False))
    fill(tmp_path / "more", 1)
    with pytest.raises(UserError, match=r"has results of .*/in/00.png under the name 00.png"):
        run("more")
    assert files(tmp_path / "out") == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"has thesis\.tex, which no prediction wrote"):
        run("in", output="thesis")


def test_nothing_to_do_is_an_error(run: Callable[..., PredictResult], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="There is no picture in what is named"):
        run("in")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(UserError, match="None of the 2 pictures exist"):
        predict(
            PredictConfig(
                checkpoint=str(tmp_path / "run"), input=(f"@{tmp_path}/list.txt",), output=str(tmp_path / "out")
            )
        )
    with pytest.raises(UserError, match="There is nothing at"):
        run("list.txt", checkpoint=str(tmp_path / "none"))


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_on_ray_every_file_is_the_same(
    run: Callable[..., PredictResult], model: Segmenter, bucket: str, tmp_path: Path,
    ray_session: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Pictures of an object store, a corrupt one among them."""
    monkeypatch.setattr("pipelines.inference.driver.FEW", 100)
    fill(tmp_path / "in", 12)
    (tmp_path / "in" / "05.png").write_bytes(b"\x89PNG\r\n")
    for path in (tmp_path / "in").iterdir():
        (locate(bucket) / "in" / path.name).write_bytes(path.read_bytes())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on Ray
    try:
        here = run("in", output="here")
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("pipelines.inference.driver.FEW", 0)
    there = run(f"{bucket}/in", output="there", scaling=PredictScaling(workers=1, device="cpu"))
    assert (there.done, len(there.failed)) == (here.done, len(here.failed)) == (11, 1)
    assert "05.png cannot be decoded (the header of the PNG is damaged)" in there.failed[0]["reason"]
    expected, found = files(tmp_path / "here"), files(tmp_path / "there")
    assert set(found) == set(expected)
    for name, content in expected.items():
        if name not in ("failed.json", "records/0-merged.jsonl"):  # which name the sources
            assert found[name] == content, name
    again = run(f"{bucket}/in", output="there")
    assert (again.done, again.before, len(again.failed)) == (0, 11, 1)


def test_frames_of_a_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="the extra `video` is not installed")
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, width=64, height=48, pix_fmt="yuv420p")
        for number in range(7):
            gray = np.full((48, 64, 3), 30 * number + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(gray, format="rgb24")))
        container.mux(stream.encode())
    (item,) = Inputs([str(path)], "/nowhere")
    assert item.is_video
    read = Read(short_side=48, long_side=64, every=3, keep_file=True)
    row = {"source": str(path).encode(), "name": item.name, "video": True, "done": []}
    first, second, third, end = read.rows(row)
    assert [each["name"] for each in (first, second, third)] == [f"v.mp4/frame_{n:08d}" for n in (0, 3, 6)]
    for each, level in zip((first, second, third), (20, 110, 200), strict=True):
        pixels = np.frombuffer(each["resized"], np.uint8)
        assert len(pixels) == 48 * 64 * 3
        assert abs(pixels.astype(int) - level).max() < 8
    assert end["frames"] == 3
    assert [each["frame"] for each in read.rows({**row, "done": [0, 6]})] == [3, -1]
    path.write_bytes(path.read_bytes()[:100])
    (failure,) = read.rows(row)
    assert "v.mp4 cannot be decoded" in failure["reason"]
