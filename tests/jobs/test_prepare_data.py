import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.prepare_data import main
from jobs.shared.cli import run
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import open_pack
from pipelines.data.pack import PackConfig, pack
from pipelines.storage import locate
from tests.pipelines.data.coco_folder import SPLIT, edit_json, json_file, write_coco_folder


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


@pytest.mark.ray
def test_summary(ray_session, monkeypatch, capsys, folder, output):
    edit_json(folder, lambda document: document["annotations"][0]["segments_info"][0].update(area=1))
    assert prepare(monkeypatch, folder, output, "--rows-per-shard", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    total = sum(file.stat().st_size for file in output.glob("shard-*"))
    assert lines[0] == "5 images checked: 0 errors, 1 warnings, 0 notes; 0 images have an error"
    assert lines[1] == "warning: area, 1 times: a segment's area differs from its pixels"
    assert lines[-1] == f"5 images, 25 non-crowd segments (10 of things), 3 shards, {total:,} bytes in {output}"
    assert prepare(monkeypatch, folder, output, "--rows-per-shard", "2") == 0
    assert "packed already: nothing to do" in capsys.readouterr().out


def damage(folder: Path) -> None:
    """Give three of the five images an error, and one of these and another one a warning."""
    image_ids = [11, 12, 13]
    (folder / SPLIT / f"{11:012d}.jpg").unlink()
    (folder / "annotations" / f"panoptic_{SPLIT}" / f"{12:012d}.png").write_bytes(b"broken")

    def change(document):
        annotations = {annotation["image_id"]: annotation for annotation in document["annotations"]}
        annotations[13]["segments_info"][0]["category_id"] = 999
        for image_id in (image_ids[0], 14):
            annotations[image_id]["segments_info"][0]["area"] = 1

    edit_json(folder, change)


@pytest.mark.ray
def test_check_finds_every_fault_and_writes_nothing(ray_session, monkeypatch, capsys, folder, output, tmp_path):
    damage(folder)
    report = tmp_path / "new" / "report.json"
    assert prepare(monkeypatch, folder, output, "--check", "--report", str(report)) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "5 images checked: 3 errors, 2 warnings, 0 notes; 3 images have an error"
    headings = [line.split(", ")[0] for line in lines[1:] if not line.startswith(" ")]
    assert headings == ["error: category-unknown", "error: image-missing", "error: png-unreadable", "warning: area"]
    assert json.loads(report.read_text())["images_with_errors"] == [11, 12, 13]
    assert not output.exists()


@pytest.mark.ray
def test_errors_are_not_packed_unless_their_images_are_left_out(ray_session, monkeypatch, capsys, folder, output):
    damage(folder)
    assert prepare(monkeypatch, folder, output) == 1
    streams = capsys.readouterr()
    assert streams.out.startswith("5 images checked: 3 errors")
    assert (
        "error: The data set has errors, so nothing was packed. Correct them, or leave out the 3 images" in streams.err
    )
    assert not output.exists()
    assert prepare(monkeypatch, folder, output, "--skip-bad") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("2 images, 10 non-crowd segments (4 of things), 1 shards, ")
    assert lines[-1] == "3 images were left out"
    packed = open_pack(str(output))
    assert packed.image_ids.tolist() == [14, 15]
    assert prepare(monkeypatch, folder, output, "--skip-bad") == 0
    assert "packed already: nothing to do" in capsys.readouterr().out


@pytest.mark.ray
def test_another_split_with_the_same_image(ray_session, monkeypatch, capsys, folder, output):
    (folder / "other").mkdir()
    (folder / "other" / "copy.jpg").write_bytes((folder / SPLIT / f"{12:012d}.jpg").read_bytes())
    assert prepare(monkeypatch, folder, output, "--check", "--other-split", "other") == 1
    assert "error: image-in-other-split, 1 times" in capsys.readouterr().out


def remove_images(folder: Path) -> None:
    (folder / SPLIT).rename(folder / "elsewhere")


def zip_pngs(folder: Path) -> None:
    pngs = folder / "annotations" / f"panoptic_{SPLIT}"
    pngs.rename(folder / "elsewhere")
    pngs.with_suffix(".zip").touch()


def instances(document) -> None:
    document["annotations"] = [{"image_id": 11, "segmentation": []}]


BAD_INPUTS = {
    "There is no folder": lambda folder: folder.rename(folder.with_name("elsewhere")),
    "There is no annotation file": lambda folder: json_file(folder).unlink(),
    "no folder of images": remove_images,
    "unzip -q": zip_pngs,
    "instances (detection)": lambda folder: edit_json(folder, instances),
    "not valid JSON": lambda folder: json_file(folder).write_text('{"images": ['),
    "no list categories": lambda folder: edit_json(folder, lambda document: document.pop("categories")),
    "holds no images": lambda folder: edit_json(folder, lambda document: document.update(images=[], annotations=[])),
    "does not exist, nor do 4 others": lambda folder: [file.unlink() for file in (folder / SPLIT).iterdir()],
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


@pytest.mark.parametrize("place", ["/proc/x", "/dev/null/x"])
@pytest.mark.parametrize("flag", ["--output", "--report"])
def test_a_place_that_cannot_be_written_is_found_before_the_check(monkeypatch, capsys, folder, output, flag, place):
    assert prepare(monkeypatch, folder, output, flag, place) == 2
    (paragraph,) = capsys.readouterr().err.splitlines()
    assert paragraph.startswith("error: Cannot ")
    assert place in paragraph
    assert not output.exists()


def test_a_pack_needs_a_place(monkeypatch, capsys, folder):
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--input", str(folder), "--split", SPLIT])
    with pytest.raises(SystemExit, match="2"):
        run(main)
    assert "Give --output FOLDER, or --check" in capsys.readouterr().err


BAD_FLAGS = [("--rows-per-shard", "0"), ("--rows-per-shard", "few"), ("--skip",), ("--max-void-share", "50")]


@pytest.mark.parametrize("arguments", BAD_FLAGS)
def test_bad_flags_exit_2(monkeypatch, folder, output, arguments):
    assert prepare(monkeypatch, folder, output, *arguments) == 2
    assert not output.exists()


@pytest.mark.ray
def test_real_coco_images(ray_session, monkeypatch, capsys, output):
    sample = os.environ.get("COCO_PANOPTIC_SAMPLE")
    if not sample:
        pytest.skip("COCO_PANOPTIC_SAMPLE does not name the folder with two real COCO images")
    assert prepare(monkeypatch, Path(sample), output) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 images checked: 0 errors, 0 warnings, 0 notes; 0 images have an error"
    assert lines[1].startswith("2 images, 47 non-crowd segments (40 of things), 1 shards, ")


@pytest.mark.ray
@pytest.mark.slow
def test_check_and_pack_in_a_flaky_object_store(bucket, faulty_s3, folder, tmp_path):
    """One of six requests fails or is slow; the pack has the bytes of one made from files."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        locate(f"{bucket}/coco/{file.relative_to(folder)}").write_bytes(file.read_bytes())
    config = PackConfig(rows_per_shard=2)
    pack(read_coco(CocoLayout.find(str(folder), SPLIT)), str(tmp_path / "pack"), config, in_process=True)
    faulty_s3.mode = "flaky"
    command = [sys.executable, "jobs/prepare_data.py", "--input", f"{bucket}/coco", "--split", SPLIT]
    command += ["--output", f"{bucket}/pack", "--rows-per-shard", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "RAY_ADDRESS": ""}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 images checked: 0 errors" in done.stdout
    for fault in ("500", "503", "slow", "refuse", "cut"):
        assert faulty_s3.counts[fault] > 1
    faulty_s3.mode = "ok"
    files = sorted(file.name for file in (tmp_path / "pack").iterdir())
    assert any(name.startswith("shard-") for name in files)
    for name in files:
        if name != "pack.json":  # names its input
            assert locate(f"{bucket}/pack/{name}").read_bytes() == (tmp_path / "pack" / name).read_bytes()
