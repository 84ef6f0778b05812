"""What a training state is; how it is saved, verified and found again.

    <run>/checkpoints/step_00000120/model.safetensors   the weights
                                    state.pt            step, optimizer, surroundings; loads with weights_only
                                    config.json         resolved configuration and taxonomy
                                    manifest.json       sha256 of each, written last

A folder without a manifest, or with a file that does not match it, is not a checkpoint. Nothing of the random
state is saved, since all randomness is a function of the position in the data.
"""

import io
import json
import logging
import pickle
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from maskformer.taxonomy import Taxonomy
from pipelines.config import TrainConfig, from_dict, to_dict
from pipelines.errors import UserError
from pipelines.storage import Location, sha256

logger = logging.getLogger(__name__)

_VERSION = 1
_FOLDER = re.compile(r"step_(\d{8,})$")


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to go on as if it had never stopped."""

    step: int
    """Optimizer steps done. The data stream goes on at position step * global batch."""
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    surroundings: dict[str, Any]
    """What bit-identity depends on: workers, threads, torch build, kind of CPU."""


class DamagedCheckpoint(ValueError):
    """A folder that is not a whole checkpoint; the message names the file."""


def folder(run: Location, step: int) -> Location:
    """Return the place of a run's checkpoint after `step` steps."""
    return run / "checkpoints" / f"step_{step:08d}"


def steps_saved(run: Location) -> list[int]:
    """Return the steps of which a checkpoint folder exists, whole or not, ascending."""
    return sorted(int(match[1]) for name in (run / "checkpoints").names() if (match := _FOLDER.match(name)))


def snapshot(value: Any) -> Any:
    """Copy a nest of tensors to the CPU, so that training may go on while it is written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value


def save(place: Location, state: TrainingState, config: TrainConfig, taxonomy: Taxonomy) -> None:
    """Write a checkpoint folder. A folder that was there loses its manifest first, so it is never half of each."""
    (place / "manifest.json").delete()
    buffer = io.BytesIO()
    torch.save({"step": state.step, "optimizer": state.optimizer, "surroundings": state.surroundings}, buffer)
    files = {
        "model.safetensors": safetensors.torch.save(state.model),
        "state.pt": buffer.getvalue(),
        "config.json": json.dumps({"config": to_dict(config), "categories": taxonomy.to_coco()}, indent=1).encode(),
    }
    for name, data in files.items():
        (place / name).write_bytes(data)
    hashes = {name: {"sha256": sha256(data), "bytes": len(data)} for name, data in files.items()}
    (place / "manifest.json").write_text(
        json.dumps({"version": _VERSION, "step": state.step, "files": hashes}, indent=1)
    )


class BackgroundWriter:
    """Saves checkpoints in a thread, one at a time, and forgets the oldest."""

    def __init__(self, run: Location, keep: int) -> None:
        self._run, self._keep = run, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, state: TrainingState, config: TrainConfig, taxonomy: Taxonomy) -> None:
        """Begin to save `state`, once the one before is in place; raises what went wrong with that one."""
        self.wait()
        self._pending = self._pool.submit(self._write, state, config, taxonomy)

    def wait(self) -> None:
        """Return when everything submitted is in place; raises what went wrong."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, state: TrainingState, config: TrainConfig, taxonomy: Taxonomy) -> None:
        save(folder(self._run, state.step), state, config, taxonomy)
        for step in [step for step in steps_saved(self._run) if step <= state.step][: -self._keep]:
            # The manifest goes first: what a kill leaves of the folder then counts for nothing.
            (folder(self._run, step) / "manifest.json").delete()
            folder(self._run, step).delete()


def _verified(place: Location, names: list[str]) -> dict[str, bytes]:
    try:
        manifest = json.loads((place / "manifest.json").read_text())
        if manifest["version"] != _VERSION:
            raise DamagedCheckpoint(f"{place} has version {manifest['version']}, this program reads {_VERSION}.")
        data = {name: (place / name).read_bytes() for name in names}
        wrong = [name for name in names if sha256(data[name]) != manifest["files"][name]["sha256"]]
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{place} is not a whole checkpoint: {error}") from error
    except (UserError, DamagedCheckpoint):
        raise  # storage that cannot be reached says nothing about the checkpoint
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{place} cannot be read: {type(error).__name__}: {error}") from error
    if wrong:
        raise DamagedCheckpoint(f"{place} is damaged: {', '.join(wrong)} does not have the hash in manifest.json.")
    return data


