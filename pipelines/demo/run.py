"""The demo: draw images, pack, train, evaluate and register, by the same code as a real training run."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq
import torch

from maskformer import build_model
from maskformer.panoptic_quality import PanopticResult
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.cluster.session import session
from pipelines.config.publish import PublishConfig, PublishTracking
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import PackedSet
from pipelines.data.pixels import decode_image, decode_panoptic
from pipelines.data.synthetic import SyntheticConfig, draw_and_pack
from pipelines.demo.color_baseline import color_baseline
from pipelines.errors import UserError
from pipelines.evaluation import evaluate
from pipelines.evaluation.publish import Published, publish
from pipelines.storage import is_remote, locate
from pipelines.training import PreparedRun, TrainResult, fit, prepare_run

logger = logging.getLogger(__name__)

SPLITS = {"train": 1600, "val": 200}
"""Number of images of each split; no image occurs in both."""
MODEL_NAME, ALIAS = "maskformer-demo", "demo"


@dataclass(frozen=True)
class DemoReport:
    """Results of the demo."""

    training: TrainResult
    untrained: PanopticResult
    """Panoptic quality of the untrained model."""
    baseline: PanopticResult
    """Panoptic quality of the color baseline."""
    published: Published | None
    """Evaluation of the last checkpoint; None if the training was stopped."""


def run_demo(config: TrainConfig) -> DemoReport:
    """Run the demo in the folder `config.run.storage`. Work that an earlier call completed is not repeated.

    Raises:
        UserError: the storage is not a local folder, or a step of the demo cannot run.
    """
    if is_remote(config.run.storage):
        raise UserError(
            f"The demo draws its images on this machine, got --run.storage {config.run.storage}. Use a local folder."
        )
    folder = str(locate(config.run.storage) / "demo-data")
    packs = draw_splits(folder)
    run = prepare_run(replace(config, data=replace(config.data, **packs)))
    train, val = run.packs
    assert val is not None  # it was drawn
    logger.info("Evaluating the color baseline.")
    baseline = color_baseline(_records(train), _records(val), val.taxonomy)
    with session():
        logger.info("Evaluating the untrained model.")
        untrained = evaluate(_untrained(run), val, output=f"{folder}/untrained", cpus=0.5)
        training = fit(run)
        published = None
        if training.status == "finished":
            logger.info("Evaluating the last checkpoint on %d held-out images.", len(val))
            published = publish(
                PublishConfig(
                    checkpoint=training.checkpoint,
                    data=val.uri,
                    register=MODEL_NAME,
                    alias=ALIAS,
                    tracking=PublishTracking(uri=run.config.tracking.uri),
                )
            )
    return DemoReport(training, untrained.quality, baseline, published)


def draw_splits(folder: str) -> dict[str, str]:
    """Draw and pack the demo's data in a local folder, unless it exists; return the path of each split's pack."""
    return {
        split: draw_and_pack(folder, SyntheticConfig(split=split, num_images=count, max_side=64))
        for split, count in SPLITS.items()
    }


def _records(samples: PackedSet) -> Iterator[tuple[Any, Any, Any]]:
    """Yield image, segment ids and segments of every packed image."""
    for shard in samples.shards:
        table = pq.read_table(locate(shard).path, columns=["image", "panoptic", "segments"])
        for row in table.to_pylist():
            yield decode_image(row["image"]), decode_panoptic(row["panoptic"]), row["segments"]


def _untrained(run: PreparedRun) -> SavedModel:
    torch.manual_seed(run.config.run.seed)
    weights = build_model(run.config.model).state_dict()
    return SavedModel("untrained", 0, weights, run.config, run.train.taxonomy)
