"""The model of a checkpoint in MLflow: one LoggedModel for its weights, thresholds, image size and categories.

Evaluations log their metrics for it, so that its page in MLflow has all of them by data set. Its files stay in the
checkpoint until it is registered.
"""

import dataclasses
import hashlib
import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import safetensors.torch
from mlflow.entities import LoggedModel
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.mlflow_tags import MLFLOW_MODEL_IS_EXTERNAL

import maskformer
from pipelines.checkpoints.fingerprint import weights_hash
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.overrides import flatten
from pipelines.config.serialize import to_dict
from pipelines.credentials import without_secrets
from pipelines.tracking.example import example_image
from pipelines.tracking.server import require_artifacts

_FINGERPRINT = "maskformer.fingerprint"
_NAME, _TYPE = "panoptic", "maskformer"
_REQUIREMENTS = ("torch", "torchvision", "numpy", "scipy", "safetensors", "pillow", "pandas", "jaxtyping")


def logged_model(
    client: MlflowClient, saved: SavedModel, experiment_id: str, source_run: str, anew: bool = False
) -> LoggedModel:
    """Return the LoggedModel of a checkpoint; create it if the experiment has none.

    Args:
        saved: with the thresholds that it is evaluated with.
        source_run: id of the run that a new one belongs to: that of the training, or else of the evaluation.
        anew: create it in any case. One that a stranger's database has would be registered with the stranger's code.
    """
    fingerprint = _fingerprint(saved)
    if not anew and (found := _find(client, experiment_id, fingerprint)):
        return found
    params = flatten(without_secrets(to_dict(saved.config)))
    params.pop("tracking.uri")
    created = mlflow.create_external_model(
        name=_NAME,
        source_run_id=source_run,
        tags={_FINGERPRINT: fingerprint, "checkpoint": saved.uri, "step": str(saved.step)},
        params={key: str(value) for key, value in params.items()},
        model_type=_TYPE,
        experiment_id=experiment_id,
    )
    # Of two evaluations that begin at the same time, both use the older one.
    found = created if anew else _find(client, experiment_id, fingerprint) or created
    if found.model_id != created.model_id:
        client.delete_logged_model(created.model_id)
    return found


def add_files(model: LoggedModel, saved: SavedModel) -> None:
    """Store the code of `maskformer`, the weights and all else that inference needs with a LoggedModel, once.

    It then loads with `mlflow.pyfunc.load_model` on machines without Ray and without this repository.
    """
    if model.tags.get(MLFLOW_MODEL_IS_EXTERNAL) != "true":
        return
    with tempfile.TemporaryDirectory() as scratch:
        require_artifacts(mlflow.get_tracking_uri(), model.artifact_location or "")
        files = {"about": Path(scratch) / "about.json", "weights": Path(scratch) / "model.safetensors"}
        files["about"].write_text(json.dumps({**_about(saved), "checkpoint": saved.uri}, indent=1))
        safetensors.torch.save_file(saved.weights, files["weights"])
        mlflow.pyfunc.log_model(
            name=_NAME,
            model_id=model.model_id,
            python_model=str(Path(__file__).with_name("registered_model.py")),
            artifacts={key: str(path) for key, path in files.items()},
            code_paths=[str(Path(maskformer.__file__).parent)],
            model_config={"device": "auto"},
            signature=_signature(saved),
            input_example=pd.DataFrame({"image": [example_image()]}),
            # The installed versions, without a local part such as +cpu.
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _REQUIREMENTS],
        )


def _find(client: MlflowClient, experiment_id: str, fingerprint: str) -> LoggedModel | None:
    found = client.search_logged_models([experiment_id], f"tags.`{_FINGERPRINT}` = '{fingerprint}'")
    return min(found, key=lambda model: (model.creation_timestamp, model.model_id), default=None)


def _about(saved: SavedModel) -> dict[str, Any]:
    return {
        "model": dataclasses.asdict(saved.config.model),
        "panoptic": dataclasses.asdict(saved.config.panoptic),
        "categories": saved.taxonomy.to_coco(),
        "short_side": saved.config.evaluation.short_side,
        "long_side": saved.config.evaluation.long_side,
    }


def _fingerprint(saved: SavedModel) -> str:
    """Return a hash of all that the model's answers depend on."""
    about = json.dumps(_about(saved), sort_keys=True)
    return hashlib.sha256(f"{about} {weights_hash(saved.weights)}".encode()).hexdigest()


def _signature(saved: SavedModel) -> ModelSignature:
    thresholds = dataclasses.asdict(saved.config.panoptic)
    return ModelSignature(
        inputs=Schema([ColSpec("binary", "image")]),
        outputs=Schema([ColSpec("binary", "png"), ColSpec("string", "segments_info")]),
        params=ParamSchema([ParamSpec(name, "double", float(value)) for name, value in thresholds.items()]),
    )
