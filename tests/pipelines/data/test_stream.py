"""The data streams: exact order, work in other processes, and errors for damaged data."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import RateBasedClusterAutoscaler

from maskformer.preprocess import resize_image, resized_shape
from pipelines.config.recipes import DEMO
from pipelines.data import stream
from pipelines.data.augment import Sample, augment, sample_rng
from pipelines.data.batch import PanopticBatch
from pipelines.data.execution import original_errors
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.order import BatchSplit, permutation
from pipelines.data.pixels import decode_image, decode_panoptic, index_map
from pipelines.data.sample_order import SampleOrder
from pipelines.data.stream import resized_images, training_batches
from pipelines.data.tasks import LoadAndAugment
from pipelines.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]

SEED, NUM_IMAGES, AUGMENT = 5, 80, DEMO.data.augment


@pytest.fixture
def samples(packs: dict[str, str]) -> PackedSet:
    return open_pack(packs["train"])


def batches(
    samples: PackedSet, first: int, last: int, *, micro_batch: int = 2, rank: int = 0, **changes: Any
) -> Generator[PanopticBatch]:
    """Stream the positions [first, last), of which a step has one micro-batch for each of the workers."""
    workers, window = changes.pop("workers", 1), changes.pop("window", 0)
    split = BatchSplit(global_batch=workers * micro_batch, micro_batch=micro_batch, workers=workers)
    steps = {"first_step": first // split.global_batch, "last_step": last // split.global_batch}
    settings: dict[str, Any] = {"samples_per_task": 4, "cpus": 1.0, "prefetch": 2, "object_store": 10**9, **changes}
    return training_batches(samples, order_of(samples, split, window=window), rank=rank, **steps, **settings)


def order_of(samples: PackedSet, split: BatchSplit, **changes: Any) -> SampleOrder:
    return SampleOrder(
        image_ids=samples.image_ids,
        heights=samples.index["height"].to_numpy(),
        widths=samples.index["width"].to_numpy(),
        seed=SEED,
        augmentation=AUGMENT,
        split=split,
        **changes,
    )


def packed_rows(samples: PackedSet) -> dict[int, dict[str, Any]]:
    """Read all rows by image id, without the stream."""
    return {row["image_id"]: row for shard in samples.shards for row in pq.read_table(shard).to_pylist()}


class Witnessed(LoadAndAugment):
    """Makes every task write down its process, and the one from position `late` end after the two tasks behind it.

    It has one of two slots, so the second of those tasks starts only after the first has returned.
    """

    notes: ClassVar[Path]
    late: ClassVar[int]

    def __call__(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> pa.Table:
        table, first = super().__call__(positions, epochs, indices), int(positions[0])
        deadline = time.monotonic() + 60
        last_behind = self.notes / str(first + 2 * len(positions))
        while first == self.late and not last_behind.exists():
            assert time.monotonic() < deadline, "the tasks did not run in parallel"
            time.sleep(0.01)
        (self.notes / str(first)).write_text(str(os.getpid()))
        return table


def test_the_order_does_not_depend_on_the_duration_of_tasks(
    samples: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the middle of an epoch into the next, with a task that ends after two later ones."""
    witness = type("Witness", (Witnessed,), {"notes": tmp_path, "late": 74})
    monkeypatch.setattr(stream, "LoadAndAugment", witness)
    # Ray Data uses what others did not request, and requests of a killed run count for three more minutes.
    total = ExecutionResources.from_resource_dict({**ray.cluster_resources()})
    monkeypatch.setattr(RateBasedClusterAutoscaler, "get_total_resources", lambda self: total)
    # Two parallel tasks in half a CPU, whatever else runs in the shared session.
    monkeypatch.setattr(stream, "_TASK_CPUS", 0.25)
    found = list(batches(samples, 70, 90, cpus=0.5))

    assert [batch.positions for batch in found] == [(p, p + 1) for p in range(70, 90, 2)]
    order = np.concatenate([permutation(NUM_IMAGES, SEED, epoch) for epoch in range(2)])
    assert [i for batch in found for i in batch.image_ids] == samples.image_ids[order[70:90]].tolist()
    assert [e for batch in found for e in batch.epochs] == [0] * 10 + [1] * 10

    notes = {int(note.name): note for note in tmp_path.iterdir()}
    assert sorted(notes) == [70, 74, 78, 82, 86]
    # Decoding and augmentation ran in other processes.
    assert str(os.getpid()) not in {note.read_text() for note in notes.values()}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_its_micro_batches(samples: PackedSet, rank: int) -> None:
    """From the middle of a task's part of a step on, and across the end of an epoch."""
    found = batches(samples, 76, 92, workers=2, rank=rank, samples_per_task=6)
    assert [batch.positions for batch in found] == [(p, p + 1) for p in range(76 + 2 * rank, 92, 4)]


def test_dealt_and_grouped_samples_arrive_as_ordered(samples: PackedSet) -> None:
    """A task may hold a part of a step, of which its rank has three micro-batches."""
    split = BatchSplit(global_batch=12, micro_batch=2, workers=2)
    settings: dict[str, Any] = {"cpus": 1.0, "prefetch": 2, "object_store": 10**9, "samples_per_task": 4}
    used: list[int] = []
    for rank in range(2):
        order = order_of(samples, split, window=3)
        wanted = order.positions(rank, 5, 9)
        found = list(training_batches(samples, order, rank=rank, first_step=5, last_step=9, **settings))
        assert [p for batch in found for p in batch.positions] == wanted.tolist()
        epochs, indices = order.samples(wanted)
        assert [e for batch in found for e in batch.epochs] == epochs.tolist()
        assert [i for batch in found for i in batch.image_ids] == samples.image_ids[indices].tolist()
        sizes = order.sizes(wanted).tolist()
        assert [list(size) for batch in found for size in batch.sizes] == sizes
        used += wanted.tolist()
    assert sorted(used) == list(range(60, 108))


