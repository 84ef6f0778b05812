"""Policies of whole runs: ending early, steps that are not finite, averaged weights, elastic workers, damaged rows.

The oracles are undisturbed runs, and a training loop in this process that does the same steps without Ray Train.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.distributed as dist
from mlflow.tracking import MlflowClient
from PIL import Image

from maskformer import PanopticConfig, build_model
from maskformer.optim import AveragedWeights, build_optimizer
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.state import TrainingState
from pipelines.config.train import TrainConfig
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.manifest import open_pack
from pipelines.data.order import samples_at
from pipelines.data.pack import PackConfig, pack
from pipelines.data.stream import training_batches
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import RunFailedError
from pipelines.storage import locate
from pipelines.training import TrainCallbacks, TrainResult, fit, ledger, prepare_run, replay
from pipelines.training.reduction import ExactReduction
from pipelines.training.saver import snapshot
from pipelines.training.worker import _MOST_SKIPPED, NonFiniteError, train_step
from tests.pipelines.data.coco_folder import ids_to_rgb
from tests.waiting import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(400)]

CPU = torch.device("cpu")


def folder_of(config: TrainConfig) -> Path:
    return Path(config.run.storage) / config.run.name


def events_of(config: TrainConfig) -> list[dict[str, Any]]:
    return ledger.read(locate(folder_of(config)))


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in events]


def starts(config: TrainConfig) -> list[dict[str, Any]]:
    return [event for event in events_of(config) if event["event"] == "start"]


def hashes(*paths: Path) -> dict[str, str]:
    """Return the hash of each file in these files and folders."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def last_state(config: TrainConfig) -> TrainingState:
    state = checkpoint.newest(locate(folder_of(config)), checkpoint.load)
    assert state is not None
    return state


