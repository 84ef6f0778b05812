"""The training state, and how it is saved, verified and found again.

    <run>/checkpoints/step_00000120/model.safetensors   the weights to use: the averaged ones if there are any
                                    state.pt            step, optimizer and progress, and the trained weights if
                                                        model.safetensors has averaged ones; loads with weights_only
                                    config.json         resolved configuration and taxonomy
                                    manifest.json       step, environment and the sha256 of each file; written last
    <run>/best.json                                     step and quick PQ of the best checkpoint

A folder without a manifest, or with a file that does not match it, is not a complete checkpoint. No random state is
saved, since every random number is a function of the position in the data.
"""

import io
import json
import logging
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

import numpy as np
import PIL
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from maskformer import weights
from maskformer.config import require_integer, require_number
from maskformer.taxonomy import Taxonomy
from maskformer.untrusted import MAX_JSON_BYTES, escaped, parse_json, shown
from maskformer.weights.pickles import RefusedError
from maskformer.weights.pickles import load as load_pickled
from pipelines.config.serialize import to_dict
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.storage import Location, sha256

logger = logging.getLogger(__name__)

_VERSION = 2
_FILES = ("model.safetensors", "state.pt", "config.json")
_FOLDER = re.compile(r"step_(\d{8,})$")

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class TrainingState:
    """All that a run needs to resume as if it had not been interrupted."""

    step: int
    """Optimizer steps completed. The data stream resumes at position step * global batch."""
    model: dict[str, Tensor]
    """The trained weights."""
    optimizer: dict[str, Any]
    averaged: dict[str, Tensor] | None = None
    """The averaged weights (EMA); None without averaging."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Plain JSON values that the training loop continues with, such as the best quick PQ so far."""


@dataclass(frozen=True)
class BestCheckpoint:
    """The content of a run's best.json."""

    step: int
    quick_pq: float


class DamagedCheckpointError(ValueError):
    """A folder that is not a complete checkpoint, or a best.json that names none; the message names the file."""


def step_folder(run: Location, step: int) -> Location:
    """Return the location of a run's checkpoint after `step` steps."""
    return run / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Location) -> int | None:
    """Return the step of a checkpoint's folder; None if the folder's name is not that of a checkpoint."""
    match = _FOLDER.match(folder.name)
    return int(match[1]) if match else None


def steps_saved(run: Location) -> list[int]:
    """Return the steps that have a checkpoint folder, complete or not, ascending."""
    folders = ((run / "checkpoints") / name for name in (run / "checkpoints").names())
    return sorted(step for folder in folders if (step := step_of(folder)) is not None)


