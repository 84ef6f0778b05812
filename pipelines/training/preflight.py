"""Everything that is checked before a run starts, so that what cannot work is refused in seconds.

`prepare_run` returns a PreparedRun for `fit`, sweeps and rehearsals. It starts and writes nothing.
"""

import logging
import os
import platform
import shutil
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import torch

from maskformer import build_model
from maskformer.untrusted import MAX_JSON_BYTES, parse_json
from pipelines.checkpoints import pretrained
from pipelines.checkpoints.state import steps_saved
from pipelines.cluster import checks
from pipelines.cluster.capacity import Demand, require_fit
from pipelines.cluster.session import is_remote
from pipelines.config.overrides import differing_settings
from pipelines.config.resolve import SQLITE, resolve
from pipelines.config.serialize import VERSION, to_dict
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import MANIFEST_FILE, PackedSet, open_pack
from pipelines.data.order import total_steps
from pipelines.errors import UserError
from pipelines.storage import Location, locate
from pipelines.tracking.server import require_reachable
from pipelines.training.lock import LOCK_FILE

logger = logging.getLogger(__name__)


class Packs(NamedTuple):
    """The opened packs of a run, with all their images."""

    train: PackedSet
    val: PackedSet | None


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start: its resolved configuration, its opened data and its length. Can be sent to any process."""

    config: TrainConfig
    total_steps: int
    packs: Packs = field(repr=False)
    train: PackedSet = field(repr=False)
    """The images to train on."""

    @property
    def folder(self) -> Location:
        """The run's folder, <storage>/<run name>."""
        return locate(self.config.run.storage) / self.config.run.name

    @property
    def record(self) -> dict[str, Any]:
        """What identifies the run: the content of its config.json, but for the id of its MLflow run."""
        return {
            "version": VERSION,
            "config": to_dict(self.config),
            "data_hash": self.train.data_hash,
            "total_steps": self.total_steps,
        }


def prepare_run(config: TrainConfig, opened: PreparedRun | None = None) -> PreparedRun:
    """Resolve a configuration and check that a run of it is possible.

    Args:
        opened: a run on the same packs, which are then not opened again.

    Raises:
        UserError: the configuration, the data or the environment make it impossible.
    """
    config = resolve(config)
    _require_device(config)
    if config.scaling.compile and not _elsewhere():
        require_compiler()
    data, before = config.data, opened.config.data if opened else None
    if opened and before and (before.train, before.val) == (data.train, data.val):
        packs = opened.packs
    else:
        packs = Packs(open_pack(data.train), open_pack(data.val) if data.val else None)
    _check_classes(config, packs)
    if opened and before and packs is opened.packs and before.require_thing == data.require_thing:
        train = opened.train
    else:
        train = packs.train.with_things() if data.require_thing else packs.train
    _require_tracking(config)
    steps = config.run.steps or total_steps(config.run.epochs, len(train), config.run.global_batch)
    return PreparedRun(config, steps, packs, train)


def _require_tracking(config: TrainConfig) -> None:
    """Refuse a new run whose MLflow does not answer; a run that resumes keeps its metrics until MLflow is back."""
    try:
        require_reachable(config.tracking.uri, create=True)
    except UserError as error:
        if not (locate(config.run.storage) / config.run.name / "config.json").exists():
            raise
        logger.warning("The run resumes without MLflow. %s", error)