def assert_same_tensors(ours: Any, theirs: Any, name: str = "") -> None:
    """Compare nested tensors and numbers, bit for bit."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs), name
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            assert_same_tensors(ours[key], value, f"{name}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), name
        for index, value in enumerate(theirs):
            assert_same_tensors(ours[index], value, f"{name}.{index}")
    else:
        assert ours == theirs, name


def assert_same_state(ours: TrainingState, theirs: TrainingState) -> None:
    """Compare the weights, the averaged weights and the optimizer."""
    assert ours.step == theirs.step
    assert_same_tensors(ours.model, theirs.model, "model")
    assert_same_tensors(ours.averaged, theirs.averaged, "averaged")
    assert_same_tensors(ours.optimizer["state"], theirs.optimizer["state"], "optimizer")


def assert_same_progress(ours: TrainingState, theirs: TrainingState) -> None:
    """Compare what carries over between steps, but for the points that MLflow happened not to have yet."""
    assert {**ours.progress, "unsent": []} == {**theirs.progress, "unsent": []}


def history(result: TrainResult, metric: str) -> dict[int, float]:
    points = MlflowClient(result.tracking_uri).get_metric_history(result.mlflow_run_id, metric)
    assert len({point.step for point in points}) == len(points), "a step was logged twice"
    return {point.step: point.value for point in points}


# ---- run.patience


def test_patience_ends_a_run_that_no_longer_improves(tiny: TrainConfig) -> None:
    """The learning rate is too small to change a weight, so that the first quick PQ stays the best."""
    config = replace(
        tiny,
        optimizer=replace(tiny.optimizer, lr=1e-30),
        run=replace(tiny.run, patience=2, sample_log=True),
        checkpoint=replace(tiny.checkpoint, every=100, keep=1),
        evaluation=replace(tiny.evaluation, every=2),
    )
    run = folder_of(config)
    result = fit(config)
    assert (result.status, result.step) == ("finished", 2 * (1 + 2))
    (_, end) = events_of(config)
    assert {"event": "end", "status": "finished", "early": 2, "step": 6}.items() <= end.items()
    assert json.loads((run / "best.json").read_text())["step"] == 2
    assert checkpoint.steps_saved(locate(run)) == [2, 6]
    assert len(history(result, "quick_pq/all")) == 3
    assert len(set(history(result, "quick_pq/all").values())) == 1

    # The same command has nothing to do.
    left = hashes(run / "checkpoints", run / "best.json", run / "samples.jsonl", run / "ledger.jsonl")
    assert fit(config) == result
    assert hashes(run / "checkpoints", run / "best.json", run / "samples.jsonl", run / "ledger.jsonl") == left

    # Nor has it if the driver was lost before it wrote the end to the ledger, with its last status and without.
    left = hashes(run / "checkpoints", run / "best.json", run / "samples.jsonl")
    for with_status in (True, False):
        written = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
        assert json.loads(written.pop())["event"] == "end"
        (run / "ledger.jsonl").write_text("".join(written))
        if not with_status:
            (run / "status.json").unlink()
        assert fit(config) == result
        failure, start, end = events_of(config)[len(written) :]
        assert (failure["event"], failure["cause_class"]) == ("failure", "driver")
        assert (start["event"], start["step"]) == ("start", 6)
        assert {"event": "end", "status": "finished", "early": 2, "step": 6}.items() <= end.items()
        assert hashes(run / "checkpoints", run / "best.json", run / "samples.jsonl") == left

    # With more patience it goes on, and ends one evaluation later.
    more = replace(config, run=replace(config.run, patience=3))
    result = fit(more)
    assert (result.status, result.step) == ("finished", 2 * (1 + 3))
    start, end = events_of(config)[-2:]
    assert (start["step"], end["early"], end["step"]) == (6, 3, 8)
    assert json.loads((run / "best.json").read_text())["step"] == 2
    assert checkpoint.steps_saved(locate(run)) == [2, 8]


# ---- run.non_finite

GRAY, STEPS, BATCH, MICRO = 128, 6, 8, 2
POISONED = {2: 2 * BATCH + 3, 3: 3 * BATCH, 5: 5 * BATCH + 7}
"""The steps that are not finite, and the position of the image that makes them so."""


def pack_gray_pictures(folder: Path, noisy: Iterable[int]) -> str:
    """Pack pictures as gray as the mean, each wholly of one class, and others of noise, which overflow."""
    images, pngs = folder / "coco" / "gray", folder / "coco" / "annotations" / "panoptic_gray"
    images.mkdir(parents=True)
    pngs.mkdir(parents=True)
    document: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    rng = np.random.default_rng(0)
    for number in range(STEPS * BATCH):
        height, width = rng.integers(48, 80, 2).tolist()
        pixels = np.full((height, width, 3), GRAY, np.uint8)
        if number in noisy:
            pixels = rng.integers(0, 256, pixels.shape, dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.jpg")
        Image.fromarray(ids_to_rgb(np.full((height, width), number + 1))).save(pngs / f"{number}.png")
        category = CATEGORIES[number % len(CATEGORIES)]["id"]
        segment = {"id": number + 1, "category_id": category, "iscrowd": 0}
        document["images"].append({"id": number, "file_name": f"{number}.jpg", "width": width, "height": height})
        document["annotations"].append({"image_id": number, "file_name": f"{number}.png", "segments_info": [segment]})
    (folder / "coco" / "annotations" / "panoptic_gray.json").write_text(json.dumps(document))
    pack(read_coco(CocoLayout.find(str(folder / "coco"), "gray")), str(folder / "pack"), PackConfig(), in_process=True)
    return str(folder / "pack")


@dataclass(frozen=True)
class Poisoned:
    """A run with steps that are not finite."""

    config: TrainConfig
    images: dict[int, int]
    """By step, the id of the image that makes it so."""
    states: list[TrainingState]
    """After each number of steps, with those that are not finite left out."""
    problems: dict[int, str]


@pytest.fixture(scope="module")
def poisoned(
    ray_session: str, tiny_in: Callable[[Path], TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> Poisoned:
    folder = tmp_path_factory.mktemp("poisoned")
    config = tiny_in(folder)
    indices = samples_at(np.array(list(POISONED.values())), STEPS * BATCH, config.run.seed)[1].tolist()
    train = pack_gray_pictures(folder, indices)
    assert open_pack(train).image_ids.tolist() == list(range(STEPS * BATCH))
    config = replace(
        config,
        # 0 stays 0, and all other differences from the mean become infinite.
        model=replace(config.model, pixel_mean=3 * (float(GRAY),), pixel_std=3 * (1e-39,)),
        data=replace(config.data, train=train),
        optimizer=replace(config.optimizer, lr=1e-3, ema_decay=0.9),
        schedule=replace(config.schedule, kind="step", milestone_epochs=(1000.0,), warmup_steps=0),
        run=replace(config.run, steps=STEPS, global_batch=BATCH, micro_batch=MICRO),
        scaling=replace(config.scaling, max_failures=1),
        checkpoint=replace(config.checkpoint, every=100),
    )
    states, problems = by_hand(config, folder)
    assert problems.keys() == POISONED.keys()
    return Poisoned(config, dict(zip(POISONED, indices, strict=True)), states, problems)


def by_hand(config: TrainConfig, folder: Path) -> tuple[list[TrainingState], dict[int, str]]:
    """Do the steps in this process, and leave out those that are not finite.

    Returns:
        The states after each number of steps, from 0, and what the steps say that are left out.
    """
    run = prepare_run(config.with_workers(1))
    config, split = run.config, run.config.batch_split
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1)
    batches = training_batches(
        run.train,
        config.sample_order(run.train),
        rank=0,
        first_step=0,
        last_step=run.total_steps,
        samples_per_task=config.data.samples_per_task,
        cpus=config.scaling.data_cpus,
        object_store=10**9,
        prefetch=config.data.prefetch,
    )
    try:
        torch.manual_seed(config.run.seed)
        network = build_model(config.model).train()
        reduction = ExactReduction(network, split, CPU)
        optimizer = build_optimizer(network, config.optimizer)
        averaged = AveragedWeights(network, config.optimizer.ema_decay)

        def state(step: int) -> TrainingState:
            parts = (network.state_dict(), optimizer.state_dict(), averaged.state_dict())
            return TrainingState(step, *(snapshot(part) for part in parts))

        states, problems = [state(0)], {}
        for step in range(run.total_steps):
            micro_batches = [next(batches) for _ in range(split.accumulation)]
            masks = sum(min(len(c), config.model.num_queries) for batch in micro_batches for c in batch.classes)
            try:
                train_step(reduction, optimizer, micro_batches, max(1.0, masks / split.accumulation), 1.0, config, CPU)
                averaged.update(network)
            except NonFiniteError as error:
                problems[step] = str(error)
            states.append(state(step + 1))
        return states, problems
    finally:
        batches.close()
        dist.destroy_process_group()
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def halted(poisoned: Poisoned) -> tuple[TrainConfig, str]:
    """Run with the policy to stop; return the configuration and the message."""
    with pytest.raises(RunFailedError) as failed:
        fit(poisoned.config)
    return poisoned.config, str(failed.value)


def failed_steps(events: list[dict[str, Any]]) -> list[int]:
    failures = [event for event in events if event["event"] == "failure"]
    assert {event["cause_class"] for event in failures} <= {"non-finite"}
    return [event["failed_step"] for event in failures]


def test_a_step_that_is_not_finite_is_tried_twice_and_kept(poisoned: Poisoned, halted: tuple[TrainConfig, str]) -> None:
    config, message = halted
    bad = min(poisoned.images)
    events = events_of(config)
    assert kinds(events) == ["start", "failure", "start", "failure", "end"]
    assert failed_steps(events) == [bad, bad]
    assert (events[-1]["status"], events[-1]["cause_class"]) == ("failed", "non-finite")
    assert f"step {bad}, worker" in message
    assert "not finite" in message
    assert [path.name for path in (folder_of(config) / "replay").iterdir()] == [f"step_{bad:08d}"]
    bundle = replay.read_bundle(locate(folder_of(config)) / "replay" / f"step_{bad:08d}")
    assert bundle.step == bad
    assert_same_tensors(dict(bundle.network.state_dict()), poisoned.states[bad].model)
    report = replay.replay(bundle, CPU, "float32")
    assert report.reproduced
    assert [image for batch in report.micro_batches for image in batch.bad_images] == [poisoned.images[bad]]


def test_steps_that_are_not_finite_are_skipped(poisoned: Poisoned, tmp_path: Path) -> None:
    """Three in a row without a checkpoint are more than max_failures allows of other failures."""
    run = replace(poisoned.config.run, storage=str(tmp_path), non_finite="skip", sample_log=True)
    config = replace(poisoned.config, run=run)
    result = fit(config)
    assert (result.status, result.step) == ("finished", STEPS)
    events = events_of(config)
    assert kinds(events) == 3 * ["start", "failure"] + ["start", "end"]
    assert failed_steps(events) == list(POISONED)
    state = last_state(config)
    assert_same_state(state, poisoned.states[STEPS])
    # The steps between two that are skipped are done, and a skipped one changes nothing.
    assert not torch.equal(poisoned.states[5].model["class_head.weight"], poisoned.states[4].model["class_head.weight"])
    assert_same_tensors(poisoned.states[6].model, poisoned.states[5].model)
    assert {value["step"].item() for value in state.optimizer["state"].values()} == {STEPS - len(POISONED)}
    assert state.progress["skipped"] == len(POISONED)
    finite = [step + 1 for step in range(STEPS) if step not in POISONED]
    assert list(history(result, "loss/total")) == finite
    assert all(math.isfinite(loss) for loss in history(result, "loss/total").values())
    assert history(result, "skipped_steps") == {5: 2}
    lines = [json.loads(line) for line in (folder_of(config) / "samples.jsonl").read_text().splitlines()]
    taken = {(line["step"], position) for line in lines for position in line["positions"]}
    assert taken == {(position // BATCH, position) for position in range(STEPS * BATCH)}
    assert not (folder_of(config) / "replay").exists()


def test_too_many_skipped_steps_end_the_run(
    poisoned: Poisoned, halted: tuple[TrainConfig, str], tmp_path: Path
) -> None:
    """The halted run goes on with the other policy, from a state in which one more step may be skipped."""
    config = replace(halted[0], run=replace(halted[0].run, storage=str(tmp_path), non_finite="skip"))
    shutil.copytree(folder_of(halted[0]), folder_of(config))
    before = len(events_of(config))
    first, second, *_ = POISONED
    run = prepare_run(config)
    state = replace(poisoned.states[first], progress={"skipped": _MOST_SKIPPED - 1})
    checkpoint.save(checkpoint.step_folder(run.folder, first), state, run.config, run.train.taxonomy)
    with pytest.raises(RunFailedError, match=f"step {second}, worker"):
        fit(config)
    events = events_of(config)[before:]
    # The first one was not finite before, so it is skipped at once.
    assert failed_steps(events) == [second, second]
    assert [event["step"] for event in events if event["event"] == "start"] == [first, first]
    assert (events[-1]["event"], events[-1]["cause_class"]) == ("end", "non-finite")
    bundle = replay.read_bundle(run.folder / "replay" / f"step_{second:08d}")
    assert_same_tensors(dict(bundle.network.state_dict()), poisoned.states[second].model)


# ---- averaged weights, and a range of workers

LONG = 40


def averaging(config: TrainConfig, workers: int | str) -> TrainConfig:
    """Describe a run with averaged weights that takes long enough to be disturbed."""
    return replace(
        config,
        # Every query is a segment, so that the quick PQ of a model that has hardly learned is not 0.
        panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.0),
        optimizer=replace(config.optimizer, ema_decay=0.9),
        schedule=replace(config.schedule, warmup_steps=0),
        run=replace(config.run, steps=LONG, sample_log=True),
        scaling=replace(config.scaling, workers=workers, reduction="exact"),
        evaluation=replace(config.evaluation, every=2),
    )


@pytest.fixture(scope="module")
def untouched(
    ray_session: str, tiny_in: Callable[[Path], TrainConfig], tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainResult, TrainingState]:
    config = averaging(tiny_in(tmp_path_factory.mktemp("untouched")), 1)
    return fit(config), last_state(config)


def assert_same_run(config: TrainConfig, result: TrainResult, untouched: tuple[TrainResult, TrainingState]) -> None:
    oracle, state = untouched
    assert (result.status, result.step) == (oracle.status, oracle.step) == ("finished", LONG)
    assert_same_state(last_state(config), state)
    assert_same_progress(last_state(config), state)
    for metric in ("loss/total", "quick_pq/all"):
        assert history(result, metric) == history(oracle, metric)


def test_averaged_weights_survive_an_interruption(
    untouched: tuple[TrainResult, TrainingState], tiny: TrainConfig
) -> None:
    """The quick PQ is that of the averaged weights on both workers; the oracle has one worker."""
    oracle, state = untouched
    assert state.averaged is not None
    assert any(not torch.equal(tensor, state.model[name]) for name, tensor in state.averaged.items())
    assert len(set(history(oracle, "quick_pq/all").values())) > 1, "equal quick PQs would prove little"

    config = averaging(tiny, 2)
    callbacks = TrainCallbacks(on_quick_pq=lambda step, pq: callbacks.stop_requested.set())
    stopped = fit(config, callbacks)
    assert stopped.status == "stopped"
    assert 0 < stopped.step < LONG
    assert last_state(config).step == stopped.step
    assert_same_run(config, fit(config), untouched)
    assert kinds(events_of(config)) == ["start", "end", "start", "end"]
    assert starts(config)[1]["step"] == stopped.step


def test_a_run_grows_when_there_is_room(untouched: tuple[TrainResult, TrainingState], tiny: TrainConfig) -> None:
    """At first something else has the CPUs of the second worker."""

    @ray.remote
    class Occupant:
        def ready(self) -> None:
            pass

    config = averaging(tiny, "1:2")
    room = config.scaling.cpus_per_worker + config.scaling.data_cpus
    occupant = Occupant.options(num_cpus=ray.cluster_resources()["CPU"] - room).remote()  # pyright: ignore[reportAttributeAccessIssue]
    ray.get(occupant.ready.remote())  # pyright: ignore[reportFunctionMemberAccess]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(fit, config)
        wait_for(lambda: future.done() or starts(config), "start", poll=0.01)
        ray.kill(occupant)  # pyright: ignore[reportArgumentType]
        result = future.result(timeout=240)
    assert [event["workers"] for event in starts(config)] == [1, 2]
    assert kinds(events_of(config)) == ["start", "restart", "start", "end"]
    assert events_of(config)[1]["cause_class"] == "resized"
    assert_same_run(config, result, untouched)


# ---- data.damaged


def test_damaged_rows_are_replaced_and_counted(tiny: TrainConfig, tmp_path: Path) -> None:
    """One image of the first step, two of the second, and one that these steps do not come to."""
    steps, batch = 5, tiny.run.global_batch
    shutil.copytree(tiny.data.train, tmp_path / "damaged")
    samples = open_pack(str(tmp_path / "damaged"))
    positions = [3, batch, 2 * batch - 1, steps * batch]
    indices = samples_at(np.array(positions), len(samples), tiny.run.seed)[1].tolist()
    for index in indices:
        shard = Path(samples.shards[samples.shard[index]])
        image = pq.read_table(shard).to_pylist()[samples.row[index]]["image"]
        content = bytearray(shard.read_bytes())
        content[bytes(content).index(image) + len(image) // 2] ^= 1
        shard.write_bytes(content)

    states: list[TrainingState] = []
    for workers in (1, 2):
        config = replace(
            tiny,
            data=replace(tiny.data, train=str(tmp_path / "damaged"), damaged="skip"),
            run=replace(tiny.run, name=f"with-{workers}", steps=steps, sample_log=True),
            scaling=replace(tiny.scaling, workers=workers),
        )
        result = fit(config)
        states.append(last_state(config))
        lines = [json.loads(line) for line in (folder_of(config) / "samples.jsonl").read_text().splitlines()]
        taken = {p: i for line in lines for p, i in zip(line["positions"], line["image_ids"], strict=True)}
        expected = samples.image_ids[samples_at(np.arange(steps * batch), len(samples), tiny.run.seed)[1]]
        assert [p for p in range(steps * batch) if taken[p] != expected[p]] == positions[:3]
        assert states[-1].progress["damaged"] == 3
        assert history(result, "damaged_images") == {1: 1, 2: 3, 3: 3, 4: 3, 5: 3}
    assert_same_state(states[1], states[0])
    assert_same_progress(states[1], states[0])
