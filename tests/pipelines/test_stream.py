"""The data streams: exact order, work done in other processes, and what becomes of damage."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler

from maskformer.inference import resize_image, resized_shape
from pipelines.data import stream
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.batch import PanopticBatch
from pipelines.data.coco import CocoLayout
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.order import permutation
from pipelines.data.pack import PackConfig, pack
from pipelines.data.pixels import decode_image, decode_panoptic, index_map
from pipelines.data.stream import original_errors, resized_images, training_batches
from pipelines.errors import UserError
from pipelines.recipes import DEMO
from tests.pipelines.coco_folder import OTHER_THING, SPLIT, STUFF, THING, edit_json, write_coco_folder

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

SEED, NUM_IMAGES, AUGMENT = 5, 80, DEMO.data.augment


@pytest.fixture
def samples(packs: dict[str, str]) -> PackedSet:
    return open_pack(packs["train"])


def batches(samples: PackedSet, positions: np.ndarray, **changes: Any) -> Generator[PanopticBatch]:
    settings: dict[str, Any] = {"micro_batch": 2, "samples_per_task": 4, "cpus": 1.0, "prefetch": 2, **changes}
    return training_batches(samples, positions, seed=SEED, augmentation=AUGMENT, **settings)


def packed_rows(samples: PackedSet) -> dict[int, dict[str, Any]]:
    """Read all rows by image id, without the stream."""
    return {row["image_id"]: row for shard in samples.shards for row in pq.read_table(shard).to_pylist()}


def witnessed(
    make_operator: Callable[..., Callable[[pa.Table], pa.Table]], notes: Path, late: int
) -> Callable[..., Callable[[pa.Table], pa.Table]]:
    """Let every task leave a note of its process, and the one from position `late` end after the two behind it.

    Of two slots it holds one, so that the second of them starts only when the first has been handed back.
    """

    def make(*args: Any) -> Callable[[pa.Table], pa.Table]:
        operator = make_operator(*args)

        def operate(plan: pa.Table) -> pa.Table:
            table, positions = operator(plan), plan["position"].to_pylist()
            deadline = time.monotonic() + 60
            last_behind = notes / str(positions[0] + 2 * len(positions))
            while positions[0] == late and not last_behind.exists():
                assert time.monotonic() < deadline, "the tasks did not run side by side"
                time.sleep(0.01)
            (notes / str(positions[0])).write_text(str(os.getpid()))
            return table

        return operate

    return make


def test_exact_order_whatever_the_tasks_take(
    samples: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the middle of an epoch into the next: three executions, and a task that two others overtake."""
    monkeypatch.setattr(stream, "_TASKS_PER_EXECUTION", 3)
    monkeypatch.setattr(stream, "_LoadAndAugment", witnessed(stream._LoadAndAugment, tmp_path, late=74))
    # Ray Data plans with what others did not ask for, and what a killed run asked for counts for three minutes more.
    whole = ExecutionResources.from_resource_dict({**ray.cluster_resources()})
    monkeypatch.setattr(RateBasedClusterAutoscaler, "get_total_resources", lambda self: whole)
    through = stream._through
    # Two tasks side by side in half a CPU, whatever else the shared session is busy with.
    monkeypatch.setattr(stream, "_through", lambda operator, plans, cpus: through(operator, plans, cpus / 2))
    found = list(batches(samples, np.arange(70, 90), cpus=0.5))

    assert [batch.positions for batch in found] == [(p, p + 1) for p in range(70, 90, 2)]
    order = np.concatenate([permutation(NUM_IMAGES, SEED, epoch) for epoch in range(2)])
    assert [i for batch in found for i in batch.image_ids] == samples.image_ids[order[70:90]].tolist()
    assert [e for batch in found for e in batch.epochs] == [0] * 10 + [1] * 10

    notes = {int(note.name): note for note in tmp_path.iterdir()}
    assert sorted(notes) == [70, 74, 78, 82, 86]
    # Decoding and augmentation happened elsewhere.
    assert str(os.getpid()) not in {note.read_text() for note in notes.values()}


def test_positions_need_not_be_adjacent(samples: PackedSet) -> None:
    """A rank of several takes every other micro-batch."""
    positions = np.array([2, 3, 6, 7, 10, 11, 162, 163])
    assert [p for batch in batches(samples, positions) for p in batch.positions] == positions.tolist()


def test_a_sample_is_a_function_of_seed_epoch_and_image(samples: PackedSet) -> None:
    rows = packed_rows(samples)
    positions = np.array([0, 1, 2, 3, 80, 81, 82, 83, 84, 85, 86, 87])
    found = list(batches(samples, positions, micro_batch=4, samples_per_task=6))
    assert [len(batch.images) for batch in found] == [4, 4, 4]
    for batch in found:
        for place, (image_id, epoch) in enumerate(zip(batch.image_ids, batch.epochs, strict=True)):
            row = rows[image_id]
            plane, classes = index_map(decode_panoptic(row["panoptic"]), row["segments"], samples.taxonomy)
            raw = Sample(decode_image(row["image"]), plane, classes)
            expected = augment(raw, sample_rng(SEED, epoch, image_id), AUGMENT)
            height, width = batch.sizes[place]
            image = batch.images[place, :, :height, :width].permute(1, 2, 0)
            np.testing.assert_array_equal(image.numpy(), expected.image)
            np.testing.assert_array_equal(batch.index_maps[place, :height, :width].numpy(), expected.index_map)
            assert batch.classes[place].tolist() == expected.classes.tolist()


