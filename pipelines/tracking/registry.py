"""Registers an evaluated checkpoint as a version of a registered model in MLflow."""

from collections.abc import Mapping
from dataclasses import dataclass

import mlflow
from mlflow.entities import LoggedModel
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient

from maskformer.untrusted import escaped
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.errors import UserError
from pipelines.tracking import history
from pipelines.tracking.alias import move_forward, require_alias_name
from pipelines.tracking.logged_model import add_files
from pipelines.tracking.server import one_line


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, and where an alias points."""

    version: str
    alias_version: str
    """The version that the alias names now: this one, a newer one, or what promote.py chose meanwhile."""


def require_names(client: MlflowClient, name: str, alias: str) -> None:
    """Check that a model can be registered under `name` and gets `alias`, before it is evaluated.

    Raises:
        UserError: MLflow does not allow the name or the alias, or promote.py decides on the alias.
    """
    require_alias_name(alias)
    try:
        client.get_registered_model(name)
        guarded = bool(history.read(client, name, alias))
    except MlflowException as error:
        if error.error_code == ErrorCode.Name(RESOURCE_DOES_NOT_EXIST):
            return  # it will be created
        raise UserError(
            f"MLflow does not allow to register a model as {escaped(name)!r}: {one_line(error)} Choose another "
            f"--register."
        ) from error
    if guarded:
        raise UserError(
            f"jobs/promote.py decides which version of {name} is the {alias}. Register with another --alias, such as "
            f"candidate, then: python jobs/promote.py --model {name} --version V --alias {alias}."
        )


def register(
    client: MlflowClient,
    model: LoggedModel,
    saved: SavedModel,
    name: str,
    alias: str,
    *,
    description: str,
    tags: Mapping[str, str],
) -> Registered:
    """Make a logged model a version of the registered model `name`, and set `alias` as `move_forward` does.

    A logged model that is a version already stays that version: evaluating a checkpoint once more adds none.

    Args:
        model: of `saved`; its files are stored if they are not yet.
        description: of a new version.
        tags: of the version, beside its checkpoint and step.
    """
    add_files(model, saved)
    number = _version_of(client, name, model.model_id)
    if not number:
        number = str(mlflow.register_model(f"models:/{model.model_id}", name).version)
        client.update_model_version(name, number, description)
    for key, value in {"checkpoint": saved.uri, "step": str(saved.step), **tags}.items():
        client.set_model_version_tag(name, number, key, value)
    return Registered(number, move_forward(client, name, alias, number))


def _version_of(client: MlflowClient, name: str, model_id: str) -> str:
    """Return the version that a logged model is already; empty if it is none."""
    quoted = name.replace("'", "''")
    found = client.search_model_versions(f"name='{quoted}'")
    return next((str(version.version) for version in found if version.source == f"models:/{model_id}"), "")
