"""Opening the model of a command line: of a run, of another program, or of MLflow's registry."""

import hashlib
import tempfile

from maskformer import Segmenter, checkpoint, weights
from pipelines.checkpoints import pretrained
from pipelines.checkpoints.fingerprint import weights_hash
from pipelines.config.fields import facts
from pipelines.config.publish import ThresholdConfig
from pipelines.config.resolve import or_environment
from pipelines.errors import UserError

_REGISTRY = "models:/"


def open_segmenter(uri: str, thresholds: ThresholdConfig, tracking_uri: str = "") -> tuple[Segmenter, str]:
    """Open the model at a path or URI on the CPU; return it and where its weights come from.

    Args:
        uri: as for `pipelines.checkpoints.pretrained.read`, or models:/NAME@ALIAS or models:/NAME/VERSION.
        thresholds: replace the model's own where they are given.
        tracking_uri: of MLflow's registry. Default: $MLFLOW_TRACKING_URI.

    Raises:
        UserError: it does not exist, or is no complete model.
        StorageUnavailableError: the storage did not answer.
    """
    source = _registered(uri, tracking_uri) if uri.startswith(_REGISTRY) else pretrained.read(uri)
    try:
        segmenter = checkpoint.segmenter(source, "cpu")
    except ValueError as error:
        raise UserError(str(error)) from error
    segmenter.config = thresholds.over(segmenter.config)
    return segmenter, source.source


def fingerprint(segmenter: Segmenter) -> str:
    """Return a hash of a model's weights and classes."""
    return hashlib.sha256(f"{segmenter.taxonomy!r} {weights_hash(segmenter.model.state_dict())}".encode()).hexdigest()


def _registered(uri: str, tracking_uri: str) -> weights.Weights:
    store = or_environment("tracking.uri", tracking_uri)
    if not store:
        raise UserError(
            f"{uri} is in an MLflow registry. Set it by --tracking.uri or ${facts('tracking.uri').variable}."
        )
    from mlflow.artifacts import download_artifacts  # takes seconds, and few need it
    from mlflow.exceptions import MlflowException

    from pipelines.tracking.server import connect, current, one_line, require_artifacts

    connect(store)  # the client itself would try for minutes
    # MLflow looks aliases up in the registry of the process, whatever it is told.
    with tempfile.TemporaryDirectory() as scratch, current(store):
        try:
            require_artifacts(store, _place(uri))
            folder = download_artifacts(uri, dst_path=scratch)
            found = checkpoint.read(folder)
        except UserError:
            raise
        except (MlflowException, ValueError, OSError) as error:
            raise UserError(
                f"{uri} cannot be loaded from {store}: {one_line(error).rstrip('.')}. Check name, alias and registry."
            ) from error
    return weights.Weights(uri, found.tensors, found.about)


def _place(uri: str) -> str:
    """Return where the files of a registered model are, without contacting that place."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository = get_artifact_repository(uri)
    while (inner := getattr(repository, "repo", None)) is not None:  # a version may name a logged model
        repository = inner
    return repository.artifact_uri
