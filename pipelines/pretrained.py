"""Weights from anywhere: a run of ours, a file of another program, on disk or at a URI."""

import io
import logging
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

from maskformer import MaskFormer, Taxonomy, weights
from pipelines import checkpoint
from pipelines.checkpoint import SavedModel
from pipelines.config import RunConfig, TrainConfig, to_dict
from pipelines.errors import UserError
from pipelines.storage import Location, locate

logger = logging.getLogger(__name__)


def read(where: str) -> weights.Weights:
    """Read the weights at a path or URI: a run's folder, one of its checkpoints, or what `maskformer.weights` reads.

    Raises:
        UserError: there is nothing, or nothing that can be read as weights.
    """
    place = locate(where)
    if not place.exists():
        raise UserError(
            f"There is nothing at {where}. Give a run's folder (<storage>/<run name>), one of its checkpoints/step_* "
            f"folders, or a checkpoint of mmdetection, detectron2 or Hugging Face."
        )
    if checkpoint.is_ours(place):
        saved = checkpoint.load_model(place)
        about = {"config": to_dict(saved.config), "categories": saved.taxonomy.to_coco()}
        return weights.Weights(saved.uri, saved.weights, about)
    try:
        return weights.read(place.path) if place.is_local else _fetched(place)
    except ValueError as error:
        raise UserError(str(error)) from error


def _fetched(place: Location) -> weights.Weights:
    if not place.is_dir():
        file = io.BytesIO(place.read_bytes())
        file.name = str(place)
        return weights.read(file)
    names = place.names()
    kind = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name.endswith((".json", kind)):
                (Path(scratch) / name).write_bytes((place / name).read_bytes())
        found = weights.read(scratch)
    return weights.Weights(str(place), found.tensors, found.about)


def start(model: MaskFormer, first_weights: str, taxonomy: Taxonomy) -> weights.LoadReport:
    """Load the weights that a training starts from: `imagenet`, or as for `read`, a backbone or a whole model.

    Raises:
        UserError: they are not there, cannot be read, or do not fit the model.
    """
    source = first_weights if first_weights == "imagenet" else read(first_weights)
    try:
        return weights.initial_weights(model, source, taxonomy)
    except ValueError as error:
        raise UserError(str(error)) from error


def open_model(where: str, taxonomy: Taxonomy) -> SavedModel:
    """Open the whole model at a path or URI, ours or another program's, to evaluate it on data with `taxonomy`.

    Raises:
        UserError: it cannot be read, is not whole, or does not know all classes of the data.
    """
    place = locate(where)
    if checkpoint.is_ours(place):
        return checkpoint.load_model(place)
    file = read(where)
    try:
        model = replace(weights.detect(file), num_classes=taxonomy.num_classes)
        state, report = weights.load(file, model, taxonomy)
        report.require_complete()
    except ValueError as error:
        raise UserError(str(error)) from error
    if report.classes_new:
        raise UserError(
            f"{where} does not know {len(report.classes_new)} of the data's {taxonomy.num_classes} classes, first "
            f"{report.classes_new[0]!r}. Evaluate on data with the categories it was trained on, or train it on this "
            f"data, starting with --weights {where}."
        )
    logger.info("%s", report)
    name = PurePosixPath(place.path)
    # What is made of a file lies in a folder beside it, named as it is without its ending.
    folder = name if place.is_dir() else name.with_suffix("") if name.suffix else name.with_suffix(".results")
    parent = str(place).rpartition("/")[0]
    return SavedModel(
        uri=str(place),
        folder=f"{parent}/{folder.name}",
        step=0,
        weights=state,
        config=TrainConfig(
            recipe=report.format, model=model, run=RunConfig(name=folder.name.lstrip("."), storage=parent)
        ),
        taxonomy=taxonomy,
    )
