"""Rows of a pack that cannot be read, at once or at all. The operators of the streams are called without Ray."""

import errno
import hashlib
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bench.shared.faulty_server import FaultyServer
from pipelines import storage
from pipelines.config.recipes import DEMO
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.order import samples_at
from pipelines.data.pixels import compress_index_map
from pipelines.data.reading import read_files
from pipelines.data.schema import INDEX
from pipelines.data.tasks import LoadAndAugment, LoadAndResize, following
from pipelines.errors import StorageUnavailableError, UserError

SEED, NUM_IMAGES, ROWS_PER_SHARD = 5, 80, 16


@pytest.fixture(autouse=True)
def no_open_shards() -> None:
    storage._opened.cache_clear()


@pytest.fixture
def intact(packs: dict[str, str]) -> PackedSet:
    return open_pack(packs["train"])


@pytest.fixture
def samples(intact: PackedSet, tmp_path: Path) -> PackedSet:
    """Return a copy of the pack, to be damaged."""
    shutil.copytree(intact.uri, tmp_path / "copy")
    return open_pack(str(tmp_path / "copy"))


def damaged(content: bytes, row: int) -> bytes:
    """Flip a bit in the middle of an image of a shard."""
    image = pq.read_table(pa.BufferReader(content)).to_pylist()[row]["image"]
    changed = bytearray(content)
    changed[content.index(image) + len(image) // 2] ^= 1
    return bytes(changed)


def image_of(samples: PackedSet, index: int) -> bytes:
    """Read an image of the set from its Parquet file."""
    return pq.read_table(samples.shards[samples.shard[index]])["image"][int(samples.row[index])].as_py()


def damage(samples: PackedSet, *indices: int) -> None:
    """Flip a bit in these images of the set."""
    for index in indices:
        file = Path(samples.shards[samples.shard[index]])
        file.write_bytes(damaged(file.read_bytes(), int(samples.row[index])))


def augmented(samples: PackedSet, positions: np.ndarray, policy: str = "stop", patience: float = 0) -> list[dict]:
    load = LoadAndAugment(samples, SEED, DEMO.data.augment, patience, policy == "skip")
    return load(positions, *samples_at(positions, len(samples), SEED)).to_pylist()


def resized(samples: PackedSet) -> list[dict]:
    return LoadAndResize(samples, 40, 60, 0)(np.arange(len(samples))).to_pylist()


def index_at(position: int) -> int:
    return int(samples_at(np.array([position]), NUM_IMAGES, SEED)[1][0])


def read(samples: PackedSet, index: int, patience: float = 0) -> bytes:
    entry = samples.index.slice(index, 1).to_pylist()[0]
    with storage.patience(patience):
        image, _ = read_files(samples.shards[entry["shard"]], entry, "image", "index_map")
    return bytes(image)


# ---- reading again


def test_a_shard_that_was_replaced_is_read_anew(intact: PackedSet, samples: PackedSet, tmp_path: Path) -> None:
    damage(samples, 21)
    read(samples, 22)
    shutil.copy(intact.shards[1], tmp_path / "good")
    (tmp_path / "good").replace(samples.shards[1])
    assert read(samples, 21) == image_of(intact, 21)


class Failing:
    """Reading of local files that fails with EIO as long as `failing` says so."""

    def __init__(self) -> None:
        self.failing = self.reads = 0

    def pread(self, descriptor: int, length: int, offset: int) -> bytes:
        self.reads += 1
        if self.failing:
            self.failing -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return _pread(descriptor, length, offset)


_pread = os.pread


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    reading = Failing()
    monkeypatch.setattr(storage.os, "pread", reading.pread)
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)
    return reading


def test_a_read_is_repeated(intact: PackedSet, failing: Failing) -> None:
    failing.failing = 3
    assert read(intact, 21, patience=60) == image_of(intact, 21)
    assert failing.reads == 4


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_storage_that_is_away_is_no_damage(intact: PackedSet, failing: Failing, policy: str) -> None:
    failing.failing = 10**9
    with pytest.raises(StorageUnavailableError, match=r"^Cannot read .*shard-0000\d\.parquet: .* did not answer"):
        augmented(intact, np.arange(2), policy)
    with pytest.raises(StorageUnavailableError):
        resized(intact)


