"""load(): a model of any origin, ready to segment images, in one line.

A run's folder (`pipelines.checkpoints.state` writes it) is read here without Ray and without pyarrow:

    <run>/checkpoints/step_00000120/model.safetensors   weights
                                    config.json         `config`, the settings of the training, and `categories`
                                    manifest.json       the sha256 of each file; written last
    <run>/best.json                                     `step` of the best checkpoint

The files of a registered model (`pipelines.tracking.registry`) are about.json and model.safetensors in `artifacts`.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeGuard, cast

import torch

from maskformer import weights
from maskformer.config import MAX_SIDE, ModelConfig, PanopticConfig, require_integer
from maskformer.inference import Segmenter
from maskformer.model import build_model
from maskformer.taxonomy import COCO, Taxonomy
from maskformer.untrusted import escaped, open_regular, read_json, shown

logger = logging.getLogger(__name__)

_BEST = "@best"
_STEP = re.compile(r"step_(\d{8,})")
_FILES = ("model.safetensors", "config.json")
_VERSION = 2
"""Of the manifest."""


class _DamagedError(ValueError):
    """A folder of a checkpoint that is not complete."""


def load(source: str | Path, device: str | torch.device = "auto", *, taxonomy: Taxonomy | None = None) -> Segmenter:
    """Load a model of any origin, with its classes, thresholds and image size.

    Args:
        source: a local path: a run's folder, for its newest complete checkpoint; the same with `@best` at the end, for
            its best one; one of its checkpoints/step_* folders; a file or folder of mmdetection, detectron2 or Hugging
            Face; or the folder of a registered model, as MLflow downloads it.
        device: `auto` is a GPU if there is one, else the CPU.
        taxonomy: the classes, for files of other programs that do not have COCO's 133. A class head with other classes
            is fitted by their names.

    Raises:
        ValueError: there is nothing at `source`, it is damaged or not a complete model, or its classes are not known.
    """
    return segmenter(read(source), device, taxonomy=taxonomy)


def read(source: str | Path) -> weights.Weights:
    """Read the weights that `load` loads, and what is known of them: `config` and `categories`.

    Raises:
        ValueError: as `load`.
    """
    text = str(source)
    if "://" in text or text.startswith("models:"):
        raise ValueError(
            f"Models are loaded from local paths, got {text}. Download it; jobs/predict.py --checkpoint takes URIs."
        )
    path = Path(source)
    if text.endswith(_BEST) and not path.exists():
        return _read_best(Path(text.removesuffix(_BEST)))
    if not path.exists():
        raise ValueError(
            f"There is nothing at {path}. Give a run's folder, one of its checkpoints/step_* folders, or a checkpoint "
            f"of mmdetection, detectron2 or Hugging Face."
        )
    if _STEP.fullmatch(path.resolve().name):
        return _read_step(path)
    if (path / "checkpoints").is_dir():
        return _read_newest(path)
    for folder in (path / "artifacts", path):
        if (folder / "about.json").is_file():
            return _read_registered(folder)
    return weights.read(path)


def segmenter(
    source: weights.Weights, device: str | torch.device = "auto", *, taxonomy: Taxonomy | None = None
) -> Segmenter:
    """Build the network for the result of `read`, load its weights, and add its classes, thresholds and image size.

    Raises:
        ValueError: it is not a complete model, or its classes are not known.
    """
    config = weights.detect_config(source)
    known = taxonomy or _taxonomy(source, config)
    config = replace(config, num_classes=known.num_classes)
    state, report = weights.load(source, config, known)
    report.require_complete()
    if report.classes_new:
        raise ValueError(
            f"{source.source} does not know {len(report.classes_new)} of the {known.num_classes} classes of the "
            f"taxonomy, first {report.classes_new[0]!r}. Give the classes that it was trained on."
        )
    trained = _mapping(source.about.get("config"))
    try:
        panoptic = PanopticConfig(**_mapping(trained.get("panoptic")))
        size = {
            name: _side(name, value)
            for name, value in _mapping(trained.get("evaluation")).items()
            if name in ("short_side", "long_side")
        }
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{source.source} has thresholds or an image size that this version does not know "
            f"({escaped(error, 300)}). Use the version that wrote it."
        ) from error
    model = build_model(config)
    model.load_state_dict(state)
    return Segmenter(model.to(pick_device(device)), known, panoptic, **size)


def pick_device(device: str | torch.device) -> torch.device:
    """Return the device of a name; `auto` is a GPU if there is one, else the CPU."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _side(name: str, value: object) -> int:
    side = require_integer(name, value)
    if not 0 < side <= MAX_SIDE:
        raise ValueError(f"{name} must lie in 1..{MAX_SIDE} pixels, got {escaped(side, 100)}")
    return side