def earlier_record(run: PreparedRun) -> dict[str, Any] | None:
    """Return the config.json of the run that exists in the folder, None if there is none.

    Raises:
        UserError: it is a different run, or the folder holds something else.
    """
    file, record = run.folder / "config.json", run.record
    if not file.exists():
        # A driver that was killed may have left its lock, and a file that it had begun to write.
        names = run.folder.names()
        foreign = [n for n in names if n != LOCK_FILE and not (n.startswith(".") and n.endswith(".tmp"))]
        if foreign:
            raise UserError(
                f"{run.folder} is not the folder of a run: it has {', '.join(foreign[:5])} but no config.json. "
                f"Choose another --run.name or --run.storage."
            )
        return None
    try:
        earlier = parse_json(file.read_bytes(MAX_JSON_BYTES))
        version = earlier.get("version", 1)
        changes = differing_settings(earlier["config"], record["config"])
        changes += [
            f"{what}: {earlier[key]} -> {record[key]}"
            for key, what in (("data_hash", "the data in data.train"), ("total_steps", "the number of steps"))
            if earlier[key] != record[key]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is not the config.json of a run ({type(error).__name__}: {error}). Restore it, or "
            f"choose another --run.name."
        ) from error
    if version != VERSION:
        raise UserError(
            f"{run.folder} was started by another version of maskformer-ray (its config.json has version {version}, "
            f"this program writes {VERSION}). Resume it with the version that started it, or choose another --run.name."
        )
    if changes:
        raise UserError(
            f"{run.folder} is a run with another configuration: {'; '.join(changes)}. "
            f"Start a new run with another --run.name, or resume with the configuration it has."
        )
    return earlier


def check_weights(run: PreparedRun) -> None:
    """Check that the workers of a new run will be able to load its initial weights.

    Raises:
        UserError: the weights are missing or do not fit.
    """
    config = run.config
    if config.weights != "none" and not steps_saved(run.folder):
        model = build_model(config.model)
        logger.info("%s", pretrained.load_initial_weights(model, config.weights, run.train.taxonomy))


def check_locations(config: TrainConfig) -> None:
    """Check now, rather than at the first checkpoint, that the storage can be written and is permanent.

    Raises:
        UserError: the storage cannot be written or is temporary.
    """
    checks.require_permanent({"--run.storage": config.run.storage, "--tracking.uri": config.tracking.uri})
    probe = locate(config.run.storage) / ".writable"
    probe.write_bytes(b"")
    probe.delete()


def check_cluster(config: TrainConfig) -> None:
    """Refuse a run that the joined cluster can never hold, or whose files not all of its nodes see.

    Raises:
        UserError: the cluster is too small, or its nodes do not share the files.
    """
    require_fit(
        checks.capacity(),
        Demand.of(config.scaling, config.scaling.min_workers),
        "Lower --scaling.workers, --scaling.cpus-per-worker or --scaling.data-cpus (fractions are allowed), or use a "
        "larger cluster.",
    )
    packs = {"--data.train": config.data.train, "--data.val": config.data.val}
    files = {flag: f"{uri}/{MANIFEST_FILE}" for flag, uri in packs.items() if uri}
    if config.tracking.uri.startswith(SQLITE):
        files["--tracking.uri"] = config.tracking.uri.removeprefix(SQLITE)
    checks.require_shared(config.run.storage, files)


def _check_classes(config: TrainConfig, packs: Packs) -> None:
    found, expected = packs.train.taxonomy.num_classes, config.model.num_classes
    if found != expected:
        raise UserError(
            f"{packs.train.uri} has {found} classes, the model {expected}. Use --model.num-classes {found} for this "
            f"data."
        )
    if packs.val is not None and packs.val.taxonomy != packs.train.taxonomy:
        raise UserError(
            f"{packs.val.uri} has other categories than {packs.train.uri}. Pack both splits of the same data set."
        )


def require_compiler() -> None:
    """Check that this machine can compile a network.

    Raises:
        UserError: it has no C++ compiler.
    """
    name = os.environ.get("CXX", "g++")
    if shutil.which(name) is None:
        raise UserError(
            f"--scaling.compile needs a C++ compiler, and {platform.node()} has no {name}. Install one, name another "
            f"one by $CXX, or leave --scaling.compile out."
        )


def _elsewhere() -> bool:
    """Return whether workers may run on other machines than this one: then the cluster itself is asked."""
    return is_remote() or ray.is_initialized()


def _require_device(config: TrainConfig) -> None:
    if config.scaling.device == "cuda" and not torch.cuda.is_available() and not _elsewhere():
        raise UserError(
            f"The recipe {config.recipe} trains on {config.scaling.max_workers} GPUs, and this machine has none. Set "
            f"RAY_ADDRESS to a cluster that has them, or run it here, slowly, with: --scaling.device cpu "
            f"--scaling.workers 1 --scaling.cpus-per-worker 1 --scaling.data-cpus 1"
        )
