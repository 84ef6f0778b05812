"""Whole small runs: what the quick PQ says and leaves alone, and how a run that cannot go on ends."""

import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from maskformer import PanopticConfig, PanopticQuality
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import load_model
from pipelines.config.train import TrainConfig
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import open_pack
from pipelines.data.pack import PackConfig, pack
from pipelines.data.pixels import decode_image, decode_panoptic
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import RunFailedError
from pipelines.evaluation.score import segmenter
from pipelines.storage import Location, locate
from pipelines.training import TrainCallbacks, TrainResult, driver, fit, ledger, replay
from tests.pipelines.data.coco_folder import ids_to_rgb

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(400)]

STEPS, EVERY, IMAGES = 20, 10, 7


def short(config: TrainConfig) -> TrainConfig:
    """Describe a run that starts learning at once, but slowly, and whose model calls every query a segment.

    Such a model gives most of a picture to one class; its PQ on pictures of one class is not 0.
    """
    return replace(
        config,
        panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.0),
        optimizer=replace(config.optimizer, lr=1e-4),
        schedule=replace(config.schedule, warmup_steps=0),
        run=replace(config.run, steps=STEPS),
        checkpoint=replace(config.checkpoint, every=EVERY),
    )


@pytest.fixture(scope="module")
def with_quick_pq(
    ray_session: str, tiny_in: Callable[[Path], TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    folder = tmp_path_factory.mktemp("quick")
    config = short(tiny_in(folder))
    return fit(
        replace(
            config,
            data=replace(config.data, val=pack_one_class_pictures(folder)),
            evaluation=replace(config.evaluation, every=EVERY, images=IMAGES),
        )
    )


def pack_one_class_pictures(folder: Path) -> str:
    """Pack 13 pictures, each wholly of one class: a model that has hardly learned is right about some of the seven."""
    images, pngs = folder / "coco" / "val", folder / "coco" / "annotations" / "panoptic_val"
    images.mkdir(parents=True)
    pngs.mkdir(parents=True)
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    rng = np.random.default_rng(0)
    for number in range(13):
        height, width = rng.integers(48, 80, 2).tolist()
        ids = np.full((height, width), number + 1)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(images / f"{number}.jpg")
        Image.fromarray(ids_to_rgb(ids)).save(pngs / f"{number}.png")
        segment = {"id": number + 1, "category_id": CATEGORIES[number // 2]["id"], "iscrowd": 0}
        document["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        document["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": [segment]})
    (folder / "coco" / "annotations" / "panoptic_val.json").write_text(json.dumps(document))
    pack(read_coco(CocoLayout.find(str(folder / "coco"), "val")), str(folder / "val"), PackConfig(), in_process=True)
    return str(folder / "val")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute as the workers do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_quick_pq_is_that_of_the_checkpoint(with_quick_pq: TrainResult) -> None:
    """Every other image of the 13, scored here one by one; two workers share an odd number."""
    val = open_pack(str(Path(with_quick_pq.folder).parent / "val"))
    chosen = range(0, 13, 2)
    rows = {row["image_id"]: row for shard in val.shards for row in pq.read_table(shard).to_pylist()}
    client = MlflowClient(with_quick_pq.tracking_uri)
    for step in range(EVERY, STEPS + 1, EVERY):
        saved = load_model(checkpoint.step_folder(locate(with_quick_pq.folder), step))
        segment = segmenter(saved, "cpu")
        quality = PanopticQuality(val.taxonomy)
        for image_id in chosen:
            row = rows[image_id]
            truth = (decode_panoptic(row["panoptic"]), row["segments"])
            quality.update(segment(decode_image(row["image"])), truth, image_id)
        result = quality.result()
        assert result.pq > 0, "0 would prove little"
        for name, expected in (("all", result.pq), ("things", result.things.pq), ("stuff", result.stuff.pq)):
            history = client.get_metric_history(with_quick_pq.mlflow_run_id, f"quick_pq/{name}")
            assert [metric.step for metric in history] == list(range(EVERY, STEPS + 1, EVERY))
            (logged,) = [metric.value for metric in history if metric.step == step]
            assert logged == pytest.approx(expected, abs=1e-12)


def test_quick_pq_leaves_training_alone(with_quick_pq: TrainResult, tiny: TrainConfig) -> None:
    without = fit(short(tiny))
    ours, theirs = (checkpoint.load(checkpoint.step_folder(locate(r.folder), STEPS)) for r in (with_quick_pq, without))
    for name, tensor in theirs.model.items():
        assert torch.equal(ours.model[name], tensor), name


def failure(config: TrainConfig) -> tuple[str, list[dict[str, Any]]]:
    """Run `config`, which fails, and return the message and the ledger."""
    with pytest.raises(RunFailedError) as failed:
        fit(config)
    run = locate(config.run.storage) / config.run.name
    client = MlflowClient(f"sqlite:///{config.run.storage}/mlflow.db")
    (experiment,) = client.search_experiments(filter_string=f"name = '{config.tracking.experiment}'")
    (tracked,) = client.search_runs([experiment.experiment_id])
    events = ledger.read(run)
    assert (events[-1]["event"], events[-1]["status"]) == ("end", "failed")
    assert events[-1]["cause"] in str(failed.value)
    assert tracked.info.status == "FAILED"
    assert tracked.data.tags["cause"] == events[-1]["cause"]
    return str(failed.value), events


def test_overflow_ends_the_run_and_says_where(tiny: TrainConfig) -> None:
    """A learning rate that no float survives: step 0 is fine, the logits of step 1 are not finite."""
    config = short(tiny)
    message, events = failure(replace(config, optimizer=replace(config.optimizer, lr=1e30)))
    assert "step 1, worker" in message
    assert "learning rate 9.9" in message  # cosine's factor at step 1 of 20
    assert "not finite" in message
    images = re.search(r"Images (\d+), (\d+)", message)
    assert images is not None
    assert {int(image) for image in images.groups()} <= set(open_pack(config.data.train).image_ids.tolist())
    # Repeated once, since a faulty device may have caused it, and then kept for jobs/replay.py.
    assert [event["failed_step"] for event in events if event["event"] == "failure"] == [1, 1]
    bundle = locate(config.run.storage) / "run" / "replay" / "step_00000001"
    report = replay.replay(replay.read_bundle(bundle), torch.device("cpu"), "float32")
    assert {image for batch in report.micro_batches for image in batch.image_ids} >= {int(i) for i in images.groups()}
    assert "forward pass" in str(report)


@pytest.mark.slow
def test_a_driver_that_lost_its_lock_stops_and_writes_nothing(
    tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns so at the quick PQ of step 10; from then on, ledger and MLflow run are another driver's."""
    lost = threading.Event()

    @contextmanager
    def lock(folder: Location, what: str) -> Iterator[threading.Event]:
        yield lost

    monkeypatch.setattr(driver, "locked", lock)
    config = replace(short(tiny), evaluation=replace(tiny.evaluation, every=EVERY, images=1))
    config = replace(config, data=replace(config.data, val=config.data.train), run=replace(config.run, steps=10_000))
    with pytest.raises(RunFailedError, match="belongs to another driver now"):
        fit(config, callbacks=TrainCallbacks(on_quick_pq=lambda step, pq: lost.set()))
    events = ledger.read(locate(config.run.storage) / config.run.name)
    assert "start" in {event["event"] for event in events}
    assert not {"restart", "failure", "end"} & {event["event"] for event in events}
    (tracked,) = MlflowClient(f"sqlite:///{config.run.storage}/mlflow.db").search_runs(["1"])
    assert tracked.info.status == "RUNNING"


def test_a_damaged_row_ends_the_run_and_is_named(tiny: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(tiny.data.train, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "shard-00003.parquet"
    row = pq.read_table(shard).to_pylist()[7]
    content = bytearray(shard.read_bytes())
    content[bytes(content).index(row["image"]) + len(row["image"]) // 2] ^= 1
    shard.write_bytes(content)
    config = short(tiny)
    message, events = failure(replace(config, data=replace(config.data, train=str(tmp_path / "damaged"))))
    assert f"Row 7 of {shard} is damaged" in message
    assert f"those of image {row['image_id']} as" in message
    assert sum(event["event"] == "start" for event in events) == 1