def test_an_evaluation_sees_every_image_once(samples: PackedSet) -> None:
    rows = packed_rows(samples)
    dataset = resized_images(samples, short_side=40, long_side=60, samples_per_task=7, cpus=0.5)
    found = {row["image_id"]: row for row in dataset.iter_rows()}
    assert dataset.count() == len(rows) == NUM_IMAGES
    assert found.keys() == rows.keys()
    for image_id, row in found.items():
        packed = rows[image_id]
        shape = resized_shape(packed["height"], packed["width"], 40, 60)
        image = np.frombuffer(row["image"], np.uint8).reshape(*shape, 3)
        np.testing.assert_array_equal(image, resize_image(decode_image(packed["image"]), shape))
        assert (row["original_height"], row["original_width"]) == (packed["height"], packed["width"])
        assert (row["panoptic"], row["segments"]) == (packed["panoptic"], packed["segments"])


def test_a_subset_is_spread_evenly(samples: PackedSet) -> None:
    assert samples.subset(3).image_ids.tolist() == samples.image_ids[[0, 40, 79]].tolist()
    assert samples.subset(1000).image_ids.tolist() == samples.image_ids.tolist()


def test_images_without_a_thing_are_left_out(tmp_path: Path) -> None:
    def take_things_away(document: dict[str, Any]) -> None:
        """Of image 12 all things become crowds, of image 14 stuff."""
        segments = {entry["image_id"]: entry["segments_info"] for entry in document["annotations"]}
        for segment in segments[12]:
            segment["iscrowd"] = int(segment["category_id"] in (THING, OTHER_THING))
        for segment in segments[14]:
            segment.update(category_id=STUFF, iscrowd=0)

    write_coco_folder(tmp_path / "coco")
    edit_json(tmp_path / "coco", take_things_away)
    uri = str(tmp_path / "packed")
    pack(CocoLayout.find(str(tmp_path / "coco"), SPLIT), uri, PackConfig(rows_per_shard=2))
    whole, kept = open_pack(uri), open_pack(uri, require_thing=True)
    assert (whole.image_ids.tolist(), whole.num_left_out) == ([11, 12, 13, 14, 15], 0)
    assert (kept.image_ids.tolist(), kept.num_left_out) == ([11, 13, 15], 2)
    # Shard and row still belong to the image, and an epoch is shorter.
    epochs = batches(kept, np.arange(6), micro_batch=3, samples_per_task=3)
    assert [sorted(batch.image_ids) for batch in epochs] == [[11, 13, 15]] * 2


@pytest.fixture
def damaged(samples: PackedSet, tmp_path: Path) -> tuple[PackedSet, int, str]:
    """Flip one bit inside an image of a copy of the pack; return the copy, the image's id and the shard."""
    shutil.copytree(samples.uri, tmp_path / "damaged")
    copy = open_pack(str(tmp_path / "damaged"))
    row = pq.read_table(copy.shards[2]).to_pylist()[5]
    content = bytearray(Path(copy.shards[2]).read_bytes())
    content[bytes(content).index(row["image"]) + len(row["image"]) // 2] ^= 1
    Path(copy.shards[2]).write_bytes(content)
    return copy, row["image_id"], copy.shards[2]


def test_a_damaged_row_is_named(damaged: tuple[PackedSet, int, str]) -> None:
    samples, image_id, shard = damaged
    message = f"^Row 5 of {shard} is damaged: its bytes are not those of image {image_id} .*again.$"
    with pytest.raises(UserError, match=message):
        list(batches(samples, np.arange(NUM_IMAGES)))
    dataset = resized_images(samples, short_side=40, long_side=60, samples_per_task=8, cpus=0.5)
    with pytest.raises(UserError, match=message), original_errors():
        list(dataset.iter_rows())


def test_a_shard_that_cannot_be_read_is_named(samples: PackedSet, tmp_path: Path) -> None:
    shutil.copytree(samples.uri, tmp_path / "copy")
    copy = open_pack(str(tmp_path / "copy"))
    Path(copy.shards[1]).write_bytes(Path(copy.shards[1]).read_bytes()[:1000])
    first = int(copy.image_ids[np.flatnonzero(copy.shard == 1)[0]])
    with pytest.raises(OSError, match=f"^Cannot read image {first}, row 0 of {copy.shards[1]}: .*Parquet"):
        stream._read_row(copy.shards[1], 0, first)


def test_closing_early_ends_the_thread(samples: PackedSet) -> None:
    found = batches(samples, np.arange(400), prefetch=1)
    next(found)
    threads = [thread for thread in threading.enumerate() if thread.name == "sample stream"]
    assert threads
    found.close()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(deadline - time.monotonic())
        assert not thread.is_alive()
