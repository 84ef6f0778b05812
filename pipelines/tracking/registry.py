"""Registers an evaluated checkpoint as a version of a registered model in MLflow."""

import dataclasses
import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import safetensors.torch
from mlflow.models import ModelSignature
from mlflow.models.model import ModelInfo
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, Schema

import maskformer
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.tracking.runs import TrackedRun

_REQUIREMENTS = ("torch", "torchvision", "numpy", "scipy", "safetensors", "pillow", "pandas", "jaxtyping")
_SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image")]),
    outputs=Schema([ColSpec("binary", "png"), ColSpec("string", "segments_info")]),
)


def register(saved: SavedModel, run: TrackedRun, name: str, alias: str, metrics: dict[str, float]) -> str:
    """Add a version to the registered model `name`, set `alias` on it, and return the number of the version.

    The version has the code of `maskformer`, the weights and all else that inference needs. It loads with
    `mlflow.pyfunc.load_model("models:/NAME@ALIAS")` on machines without Ray and without this repository.

    Args:
        run: the MLflow run that the version is logged to.
        metrics: the evaluation's metrics, stored with the version.
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
    # MLflow also writes the URI to the environment, where later runs in this process would read it.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(run.uri)
    mlflow.start_run(run_id=run.run_id)
    try:
        model = _log_model(saved, about, name)
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType] -- None unsets it, which the annotation omits
    number = str(model.registered_model_version)
    client = MlflowClient(run.uri)
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
            # The installed versions, without a local part such as +cpu.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _REQUIREMENTS],
        )
