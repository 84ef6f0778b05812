"""The demonstration: draw pictures, pack, train, evaluate, register. The very path of a real training, but small."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.parquet as pq
import torch

from maskformer import build_model
from maskformer.panoptic_quality import PanopticResult
from pipelines import cluster
from pipelines.checkpoint import SavedModel
from pipelines.config import PublishConfig, TrainConfig, resolve
from pipelines.data.coco import CocoLayout
from pipelines.data.manifest import open_pack, read_manifest
from pipelines.data.pack import PackConfig, pack
from pipelines.data.pixels import decode_image, decode_panoptic
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.errors import UserError
from pipelines.evaluation import evaluate
from pipelines.evaluation.baseline import color_baseline
from pipelines.publish import Published, publish
from pipelines.storage import is_remote, locate
from pipelines.training import TrainResult, fit

logger = logging.getLogger(__name__)

SPLITS = {"train": 1600, "val": 200}
"""Pictures to draw of each split; no picture occurs in two."""
MODEL_NAME, ALIAS = "maskformer-demo", "demo"


@dataclass(frozen=True)
class DemoReport:
    """What the demonstration ended with."""

    training: TrainResult
    untrained: PanopticResult
    baseline: PanopticResult
    published: Published | None
    """None if the training was stopped."""


def run_demo(config: TrainConfig) -> DemoReport:
    """Go the whole way below the folder `config.run.storage`; what an earlier call finished is kept."""
    if is_remote(config.run.storage):
        raise UserError(
            f"The demonstration draws its pictures on this machine, got --run.storage {config.run.storage}. "
            f"Use a local folder."
        )
    storage = locate(config.run.storage)
    packs = {split: _pack(str(storage / "demo-data"), split, count) for split, count in SPLITS.items()}
    config = resolve(replace(config, data=replace(config.data, train=packs["train"], val=packs["val"])))
    logger.info("Scoring the colour baseline.")
    taxonomy = open_pack(config.data.val).taxonomy
    baseline = color_baseline(_records(packs["train"]), _records(packs["val"]), taxonomy)
    with cluster.session():
        logger.info("Scoring the untrained model.")
        untrained = evaluate(
            _untrained(config),
            config.data.val,
            output=str(storage / "demo-data" / "untrained"),
            cpus=0.5,
        )
        training = fit(config)
        published = None
        if training.status == "finished":
            logger.info("Evaluating the last checkpoint on %d held-out images.", SPLITS["val"])
            published = publish(
                PublishConfig(checkpoint=training.checkpoint, data=config.data.val, register=MODEL_NAME, alias=ALIAS)
            )
    return DemoReport(training, untrained.quality, baseline, published)


def _pack(folder: str, split: str, count: int) -> str:
    """Draw and pack one split, unless that is done; return the pack's place."""
    packed = f"{folder}/{split}"
    draw_dataset(f"{folder}/coco", SyntheticConfig(split=split, num_images=count, max_side=64))
    pack(CocoLayout.find(f"{folder}/coco", split), packed, PackConfig())
    return packed


def _records(pack_uri: str) -> Iterator[tuple[Any, Any, Any]]:
    """Yield image, segment ids and segments of every packed image."""
    place = locate(pack_uri)
    for shard in read_manifest(place).shards:
        table = pq.read_table((place / shard.file).path, columns=["image", "panoptic", "segments"])
        for row in table.to_pylist():
            yield decode_image(row["image"]), decode_panoptic(row["panoptic"]), row["segments"]


def _untrained(config: TrainConfig) -> SavedModel:
    torch.manual_seed(config.run.seed)
    weights = build_model(config.model).state_dict()
    return SavedModel("untrained", 0, weights, config, open_pack(config.data.val).taxonomy)