def test_a_sample_is_a_function_of_seed_epoch_and_image(samples: PackedSet) -> None:
    rows = packed_rows(samples)
    found = list(batches(samples, 76, 88, micro_batch=4, samples_per_task=6))
    assert [len(batch.images) for batch in found] == [4, 4, 4]
    for batch in found:
        for index, (image_id, epoch) in enumerate(zip(batch.image_ids, batch.epochs, strict=True)):
            row = rows[image_id]
            indices, classes = index_map(decode_panoptic(row["panoptic"]), row["segments"], samples.taxonomy)
            raw = Sample(decode_image(row["image"]), indices, classes)
            expected = augment(raw, sample_rng(SEED, epoch, image_id), AUGMENT)
            height, width = batch.sizes[index]
            image = batch.images[index, :, :height, :width].permute(1, 2, 0)
            np.testing.assert_array_equal(image.numpy(), expected.image)
            np.testing.assert_array_equal(batch.index_maps[index, :height, :width].numpy(), expected.index_map)
            assert batch.classes[index].tolist() == expected.classes.tolist()


def test_an_evaluation_reads_every_image_once(samples: PackedSet) -> None:
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


def test_a_filtered_set_is_streamed(samples: PackedSet) -> None:
    """Shard and row still belong to the image, and an epoch is shorter."""
    kept = samples.take(np.array([3, 40, 79]))
    found = batches(kept, 0, 6, micro_batch=3, samples_per_task=3)
    assert [sorted(batch.image_ids) for batch in found] == [samples.image_ids[[3, 40, 79]].tolist()] * 2


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
    message = f"^Row 5 of {shard} is damaged: its bytes are not those of image {image_id} .*again"
    with pytest.raises(UserError, match=message):
        list(batches(samples, 0, NUM_IMAGES))
    dataset = resized_images(samples, short_side=40, long_side=60, samples_per_task=8, cpus=0.5)
    with pytest.raises(UserError, match=message), original_errors():
        list(dataset.iter_rows())


def test_a_damaged_row_is_skipped(samples: PackedSet, damaged: tuple[PackedSet, int, str]) -> None:
    copy, image_id, _ = damaged
    expected = list(batches(samples, 0, NUM_IMAGES, samples_per_task=20))
    found = list(batches(copy, 0, NUM_IMAGES, samples_per_task=20, damaged="skip"))
    assert [batch.positions for batch in found] == [batch.positions for batch in expected]
    assert [batch.epochs for batch in found] == [batch.epochs for batch in expected]
    other = int(samples.image_ids[np.flatnonzero(samples.image_ids == image_id)[0] + 1])
    for one, same in zip(found, expected, strict=True):
        assert one.image_ids == tuple(other if i == image_id else i for i in same.image_ids)
        if image_id in same.image_ids:
            (text,) = one.skipped
            assert text.endswith(f"image {image_id} as packed. Image {other} took its place.")
        else:
            assert one.skipped == ()
            assert torch.equal(one.images, same.images)
            assert torch.equal(one.index_maps, same.index_maps)


def test_a_task_whose_process_dies_is_repeated(
    samples: PackedSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Dying(LoadAndAugment):
        def __call__(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> pa.Table:
            mark = tmp_path / str(positions[0])
            if positions[0] == 8 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(positions, epochs, indices)

    expected = list(batches(samples, 0, 24))
    monkeypatch.setattr(stream, "LoadAndAugment", Dying)
    found = list(batches(samples, 0, 24))
    assert (tmp_path / "8").exists()
    assert [batch.positions for batch in found] == [batch.positions for batch in expected]
    for one, same in zip(found, expected, strict=True):
        assert torch.equal(one.images, same.images)


def test_a_long_stream_is_several_executions(samples: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short one, and then each of at least an epoch, here of 20 tasks."""
    monkeypatch.setattr(stream, "_FIRST_TASKS", 3)
    monkeypatch.setattr(stream, "_TASKS_PER_EXECUTION", 1)
    started: list[range] = []
    execute = stream._stream
    monkeypatch.setattr(
        stream, "_stream", lambda compute, tasks, *rest: (started.append(tasks), execute(compute, tasks, *rest))[1]
    )
    found = list(batches(samples, 4, 2 * NUM_IMAGES + 8))
    assert started == [range(0, 3), range(3, 23), range(23, 41)]
    assert [p for batch in found for p in batch.positions] == list(range(4, 2 * NUM_IMAGES + 8))


def test_a_stream_in_another_order_is_refused(samples: PackedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(LoadAndAugment):
        def __call__(self, positions: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> pa.Table:
            return super().__call__(positions[::-1], epochs[::-1], indices[::-1])

    monkeypatch.setattr(stream, "LoadAndAugment", Wrong)
    with pytest.raises(RuntimeError, match=r"returned the positions \(3, 2\) instead of \[0, 1\]"):
        list(batches(samples, 0, 4))


def test_closing_early_ends_the_thread(samples: PackedSet) -> None:
    found = batches(samples, 0, 400, prefetch=1)
    next(found)
    threads = [thread for thread in threading.enumerate() if thread.name == "sample stream"]
    assert threads
    found.close()
    deadline = time.monotonic() + 120
    for thread in threads:
        thread.join(deadline - time.monotonic())
        assert not thread.is_alive()
