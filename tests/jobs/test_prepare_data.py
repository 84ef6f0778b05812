import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.prepare_data import main
from jobs.shared.cli import run
from tests.pipelines.data.coco_folder import SPLIT, edit_json, json_file, write_coco_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    write_coco_folder(tmp_path / "coco")
    return tmp_path / "coco"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "packed"


def prepare(monkeypatch, folder: Path, output: Path, *more: str) -> int:
    arguments = ["--input", str(folder), "--split", SPLIT, "--output", str(output), *more]
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run(main)
    return int(end.value.code or 0)


def test_summary(monkeypatch, capsys, folder, output):
    edit_json(folder, lambda document: document["annotations"][0]["segments_info"][0].update(area=1))
    assert prepare(monkeypatch, folder, output, "--rows-per-shard", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    total = sum(file.stat().st_size for file in output.glob("shard-*"))
    assert lines[0] == f"5 images, 25 non-crowd segments (10 of things), 3 shards, {total:,} bytes in {output}"
    assert lines[1].startswith("warning: area 1 times, first in ")
    assert prepare(monkeypatch, folder, output, "--rows-per-shard", "2") == 0
    assert "packed already: nothing to do" in capsys.readouterr().out


def remove_images(folder: Path) -> None:
    (folder / SPLIT).rename(folder / "elsewhere")


def zip_pngs(folder: Path) -> None:
    pngs = folder / "annotations" / f"panoptic_{SPLIT}"
    pngs.rename(folder / "elsewhere")
    pngs.with_suffix(".zip").touch()


def break_image(folder: Path) -> None:
    next((folder / SPLIT).iterdir()).write_bytes(b"broken")


def instances(document) -> None:
    document["annotations"] = [{"image_id": 11, "segmentation": []}]


def repeat_image(document) -> None:
    document["images"].append(document["images"][0])


def forget_category(document) -> None:
    document["categories"].pop()


BAD_INPUTS = {
    "There is no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "There is no annotation file": lambda folder: json_file(folder).unlink(),
    "no folder of images": remove_images,
    "unzip -q": zip_pngs,
    "instances (detection)": lambda folder: edit_json(folder, instances),
    "not valid JSON": lambda folder: json_file(folder).write_text('{"images": ['),
    "no list categories": lambda folder: edit_json(folder, lambda document: document.pop("categories")),
    "holds no images": lambda folder: edit_json(folder, lambda document: document.update(images=[], annotations=[])),
    "does not exist": lambda folder: next((folder / SPLIT).iterdir()).unlink(),
    "has no entry": lambda folder: edit_json(folder, lambda document: document["images"].pop()),
    "has no annotation": lambda folder: edit_json(folder, lambda document: document["annotations"].pop()),
    "more than once": lambda folder: edit_json(folder, repeat_image),
    "which is not among the categories": lambda folder: edit_json(folder, forget_category),
    "image-unreadable": break_image,
}


@pytest.mark.parametrize("message", BAD_INPUTS)
def test_bad_input_exits_2_with_one_paragraph(monkeypatch, capsys, folder, output, message):
    BAD_INPUTS[message](folder)
    assert prepare(monkeypatch, folder, output) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    (paragraph,) = streams.err.splitlines()
    assert paragraph.startswith("error: ")
    assert message in paragraph
    assert not output.exists()


@pytest.mark.parametrize("arguments", [("--rows-per-shard", "0"), ("--rows-per-shard", "few"), ("--skip",)])
def test_bad_flags_exit_2(monkeypatch, folder, output, arguments):
    assert prepare(monkeypatch, folder, output, *arguments) == 2
    assert not output.exists()


def subprocess_of(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def test_a_full_disk_leaves_nothing_half_written(monkeypatch, folder, output, tmp_path):
    arguments = ["--input", str(folder), "--split", SPLIT, "--output", str(output), "--rows-per-shard", "5"]
    smallest = 4096  # room for pack.json but not for a shard
    full = subprocess_of(
        "jobs/prepare_data.py",
        *arguments,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (smallest, smallest)),
    )
    assert full.returncode == 2
    assert "no space is left" in full.stderr
    assert "Traceback" not in full.stderr
    assert [file.name for file in output.iterdir()] == ["pack.json"]
    assert prepare(monkeypatch, folder, output, "--rows-per-shard", "5") == 0
    assert prepare(monkeypatch, folder, tmp_path / "whole", "--rows-per-shard", "5") == 0
    for file in (tmp_path / "whole").iterdir():
        assert (output / file.name).read_bytes() == file.read_bytes()


def test_real_coco_images(monkeypatch, capsys, output):
    sample = os.environ.get("COCO_PANOPTIC_SAMPLE")
    if not sample:
        pytest.skip("COCO_PANOPTIC_SAMPLE does not name the folder with two real COCO images")
    assert prepare(monkeypatch, Path(sample), output) == 0
    assert capsys.readouterr().out.startswith("2 images, 47 non-crowd segments (40 of things), 1 shards, ")
