"""From a scored checkpoint to a version of a registered model."""

import dataclasses
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import safetensors.torch
from mlflow.entities import Metric
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema
from mlflow.utils.time import get_current_time_millis

import maskformer
from pipelines.checkpoint import SavedModel

_REQUIREMENTS = ("torch", "torchvision", "numpy", "scipy", "safetensors", "pillow", "pandas", "jaxtyping")
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image")]),
    outputs=Schema([ColSpec("binary", "png"), ColSpec("string", "segments_info")]),
)


def log_evaluation(tracking_uri: str, run_id: str, step: int, metrics: dict[str, float], folder: Path) -> None:
    """Log an evaluation's metrics at the checkpoint's step, and its small files, into the training's run."""
    client = MlflowClient(tracking_uri)
    now = get_current_time_millis()
    client.log_batch(run_id, [Metric(name, value, now, step) for name, value in metrics.items()])
    client.log_artifact(run_id, str(folder / "metrics.json"), "evaluation")


def register(
    saved: SavedModel, tracking_uri: str, run_id: str, name: str, alias: str, metrics: dict[str, float]
) -> str:
    """Make the model a new version of the registered model `name`, point `alias` at it, and return the version.

    The version carries the code of `maskformer`, the weights and all that inference needs; it loads with
    `mlflow.pyfunc.load_model("models:/NAME@ALIAS")` where neither Ray nor this checkout is.
    """
    about = {
        "model": dataclasses.asdict(saved.config.model),
        "panoptic": dataclasses.asdict(saved.config.panoptic),
        "categories": saved.taxonomy.to_coco(),
        "short_side": saved.config.evaluation.short_side,
        "long_side": saved.config.evaluation.long_side,
        "checkpoint": saved.uri,
        "metrics": metrics,
    }
    # MLflow also writes this into the environment, where the next run of this process would find it.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.start_run(run_id=run_id)
    try:
        model = _log_model(saved, about, name)
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType] -- None unsets it, though not annotated
    number = str(model.registered_model_version)
    client = MlflowClient(tracking_uri)
    client.set_registered_model_alias(name, alias, number)
    for key, value in {"checkpoint": saved.uri, "step": saved.step, "pq": metrics.get("pq/all", "")}.items():
        client.set_model_version_tag(name, number, key, str(value))
    return number


def _log_model(saved: SavedModel, about: dict[str, Any], name: str) -> ModelInfo:
    with tempfile.TemporaryDirectory() as scratch:
        files = {"about": Path(scratch) / "about.json", "weights": Path(scratch) / "model.safetensors"}
        files["about"].write_text(json.dumps(about, indent=1))
        safetensors.torch.save_file(saved.weights, files["weights"])
        return mlflow.pyfunc.log_model(
            name="panoptic",
            python_model=str(Path(__file__).with_name("registered_model.py")),
            artifacts={key: str(path) for key, path in files.items()},
            code_paths=[str(Path(maskformer.__file__).parent)],
            signature=_SIGNATURE,
            registered_model_name=name,
            # What is installed here, without a build's local part such as +cpu.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _REQUIREMENTS],
        )