def _taxonomy(source: weights.Weights, config: ModelConfig) -> Taxonomy:
    stated = weights.stated_taxonomy(source)
    if stated is None and weights.class_names(source) is None and config.num_classes == COCO.num_classes:
        return COCO
    if stated is None or stated.num_classes != config.num_classes:
        raise ValueError(
            f"{source.source} has {config.num_classes} classes, and which of them are things is not known. Give them: "
            f"taxonomy=Taxonomy.from_coco(categories), with the `categories` of the annotations that it was trained on."
        )
    return stated


def _read_newest(run: Path) -> weights.Weights:
    steps = {int(match[1]): path for path in (run / "checkpoints").iterdir() if (match := _STEP.fullmatch(path.name))}
    problems: list[str] = []
    for _, folder in sorted(steps.items(), reverse=True):
        if not (folder / "manifest.json").exists():
            continue  # the run was interrupted while writing it
        try:
            return _read_step(folder)
        except _DamagedError as error:
            logger.warning("Skipping a checkpoint. %s", error)
            problems.append(str(error))
    if problems:
        raise ValueError(f"No checkpoint of {run} can be used: {' '.join(problems)}")
    raise ValueError(
        f"{run} has no complete checkpoint in checkpoints/step_*. Wait until the run has saved one, or name another."
    )


def _read_best(run: Path) -> weights.Weights:
    try:
        step = require_integer("its step", _object(read_json(run / "best.json"))["step"])
        if not 0 <= step < 10**15:
            raise ValueError("its step is negative or too large")
    except FileNotFoundError:
        what = "has no best checkpoint: it has no best.json" if run.exists() else "does not exist"
        raise ValueError(f"{run} {what}. Use the folder of a run, without {_BEST} for its newest checkpoint.") from None
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{run / 'best.json'} cannot be read ({escaped(error, 300)}). Use {run} for its newest checkpoint."
        ) from error
    return _read_step(run / "checkpoints" / f"step_{step:08d}")


def _read_step(folder: Path) -> weights.Weights:
    wrong: list[str] = []
    about: Mapping[str, Any] = {}
    try:
        manifest = _object(read_json(folder / "manifest.json"))
        version = manifest["version"]
        if version == _VERSION:
            files = _object(manifest["files"])
            wrong = [name for name in _FILES if _sha256(folder / name) != _object(files[name])["sha256"]]
            about = _object(read_json(folder / "config.json"))
    except (OSError, ValueError, KeyError) as error:
        what = f"{type(error).__name__}: {escaped(error, 300)}"
        raise _DamagedError(f"{folder} is not a complete checkpoint ({what}). Use another one of its run.") from error
    if version != _VERSION:
        raise ValueError(
            f"The checkpoint {folder} has version {shown(version, 50)}, and this program reads {_VERSION}. Use "
            f"the version of maskformer-ray that wrote it, or give its model.safetensors."
        )
    if wrong:
        raise _DamagedError(
            f"{folder} is damaged: {', '.join(wrong)} does not have the hash in manifest.json. Use another "
            f"one of its run."
        )
    return weights.Weights(str(folder), weights.read(folder / "model.safetensors").tensors, about)


def _read_registered(folder: Path) -> weights.Weights:
    try:
        about = _object(read_json(folder / "about.json"))
        size = {"short_side": about["short_side"], "long_side": about["long_side"]}
        config = {"model": about["model"], "panoptic": about["panoptic"], "evaluation": size}
        content = {"config": config, "categories": about["categories"]}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} does not hold a registered model ({type(error).__name__}: {escaped(error, 300)}). Download it "
            f"again."
        ) from error
    return weights.Weights(str(folder), weights.read(folder / "model.safetensors").tensors, content)


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(cast("BufferedReader", file), "sha256").hexdigest()


def _object(value: object) -> Mapping[str, Any]:
    if not _is_mapping(value):
        raise ValueError(f"an object is needed, got {type(value).__name__}")
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    return value if _is_mapping(value) else {}


def _is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    return isinstance(value, Mapping)
