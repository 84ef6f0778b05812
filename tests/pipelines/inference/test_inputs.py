"""What a command line names is found, each time in the same order, and nothing else."""

import os
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.inference.inputs import Inputs
from pipelines.storage import locate


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "photos"
    for name in ("b.JPG", "a.png", "a.jpg", "sub/deep/c.webp", "sub/.hidden.jpg", ".trash/d.jpg", "notes.txt", "v.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "loop").symlink_to(folder)
    (folder / "linked.jpg").symlink_to(folder / "a.jpg")
    monkeypatch.chdir(tmp_path)
    return folder


def names(*inputs: str, output: str = "/nowhere") -> list[str]:
    found = Inputs(inputs, output)
    assert list(found) == list(found)
    return [item.name for item in found]


def test_folders_are_searched(photos: Path) -> None:
    assert names("photos") == ["a.jpg", "a.png", "b.JPG", "linked.jpg", "sub/deep/c.webp"]
    assert names("photos/sub", "photos/a.png") == ["sub/deep/c.webp", "a.png"]
    assert names("photos", output=str(photos / "sub")) == ["a.jpg", "a.png", "b.JPG", "linked.jpg"]


def test_files_globs_and_lists(photos: Path, tmp_path: Path) -> None:
    assert names("photos/a.png", "photos/v.mp4") == ["a.png", "v.mp4"]
    assert names("photos/a.*") == ["a.jpg", "a.png"]
    assert names("photos/sub/**/*.*") == ["deep/c.webp"]
    assert names("photos/[av].*", "photos/s*/*/*") == ["a.jpg", "a.png", "v.mp4", "sub/deep/c.webp"]
    strange = photos / "[1]\n.jpg"
    strange.write_bytes(b"")
    assert names(str(strange)) == ["[1]%0A.jpg"]
    raw = os.fsencode(photos) + b"/\xff.jpg"
    with open(raw, "wb"):
        pass
    (tmp_path / "list.txt").write_bytes(b"photos/a.jpg\r\n\n" + raw + b"\nphotos/sub/../../../../etc/none.jpg\n")
    assert [name.rpartition("/")[2] for name in names("@list.txt")] == ["a.jpg", "%FF.jpg", "none.jpg"]


def test_deep_folders_and_circles_of_links(photos: Path) -> None:
    (photos / "sub" / "a").symlink_to(photos / "sub")
    (photos / "sub" / "b").symlink_to(photos / "sub")
    assert names("photos/**/*.webp") == names("photos/**/deep/**/*.*") == ["sub/deep/c.webp"]
    assert names("photos/sub/**") == ["deep/c.webp"]


def test_folders_nested_more_deeply_than_python_recurses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    depth = 1100
    try:
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        Path("x.png").touch()
        os.chdir(tmp_path)
        expected = [str(tmp_path / ("d/" * depth + "x.png"))]
        for named in ("d", "d/**"):
            assert [item.source for item in Inputs([named], "/nowhere")] == expected
    finally:  # pytest cannot remove it
        os.chdir(tmp_path)
        (tmp_path / ("d/" * depth + "x.png")).unlink()
        for number in range(depth, 0, -1):
            os.rmdir("d/" * number)


def test_a_prefix_of_an_object_store(bucket: str) -> None:
    for name in ("photos/a.jpg", "photos/sub/b.png", "photos/notes.txt", "out/x.jpg"):
        (locate(bucket) / name).write_bytes(b"x")
    assert names(f"{bucket}/photos") == ["a.jpg", "sub/b.png"]
    assert names(bucket, output=f"{bucket}/out") == ["photos/a.jpg", "photos/sub/b.png"]
    (locate(bucket) / "list.txt").write_text(f"{bucket}/photos/a.jpg\n")
    assert names(f"@{bucket}/list.txt") == ["a.jpg"]


def test_nothing_is_an_error(photos: Path) -> None:
    for inputs, message in {
        (): "There is no picture to segment",
        ("none.jpg", "none"): "There is nothing at .*none.jpg",
        ("@none.txt",): "There is no list",
    }.items():
        with pytest.raises(UserError, match=message):
            Inputs(inputs, "/nowhere")
