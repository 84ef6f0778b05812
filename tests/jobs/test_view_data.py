"""Look at the data at the command line: which images are shown, and refusals with status 2 that write nothing."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from jobs import view_data
from jobs.shared.cli import run
from pipelines.config.serialize import VERSION, to_dict
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.order import samples_at

Answer = tuple[int, str, str]


@pytest.fixture
def view(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Answer]:
    """Return a function that runs the job into tmp_path/view and returns its status and both streams."""
    monkeypatch.delenv("MASKFORMER_TRAIN_DATA", raising=False)

    def fail(*args: object, **options: object) -> None:
        raise AssertionError("This job starts no Ray.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "remote", fail)

    def job(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["view_data.py", "--output", str(tmp_path / "view"), *arguments])
        with pytest.raises(SystemExit) as end:
            run(view_data.main)
        streams = capsys.readouterr()
        return int(end.value.code or 0), streams.out, streams.err

    return job


def shown(folder: Path) -> list[int]:
    """Return the ids of the images in a folder of pictures, and check that the page has the same."""
    ids = [int(file.stem.rpartition("-")[2]) for file in sorted(folder.glob("*.png"))]
    page = (folder / "index.html").read_text()
    assert [int(found) for found in re.findall(r"image (\d+)</strong>", page)] == ids
    return ids


def test_images_as_packed(view: Callable[..., Answer], packs: dict[str, str], tmp_path: Path) -> None:
    status, out, _ = view("--data", packs["val"], "--images", "4")
    assert (status, out) == (0, f"4 images: {tmp_path}/view/index.html\n")
    assert shown(tmp_path / "view") == open_pack(packs["val"]).subset(4).image_ids.tolist()


def test_more_images_than_there_are(view: Callable[..., Answer], packs: dict[str, str], tmp_path: Path) -> None:
    assert view("--data", packs["val"])[0] == 0
    assert shown(tmp_path / "view") == open_pack(packs["val"]).image_ids.tolist()


def test_images_in_the_order_of_training(view: Callable[..., Answer], packs: dict[str, str], tmp_path: Path) -> None:
    arguments = ("--augmented", "--images", "5", "--recipe", "demo", "--run.seed", "7")
    assert view("--data", packs["train"], *arguments)[0] == 0
    kept = open_pack(packs["train"]).with_things()
    assert shown(tmp_path / "view") == kept.image_ids[samples_at(np.arange(5), len(kept), 7)[1]].tolist()


def test_a_step_of_a_run(view: Callable[..., Answer], tiny: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny, run=replace(tiny.run, seed=3), scaling=replace(tiny.scaling, workers="1:2"))
    samples = open_pack(config.data.train)
    record = {"version": VERSION, "config": to_dict(config), "data_hash": samples.data_hash, "total_steps": 25}
    (tmp_path / "config.json").write_text(json.dumps(record))
    status, out, err = view("--config", str(tmp_path / "config.json"), "--step", "24")
    assert (status, out) == (0, f"8 images: {tmp_path}/view/index.html\n"), err
    # 8 = 2 workers x 2 images x 2: the first worker has micro-batches 0 and 2, the second 1 and 3.
    positions = 24 * 8 + np.array([0, 1, 4, 5, 2, 3, 6, 7])
    assert shown(tmp_path / "view") == samples.image_ids[samples_at(positions, len(samples), 3)[1]].tolist()
    page = (tmp_path / "view" / "index.html").read_text()
    assert [int(found) for found in re.findall(r"position (\d+),", page)] == positions.tolist()
    headings = re.findall(r"<h[23]>(.*?)</h", page)
    assert headings == ["Worker 0", "Micro-batch 0", "Micro-batch 1", "Worker 1", "Micro-batch 0", "Micro-batch 1"]


WRONG = {
    "no pack to look at": (),
    "There is no pack at": ("--data", "nowhere"),
    "asks for 0 pictures": ("--data", "PACK", "--images", "0"),
    "asks for -1 pictures": ("--data", "PACK", "--images", "-1"),
    "asks for 2,000 pictures": ("--data", "PACK", "--images", "2000"),
    "There is no step 1700": ("--data", "PACK", "--step", "1700", "--recipe", "demo"),
    "There is no step -1": ("--data", "PACK", "--step", "-1", "--recipe", "demo"),
    "cannot give the global batch": ("--data", "PACK", "--step", "0", "--scaling.workers", "3"),
    "There is no recipe": ("--data", "PACK", "--recipe", "other"),
    "There is no file": ("--data", "PACK", "--config", "nowhere.json"),
    "Give a new or empty one": ("--data", "PACK", "--output", ""),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input_exits_2_with_one_paragraph(
    view: Callable[..., Answer], packs: dict[str, str], tmp_path: Path, message: str
) -> None:
    status, out, err = view(*(packs["train"] if word == "PACK" else word for word in WRONG[message]))
    assert (status, out) == (2, "")
    (paragraph,) = err.splitlines()
    assert paragraph.startswith("error: ")
    assert message in paragraph
    assert not (tmp_path / "view").exists()


@pytest.mark.parametrize("arguments", [("--images", "3", "--step", "1"), ("--step", "one"), ("--image", "3")])
def test_bad_flags_exit_2(
    view: Callable[..., Answer], packs: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    assert view("--data", packs["train"], *arguments)[0] == 2
    assert not (tmp_path / "view").exists()


def test_a_run_on_another_pack(
    view: Callable[..., Answer], packs: dict[str, str], tiny: TrainConfig, tmp_path: Path
) -> None:
    """Its steps had other images. Its augmentation may still be seen on them."""
    samples = open_pack(packs["train"])
    record = {"version": VERSION, "config": to_dict(tiny), "data_hash": samples.data_hash, "total_steps": 25}
    (tmp_path / "config.json").write_text(json.dumps(record))
    arguments = ("--config", str(tmp_path / "config.json"), "--data", packs["val"])
    status, _, err = view(*arguments, "--step", "0")
    assert status == 2
    assert "is of a run on another pack" in err
    assert not (tmp_path / "view").exists()
    assert view(*arguments, "--augmented", "--images", "1")[0] == 0