def environment(config: TrainConfig) -> dict[str, Any]:
    """Return the conditions that must stay the same for a resumed run to be bit-identical.

    Args:
        config: the configuration of a run with a fixed number of workers.
    """
    workers, exact = config.batch_split.workers, config.scaling.exact
    return {
        "workers": "any power of two" if exact and workers & (workers - 1) == 0 else workers,
        "reduction": "exact" if exact else "fast",
        "threads": config.scaling.threads,
        "device": config.scaling.device,
        "precision": config.network_precision(config.scaling.device),
        "compile": config.scaling.compile,
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "python": platform.python_version(),
        "cpu": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def save(folder: Location, state: TrainingState, config: TrainConfig, taxonomy: Taxonomy) -> None:
    """Write a checkpoint folder.

    The manifest of an existing folder is deleted first, so a mix of old and new files is never a complete checkpoint.

    Raises:
        UserError: the folder cannot be written.
        StorageUnavailableError: the storage did not answer.
    """
    (folder / "manifest.json").delete()
    rest = {"step": state.step, "optimizer": state.optimizer, "progress": state.progress}
    if state.averaged is not None:
        rest["model"] = state.model
    best = state.model if state.averaged is None else state.averaged
    about = {"config": to_dict(config), "categories": taxonomy.to_coco()}
    contents: dict[str, Callable[[BinaryIO], object]] = {
        "model.safetensors": lambda file: file.write(safetensors.torch.save(best)),
        "state.pt": lambda file: torch.save(rest, file),
        "config.json": lambda file: file.write(json.dumps(about, indent=1).encode()),
    }
    files = {}
    for name, fill in contents.items():
        digest, size = (folder / name).write_with(fill)
        files[name] = {"sha256": digest, "bytes": size}
    manifest = {"version": _VERSION, "step": state.step, "environment": environment(config), "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def read_manifest(folder: Location) -> dict[str, Any]:
    """Read the manifest of a checkpoint: `step`, `environment` and the hashes of its `files`. No other file is read.

    Raises:
        DamagedCheckpointError: the manifest is missing or cannot be read.
        UserError: another version wrote it, or the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    try:
        manifest = parsed((folder / "manifest.json").read_bytes())
        version = manifest["version"]
        if version == _VERSION:
            files = manifest["files"]
            if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
                raise ValueError("its files are not described")
            return manifest
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
    except UserError:
        raise  # a storage that cannot be read does not mean that the checkpoint is damaged, nor does an OSError
    except (ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {escaped(error, 300)}"
        raise DamagedCheckpointError(f"{folder} cannot be read: {what}") from error
    raise UserError(
        f"The checkpoint {folder} has version {shown(version, 50)}, and this program reads {_VERSION}. Use the "
        f"version of maskformer-ray that wrote it, or start a new run with --weights {folder}/model.safetensors."
    )


def parsed(content: bytes) -> dict[str, Any]:
    """Return the object in a JSON file of a checkpoint.

    Raises:
        ValueError: it holds something else, or is too large.
    """
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
    found = parse_json(content)
    if not isinstance(found, dict):
        raise ValueError(f"an object is needed, got {type(found).__name__}")
    return found


def check_files(folder: Location) -> dict[str, Any]:
    """Check that all files of a checkpoint are there in their sizes, without reading them; return its manifest.

    Raises:
        DamagedCheckpointError: a file is missing or has another size, or the manifest cannot be read.
        UserError: another version wrote the checkpoint, or the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    manifest = read_manifest(folder)
    # The names are our own: those of the manifest might lead out of the folder.
    files = {name: manifest["files"].get(name, {}) for name in _FILES}
    wrong = [name for name, file in files.items() if (folder / name).size() != file.get("bytes")]
    if wrong:
        raise DamagedCheckpointError(f"{folder} is damaged: {', '.join(wrong)} is missing or has another size.")
    return manifest


def read_verified(folder: Location, names: list[str]) -> dict[str, bytes]:
    """Read files of a checkpoint and verify them against its manifest.

    Raises:
        DamagedCheckpointError: a file is missing or does not match the manifest.
        UserError: another version wrote the checkpoint, or the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    manifest = read_manifest(folder)
    try:
        data = {name: (folder / name).read_bytes() for name in names}
        wrong = [name for name in names if sha256(data[name]) != manifest["files"].get(name, {}).get("sha256")]
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder} is not a complete checkpoint: {error}") from error
    if wrong:
        raise DamagedCheckpointError(
            f"{folder} is damaged: {', '.join(wrong)} does not have the hash in manifest.json."
        )
    return data


def load(folder: Location) -> TrainingState:
    """Read and verify a checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing, does not match the manifest, or cannot be decoded.
        UserError: another version wrote the checkpoint, or the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    data = read_verified(folder, ["model.safetensors", "state.pt"])
    saved = read_weights(folder, data["model.safetensors"])
    try:
        rest = load_pickled(io.BytesIO(data["state.pt"]))
    except RefusedError as error:
        raise DamagedCheckpointError(
            f"{folder} was not opened: its state.pt has more than tensors and plain values ({error}), so loading it "
            f"could run code."
        ) from error
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder} cannot be read by this version: its state.pt: {error}.") from error
    match rest:
        case {"step": int(step), "optimizer": dict(optimizer)} if step == (step_of(folder) or step) >= 0:
            model, progress = rest.get("model", saved), rest.get("progress", {})
            if isinstance(progress, dict) and isinstance(model, dict) and _are_weights(model):
                return TrainingState(step, model, optimizer, saved if "model" in rest else None, progress)
    raise DamagedCheckpointError(f"{folder} cannot be read by this version: its state.pt is not a training state.")


def _are_weights(values: dict[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items())


def read_weights(folder: Location, content: bytes) -> dict[str, Tensor]:
    """Return the tensors in the content of a checkpoint's model.safetensors.

    Raises:
        DamagedCheckpointError: they cannot be read.
    """
    file = io.BytesIO(content)
    file.name = f"{folder}/model.safetensors"
    try:
        return weights.read(file).tensors
    except ValueError as error:
        raise DamagedCheckpointError(str(error)) from error


def newest(run: Location, read: Callable[[Location], Loaded]) -> Loaded | None:
    """Read a run's newest complete checkpoint; damaged ones are logged and skipped.

    Args:
        read: reads one checkpoint folder, such as `load`.

    Returns:
        The result of `read`, or None if no checkpoint was ever completed.

    Raises:
        UserError: all are damaged, since only the user can decide to train from the beginning; another version wrote
            the newest one; or the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    problems: list[str] = []
    for step in reversed(steps_saved(run)):
        folder = step_folder(run, step)
        if not (folder / "manifest.json").exists():
            continue  # the run was interrupted while writing it
        try:
            return read(folder)
        except DamagedCheckpointError as error:
            logger.warning("Skipping a checkpoint. %s", error)
            problems.append(str(error))
    if problems:
        raise UserError(
            f"No checkpoint of {run} can be used: {' '.join(problems)} Restore one of them from a copy, or start a new "
            f"run with another --run.name."
        )
    return None


def read_best(run: Location) -> BestCheckpoint | None:
    """Read which of a run's checkpoints has the best quick PQ; None if no checkpoint was marked as the best.

    Raises:
        DamagedCheckpointError: best.json is not what `write_best` writes.
        UserError: the storage cannot be read.
        StorageUnavailableError: the storage did not answer.
    """
    file = run / "best.json"
    try:
        values = parsed(file.read_bytes())
        step, quick_pq = require_integer("its step", values["step"]), require_number("quick_pq", values["quick_pq"])
        if not 0 <= step < 10**15:
            raise ValueError("its step is negative or too large")
        return BestCheckpoint(step, float(quick_pq))
    except FileNotFoundError:
        return None
    except UserError:
        raise
    except (ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {escaped(error, 300)}"
        raise DamagedCheckpointError(f"{file} cannot be read: {what}.") from error


def write_best(run: Location, best: BestCheckpoint) -> None:
    """Write best.json; the checkpoint must be complete.

    Raises:
        UserError: it cannot be written.
        StorageUnavailableError: the storage did not answer.
    """
    (run / "best.json").write_text(json.dumps({"step": best.step, "quick_pq": best.quick_pq}))
