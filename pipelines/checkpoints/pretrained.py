"""Weights of runs and of other programs' checkpoints, at a path or URI."""

import io
import logging
import tempfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

from maskformer import MaskFormer, Taxonomy, weights
from pipelines.checkpoints.saved_model import SavedModel, find, is_native, load_model
from pipelines.config.serialize import to_dict
from pipelines.config.train import RunConfig, TrainConfig
from pipelines.errors import UserError
from pipelines.storage import Location

logger = logging.getLogger(__name__)


def read(uri: str) -> weights.Weights:
    """Read the weights at a path or URI.

    Args:
        uri: a run's folder for its newest checkpoint, the folder followed by `@best` for its best one, one of its
            checkpoints/step_* folders, or what `maskformer.weights` reads.

    Raises:
        UserError: it does not exist, or cannot be read as weights.
    """
    location = find(uri)
    if not location.exists():
        raise UserError(
            f"There is nothing at {uri}. Give a run's folder (<storage>/<run name>), one of its checkpoints/step_* "
            f"folders, or a checkpoint of mmdetection, detectron2 or Hugging Face."
        )
    if is_native(location):
        saved = load_model(location)
        about = {"config": to_dict(saved.config), "categories": saved.taxonomy.to_coco()}
        return weights.Weights(saved.uri, saved.weights, about)
    try:
        return weights.read(location.path) if location.is_local else _read_remote(location)
    except ValueError as error:
        raise UserError(str(error)) from error


def _read_remote(location: Location) -> weights.Weights:
    if not location.is_dir():
        file = io.BytesIO(location.read_bytes())
        file.name = str(location)
        return weights.read(file)
    names = location.names()
    kind = ".safetensors" if any(name.endswith(".safetensors") for name in names) else ".bin"
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            if name.endswith((".json", kind)):
                (Path(scratch) / name).write_bytes((location / name).read_bytes())
        found = weights.read(scratch)
    return weights.Weights(str(location), found.tensors, found.about)


def load_initial_weights(model: MaskFormer, initial_weights: str, taxonomy: Taxonomy) -> weights.LoadReport:
    """Load the weights that training starts from, of a backbone or a complete model.

    Args:
        initial_weights: `imagenet`, or a path or URI as for `read`.

    Raises:
        UserError: they do not exist, cannot be read, or do not fit the model.
    """
    source = initial_weights if initial_weights == "imagenet" else read(initial_weights)
    try:
        return weights.initial_weights(model, source, taxonomy)
    except ValueError as error:
        raise UserError(str(error)) from error


def open_model(uri: str, taxonomy: Taxonomy) -> SavedModel:
    """Open the model at a path or URI, of a run or of another program, to evaluate it on data with `taxonomy`.

    Args:
        uri: as for `read`.

    Raises:
        UserError: it cannot be read, is not a complete model, or lacks classes of the data.
    """
    location = find(uri)
    if is_native(location):
        saved = load_model(location)
        _check_fit(saved)
        return saved
    file = read(uri)
    try:
        model = replace(weights.detect_config(file), num_classes=taxonomy.num_classes)
        state, report = weights.load(file, model, taxonomy)
        report.require_complete()
    except ValueError as error:
        raise UserError(str(error)) from error
    if report.classes_new:
        raise UserError(
            f"{uri} does not know {len(report.classes_new)} of the data's {taxonomy.num_classes} classes, first "
            f"{report.classes_new[0]!r}. Evaluate on data with the categories it was trained on, or train it on this "
            f"data, starting with --weights {uri}."
        )
    logger.info("%s", report)
    parent, folder = results_folder(location)
    return SavedModel(
        uri=str(location),
        folder=f"{parent}/{folder}",
        step=0,
        weights=state,
        config=TrainConfig(recipe=report.format, model=model, run=RunConfig(name=folder.lstrip("."), storage=parent)),
        taxonomy=taxonomy,
    )


def _check_fit(saved: SavedModel) -> None:
    """Check that a checkpoint's weights and classes are those of its configuration, before the model is built."""
    known, stated = saved.taxonomy.num_classes, saved.config.model.num_classes
    if known != stated:
        raise UserError(
            f"{saved.uri} does not fit its own configuration: it names {known} classes, and the model has {stated}. "
            f"Give an undamaged copy of it."
        )
    try:
        weights.check_fit(saved.uri, saved.weights, saved.config.model)
    except ValueError as error:
        raise UserError(str(error)) from error


def results_folder(location: Location) -> tuple[str, str]:
    """Return parent and name of the folder for results of a foreign checkpoint: beside a file, without its suffix."""
    name = PurePosixPath(location.path)
    folder = name if location.is_dir() else name.with_suffix("") if name.suffix else name.with_suffix(".results")
    return str(location).rpartition("/")[0], folder.name