def load(place: Location) -> TrainingState:
    """Read a checkpoint and verify it.

    Raises:
        DamagedCheckpoint: a file is missing or is not the one that was written.
        UserError: the storage cannot be read.
    """
    data = _verified(place, ["model.safetensors", "state.pt"])
    try:
        rest = torch.load(io.BytesIO(data["state.pt"]), map_location="cpu", weights_only=True)
        model = safetensors.torch.load(data["model.safetensors"])
        return TrainingState(rest["step"], model, rest["optimizer"], rest["surroundings"])
    except pickle.UnpicklingError as error:  # torch's own text advises to switch the protection off
        raise DamagedCheckpoint(
            f"{place} is not opened: its state.pt holds more than tensors and plain values, which could run code."
        ) from error
    except Exception as error:  # both libraries have many names for what they cannot read
        raise DamagedCheckpoint(f"{place} cannot be read by this version: {type(error).__name__}: {error}") from error


def newest(run: Location) -> TrainingState | None:
    """Return the newest state of a run that verifies, None if none was ever finished.

    Damaged checkpoints are named and passed over for older ones.

    Raises:
        UserError: all are damaged. Starting anew would throw the run away, so that is left to its owner. Or the
            storage cannot be read.
    """
    problems: list[str] = []
    for step in reversed(steps_saved(run)):
        if not (folder(run, step) / "manifest.json").exists():
            continue  # it was being written when the run was cut off
        try:
            return load(folder(run, step))
        except DamagedCheckpoint as error:
            logger.warning("Passing over a checkpoint. %s", error)
            problems.append(str(error))
    if problems:
        raise UserError(
            f"No checkpoint of {run} can be used: {' '.join(problems)} Put a whole one back, or delete the folder "
            f"{run}/checkpoints to start from the beginning."
        )
    return None


@dataclass(frozen=True)
class SavedModel:
    """What inference needs of a checkpoint."""

    uri: str
    step: int
    weights: dict[str, Tensor]
    config: TrainConfig
    taxonomy: Taxonomy
    folder: str = ""
    """What is made of the model goes here: the folder of its run, or one beside a file; none for a model in memory."""


def is_ours(place: Location) -> bool:
    """Tell whether this is the folder of a run or of one of its checkpoints."""
    return bool(_FOLDER.match(place.name)) or (place / "checkpoints").exists()


def load_model(place_of: Location) -> SavedModel:
    """Read the model of a checkpoint folder, or of the newest whole checkpoint of a run's folder.

    Raises:
        UserError: there is none.
    """
    places = (
        [place_of] if _FOLDER.match(place_of.name) else [folder(place_of, s) for s in reversed(steps_saved(place_of))]
    )
    problems = []
    for place in places:
        try:
            data = _verified(place, ["model.safetensors", "config.json"])
        except DamagedCheckpoint as error:
            logger.warning("Passing over a checkpoint. %s", error)
            problems.append(str(error))
            continue
        saved = json.loads(data["config.json"])
        return SavedModel(
            uri=str(place),
            step=int(_FOLDER.match(place.name)[1]),  # pyright: ignore[reportOptionalSubscript] -- chosen by this pattern
            weights=safetensors.torch.load(data["model.safetensors"]),
            config=from_dict(TrainConfig, saved["config"]),
            taxonomy=Taxonomy.from_coco(saved["categories"]),
            folder=str(place).rpartition("/checkpoints/")[0] or str(place),
        )
    raise UserError(
        f"No checkpoint can be read from {place_of}: {' '.join(problems) or 'it has no checkpoints/step_* folder.'} "
        f"Name a run's folder (<storage>/<run name>) or one of its checkpoints/step_* folders."
    )