def test_a_fault_of_this_machine_is_no_damage(intact: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restarted workers may succeed, so it is neither the user's nor the row's fault."""

    def no_descriptors(*arguments: Any) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(storage.os, "pread", no_descriptors)
    with pytest.raises(OSError, match=rf"Cannot read image {intact.image_ids[3]}, row 3 of .*Too many open files"):
        augmented(intact.take(np.array([3])), np.arange(1), "skip")


# ---- the policy


def test_stop_names_the_row(samples: PackedSet) -> None:
    damage(samples, index_at(3))
    shard, row = samples.shards[samples.shard[index_at(3)]], samples.row[index_at(3)]
    image_id = samples.image_ids[index_at(3)]
    message = (
        rf"^Row {row} of {shard} is damaged: .* not those of image {image_id} as packed\. .*--data\.damaged skip.*\.$"
    )
    with pytest.raises(UserError, match=message):
        augmented(samples, np.arange(10))
    with pytest.raises(UserError, match=rf"^Row {row} of {shard} is damaged: .* prepare_data.py again\.$"):
        resized(samples)


def test_skip_trains_on_the_next_image(intact: PackedSet, samples: PackedSet) -> None:
    """Also on the one after the next, and after the last comes the first. All other samples stay as they are."""
    first, last = 40, NUM_IMAGES - 1
    damage(samples, first, first + 1, last)
    positions = np.arange(70, 170)  # the end of an epoch, all of the next, and more
    expected, found = augmented(intact, positions), augmented(samples, positions, "skip")
    epochs, indices = samples_at(positions, NUM_IMAGES, SEED)
    replaced = {first: first + 2, first + 1: first + 2, last: 0}
    assert sum(index in replaced for index in indices) >= 3
    for place, (epoch, index) in enumerate(zip(epochs, indices, strict=True)):
        if index not in replaced:
            assert found[place] == expected[place]
            assert found[place]["skipped"] is None
            continue
        other = replaced[index]
        # In the same epoch, the replacement is also at its own position.
        same_epoch = next(p for p in range(epoch * NUM_IMAGES, (epoch + 1) * NUM_IMAGES) if index_at(p) == other)
        (own,) = augmented(intact, np.array([same_epoch]))
        text = found[place]["skipped"]
        assert found[place] == {**own, "position": positions[place], "skipped": text}
        assert text.startswith(f"Row {samples.row[index]} of {samples.shards[samples.shard[index]]} is damaged")
        assert f"image {samples.image_ids[index]} " in text
        assert text.endswith(f"Image {samples.image_ids[other]} took its place.")


def test_a_missing_shard_is_skipped(samples: PackedSet) -> None:
    Path(samples.shards[1]).unlink()
    one = samples.take(np.array([16]))  # trains on the first row of the shard alone
    with pytest.raises(UserError, match=rf"^Row 0 of {samples.shards[1]}, image .*, .*: the file does not exist\. "):
        augmented(one, np.arange(1))
    found = augmented(samples, np.arange(NUM_IMAGES), "skip")
    at = {index_at(position): row for position, row in enumerate(found)}
    shard_2 = samples.image_ids[32:48]
    assert all(at[index]["image_id"] == shard_2[0] for index in range(16, 32))
    assert sum(row["skipped"] is not None for row in found) == ROWS_PER_SHARD


@pytest.mark.parametrize("length", [0, 3, 1000])
def test_a_truncated_shard_is_skipped(samples: PackedSet, length: int) -> None:
    file = Path(samples.shards[0])
    file.write_bytes(file.read_bytes()[:length])
    (position,) = (p for p in range(NUM_IMAGES) if index_at(p) == 3)
    (row,) = augmented(samples, np.array([position]), "skip")
    assert row["image_id"] == samples.image_ids[16]
    assert "is damaged: " in row["skipped"]


def test_skipping_ends_where_nothing_can_be_read(samples: PackedSet) -> None:
    for shard in samples.shards:
        Path(shard).unlink()
    with pytest.raises(UserError, match=r"does not exist\. Nor can 12 images after it .*prepare_data\.py again\.$"):
        augmented(samples, np.arange(1), "skip")


@pytest.mark.parametrize("size", [(4, 4), (56, 84)])
def test_an_index_map_that_does_not_fit_is_named(samples: PackedSet, size: tuple[int, int]) -> None:
    """With the right hash, as a foreign program may write it."""
    entries = samples.index.to_pylist()
    entry = entries[index_at(0)]
    plane = compress_index_map(np.zeros(size, np.uint16), len(entry["classes"]))
    file = Path(samples.shards[entry["shard"]])
    start, end = (entry["index_map"][key] for key in ("offset", "bytes"))
    content = file.read_bytes()
    file.write_bytes(content[:start] + plane + content[start + end :])
    entry["index_map"] = {"offset": start, "bytes": len(plane), "sha256": hashlib.sha256(plane).digest()}
    if size != (4, 4):  # the JSON agrees with the index map, and the image does not
        entry["height"], entry["width"] = size
    foreign = replace(samples, index=pa.Table.from_pylist(entries, schema=INDEX))
    with pytest.raises(UserError, match=r"^Row \d+ of .*, image \d+, cannot be used: its (index map|image)"):
        augmented(foreign, np.arange(1))


def test_replacements_come_from_several_shards() -> None:
    shard = np.repeat(np.arange(5), 6)
    assert following(shard, 3) == [4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19]
    assert following(np.zeros(3, int), 1) == [2, 0]
    assert following(np.zeros(1, int), 0) == []


# ---- S3


@pytest.fixture
def remote(intact: PackedSet, faulty_s3: FaultyServer, bucket: str) -> PackedSet:
    location = storage.locate(f"{bucket}/pack")
    for file in sorted(Path(intact.uri).iterdir()):
        (location / file.name).write_bytes(file.read_bytes())
    return open_pack(f"{bucket}/pack")


def test_a_sample_costs_one_request(remote: PackedSet, faulty_s3: FaultyServer) -> None:
    """Once a process knows the sizes of the shards: in the second epoch, and for evaluation."""
    augmented(remote, np.arange(NUM_IMAGES))
    faulty_s3.counts.clear()
    augmented(remote, np.arange(NUM_IMAGES, 2 * NUM_IMAGES))
    assert faulty_s3.counts["ok"] == NUM_IMAGES
    resized(remote)
    assert faulty_s3.counts["ok"] == 2 * NUM_IMAGES


@pytest.mark.parametrize("mode", ["500", "503", "refuse", "cut"])
def test_a_read_waits_for_s3(remote: PackedSet, intact: PackedSet, faulty_s3: FaultyServer, mode: Any) -> None:
    expected = augmented(intact, np.arange(2))
    assert augmented(remote, np.arange(2)) == expected  # opens shards
    faulty_s3.mode = mode
    with pytest.raises(StorageUnavailableError, match="did not answer"):
        augmented(remote, np.arange(2), "skip")
    found: list[list[dict]] = []
    reader = threading.Thread(target=lambda: found.append(augmented(remote, np.arange(2), patience=120)))
    faulty_s3.counts.clear()
    reader.start()
    assert faulty_s3.wait_for(mode, 2)
    faulty_s3.mode = "ok"
    reader.join()
    assert found == [expected]


def test_rows_of_a_flaky_storage_are_equal(remote: PackedSet, intact: PackedSet, faulty_s3: FaultyServer) -> None:
    faulty_s3.mode = "flaky"
    positions = np.arange(NUM_IMAGES)
    assert augmented(remote, positions, patience=120) == augmented(intact, positions)
    for fault in ("500", "503", "slow", "refuse", "cut"):
        assert faulty_s3.counts[fault] > 1


def test_an_object_that_was_deleted_is_skipped(remote: PackedSet) -> None:
    """The open file says so in other words than a new one."""
    read(remote, 17)
    storage.locate(remote.shards[1]).delete()
    (position,) = (p for p in range(NUM_IMAGES) if index_at(p) == 17)
    (row,) = augmented(remote, np.array([position]), "skip", patience=60)
    assert row["image_id"] == remote.image_ids[32]
    assert "the file does not exist" in row["skipped"]
