"""The model of a checkpoint without the optimizer, for evaluation and the registry."""

from dataclasses import dataclass

from torch import Tensor

from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import escaped
from pipelines.checkpoints.state import (
    DamagedCheckpointError,
    check_files,
    newest,
    parsed,
    read_best,
    read_verified,
    read_weights,
    step_folder,
    step_of,
)
from pipelines.config.serialize import from_dict
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.storage import Location, locate

_BEST = "@best"


@dataclass(frozen=True)
class SavedModel:
    """The part of a checkpoint that inference needs."""

    uri: str
    step: int
    weights: dict[str, Tensor]
    config: TrainConfig
    taxonomy: Taxonomy
    folder: str = ""
    """Folder for results: that of its run, or one beside the file. Empty for a model in memory."""


def find(uri: str) -> Location:
    """Return the location that `uri` names: a path or URI, or `RUN@best` for the best checkpoint of a run's folder.

    Raises:
        UserError: the run has no best checkpoint, or it is not complete.
    """
    location = locate(uri)
    if not uri.endswith(_BEST) or location.exists():
        return location
    run = locate(uri.removesuffix(_BEST))
    remedy = f"Use {run} for its newest checkpoint, or one of its checkpoints/step_* folders."
    try:
        best = read_best(run)
        if best is not None:
            check_files(step_folder(run, best.step))
            return step_folder(run, best.step)
    except DamagedCheckpointError as error:
        raise UserError(f"The best checkpoint of {run} cannot be used. {error} {remedy}") from error
    if not run.exists():
        raise UserError(f"There is nothing at {run}. Give a run's folder (<storage>/<run name>) before {_BEST}.")
    raise UserError(
        f"{run} has no best checkpoint: it has no best.json. A run keeps one if it has validation data (--data.val), a "
        f"quick PQ (--evaluation.every) and --checkpoint.keep-best. {remedy}"
    )


def is_native(location: Location) -> bool:
    """Return whether this is the folder of a run or of one of its checkpoints."""
    return step_of(location) is not None or (location / "checkpoints").exists()


def load_model(location: Location) -> SavedModel:
    """Read the model in a checkpoint's folder, or in the newest complete checkpoint of a run's folder.

    Raises:
        UserError: there is no complete checkpoint, it is damaged, or another version wrote it.
    """
    try:
        saved = newest(location, _read) if step_of(location) is None else _read(location)
    except DamagedCheckpointError as error:
        raise UserError(f"{error} Use another of the run's checkpoints/step_* folders.") from error
    if saved is None:
        raise UserError(
            f"{location} has no complete checkpoint in checkpoints/step_*. Name a run's folder "
            f"(<storage>/<run name>) or one of its checkpoints/step_* folders."
        )
    return saved


def _read(folder: Location) -> SavedModel:
    data = read_verified(folder, ["model.safetensors", "config.json"])
    try:
        saved = parsed(data["config.json"])
        config = from_dict(TrainConfig, saved["config"])
        taxonomy = Taxonomy.from_coco(saved["categories"])
    except (ValueError, KeyError, AttributeError) as error:
        what = (
            escaped(error, 500) if isinstance(error, ValueError) else f"{type(error).__name__}: {escaped(error, 100)}"
        )
        kind = UserError if isinstance(error, UserError) else DamagedCheckpointError
        raise kind(f"{folder}/config.json is not one of this version: {what.rstrip('.')}.") from error
    return SavedModel(
        uri=str(folder),
        step=step_of(folder) or 0,
        weights=read_weights(folder, data["model.safetensors"]),
        config=config,
        taxonomy=taxonomy,
        folder=str(folder).rpartition("/checkpoints/")[0] or str(folder),
    )
