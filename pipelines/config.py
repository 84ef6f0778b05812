"""TrainConfig: everything that decides a training run, as frozen dataclasses whose every leaf is a flag.

A recipe (recipes.py) is a complete TrainConfig. `resolve` turns it into the configuration that is run, saved
with each checkpoint and logged: places made absolute, names given, environment variables read.
"""

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal, TypeVar

from maskformer.config import LossConfig, ModelConfig, PanopticConfig
from maskformer.optim import OptimizerConfig, ScheduleConfig
from pipelines.data.augment import AugmentConfig
from pipelines.data.order import BatchPlan
from pipelines.errors import UserError
from pipelines.storage import absolute, is_remote

TRAIN_DATA, VAL_DATA, STORAGE = "MASKFORMER_TRAIN_DATA", "MASKFORMER_VAL_DATA", "MASKFORMER_STORAGE"
"""Environment variables that stand in for --data.train, --data.val and --run.storage."""

_SQLITE = "sqlite:///"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the packed data lies, and how it is read."""

    train: str = ""
    """Pack to train on, made by prepare_data.py: a path or s3:// URI. Default: $MASKFORMER_TRAIN_DATA."""
    val: str = ""
    """Pack for the quick PQ. Default: $MASKFORMER_VAL_DATA; none if that is unset."""
    require_thing: bool = True
    """Leave out images without a thing that is not a crowd, as mmdetection does."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    samples_per_task: int = 16
    """Images that one Ray Data task decodes and augments."""
    prefetch: int = 8
    """Micro-batches that each worker holds ready."""

    def __post_init__(self) -> None:
        _at_least("data", self, samples_per_task=1, prefetch=1)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What one run is: its name and place, its length and its batches."""

    name: str = ""
    """The same name in the same storage continues a run. Default: the recipe's name with date and time."""
    storage: str = ""
    """Folder of runs: a path or s3:// URI. Default: $MASKFORMER_STORAGE."""
    seed: int = 0
    """Of the initial weights, the order of samples, augmentation and dropout."""
    epochs: float = 75
    steps: int | None = None
    """Train for this many steps instead of `epochs`."""
    global_batch: int = 16
    """Images per optimizer step, whatever the number of workers."""
    micro_batch: int = 1
    """Images per forward pass. Part of the recipe: padding inside a batch changes the arithmetic."""
    sample_log: bool = False
    """Write samples.jsonl, a line per step and worker with its image ids (local storage only)."""

    def __post_init__(self) -> None:
        _at_least("run", self, seed=0, global_batch=1, micro_batch=1)
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise ValueError(f"A run needs at least one step, got run.epochs {self.epochs} and run.steps {self.steps}.")
        if "/" in self.name or self.name.startswith("."):
            raise ValueError(f"run.name is the name of a folder, got {self.name!r}; put the place in --run.storage.")


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """How many workers, on what, and what a failure may cost. Nothing here changes the mathematics."""

    workers: int = 16
    """Processes of one device each. Accumulation follows from the global batch and is printed."""
    device: Literal["cuda", "cpu"] = "cuda"
    cpus_per_worker: float = 2
    data_cpus: float = 16
    """CPUs for the Ray Data tasks of all workers together."""
    threads: int = 1
    """torch threads per worker. Part of bit-identical resume on CPU, hence explicit."""
    max_failures: int = 8
    """Times the workers may die and be started again before the run gives up."""
    collective_timeout: float = 300
    """Seconds after which a worker that waits for the others gives up."""

    def __post_init__(self) -> None:
        _at_least("scaling", self, workers=1, threads=1, max_failures=0)
        for name in ("cpus_per_worker", "data_cpus", "collective_timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"scaling.{name} must be positive, got {getattr(self, name)}.")

    @property
    def cpus(self) -> float:
        """CPUs of the whole run: of its workers and of the data tasks."""
        return self.workers * self.cpus_per_worker + self.data_cpus


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often the state is saved, and how many are kept."""

    every: int = 500
    """Steps between checkpoints: what a failure can cost."""
    keep: int = 3
    """The newest are kept, so that a damaged one has predecessors."""

    def __post_init__(self) -> None:
        _at_least("checkpoint", self, every=1, keep=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How images are shown to the model when it is evaluated, and the quick PQ during training."""

    short_side: int = 800
    long_side: int = 1333
    every: int = 5000
    """Steps between quick evaluations; 0 for none."""
    images: int = 256
    """Images of the quick evaluation: always the same ones, spread over `data.val`."""

    def __post_init__(self) -> None:
        _at_least("evaluation", self, short_side=1, long_side=1, every=0, images=1)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow lives."""

    uri: str = ""
    """Default: $MLFLOW_TRACKING_URI, else a SQLite file `mlflow.db` in a local storage folder."""
    experiment: str = "maskformer"
    log_every: int = 20
    """Steps between logged losses."""
    parent: str = ""
    """Id of the MLflow run that this one is a part of, such as a sweep's."""

    def __post_init__(self) -> None:
        _at_least("tracking", self, log_every=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training run."""

    recipe: str
    """The name of the recipe that this configuration started from."""
    weights: str = "imagenet"
    """What training starts from: `imagenet` (the backbone, from torch hub's cache); a path or URI of a backbone, of a
    whole model of mmdetection, detectron2 or Hugging Face, or of a run; or `none` for random weights."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the network on a GPU (autocast); matching, losses and everything on a CPU are float32."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    panoptic: PanopticConfig = field(default_factory=PanopticConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def plan(self) -> BatchPlan:
        """The split of the global batch.

        Raises:
            UserError: the number of workers cannot give the global batch.
        """
        return BatchPlan(
            global_batch=self.run.global_batch, micro_batch=self.run.micro_batch, workers=self.scaling.workers
        )


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """What to evaluate, on what, and what becomes of it."""

    checkpoint: str
    """A run's folder (<storage>/<run name>) for its newest checkpoint, one of its checkpoints/step_* folders, or a
    checkpoint of mmdetection, detectron2 or Hugging Face; a path or URI."""
    data: str
    """Pack to evaluate on, made by prepare_data.py."""
    output: str = ""
    """Folder for the predictions. Default: evaluation/<step>-<name of data> in the run's folder, or in one beside a
    file."""
    score_threshold: float | None = None
    """Default: the checkpoint's own."""
    overlap_threshold: float | None = None
    """Default: the checkpoint's own."""
    predictors: int = 1
    """Processes that hold the model."""
    device: Literal["cpu", "cuda"] = "cpu"
    """With cuda each predictor has a GPU."""
    cpus: float = 0.5
    """CPUs of each predictor and of each reading task."""
    register: str = ""
    """Name of the registered model to add a version to; none if empty."""
    alias: str = "candidate"
    """Alias to point at the new version."""
    tracking_uri: str = ""
    """Default: the run's own."""

    def __post_init__(self) -> None:
        _at_least("evaluate", self, predictors=1)
        if self.cpus <= 0:
            raise ValueError(f"cpus must be positive, got {self.cpus}.")
        for name in ("score_threshold", "overlap_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}.")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What a sweep tries, how many at a time, and which it gives up early."""

    space: tuple[str, ...] = ()
    """A leaf to vary; may be given several times. A range, `model.dropout=0..0.4`, a logarithmic one,
    `optimizer.lr=1e-5..1e-3:log`, or choices, `loss.dice_weight=1,2,5`."""
    trials: int = 8
    """Combinations to try: a Latin hypercube of the ranges; of choices alone, each combination at most once."""
    grace_period: int | None = None
    """Steps that every trial is given before it may be stopped. Default: `evaluation.every`."""
    reduction_factor: int = 3
    """At the grace period, and at each multiple of it by this factor, only the best 1 in this many go on."""
    concurrency: int | None = None
    """Trials at a time. Default: as many as the cluster holds, with their workers and data tasks."""
    keep_gigabytes: float = 50
    """Checkpoints of trials that have ended are deleted beyond this; the best one's stay, the next while they fit."""

    def __post_init__(self) -> None:
        _at_least("sweep", self, trials=1, reduction_factor=2)
        for name in ("grace_period", "concurrency"):
            if getattr(self, name) is not None:
                _at_least("sweep", self, **{name: 1})
        if not self.keep_gigabytes >= 0:
            raise ValueError(f"sweep.keep_gigabytes must not be negative, got {self.keep_gigabytes}.")


def resolve(config: TrainConfig) -> TrainConfig:
    """Return the configuration that is run: every place absolute, every default decided.

    Raises:
        UserError: no data or storage is named, or the number of workers cannot give the global batch.
    """
    train = config.data.train or os.environ.get(TRAIN_DATA, "")
    val = config.data.val or os.environ.get(VAL_DATA, "")
    storage = config.run.storage or os.environ.get(STORAGE, "")
    missing = [
        f"{what} (--{flag} or ${variable})"
        for value, what, flag, variable in (
            (train, "the packed training data", "data.train", TRAIN_DATA),
            (storage, "a folder for runs", "run.storage", STORAGE),
        )
        if not value
    ]
    if missing:
        raise UserError(f"The run needs {' and '.join(missing)}. Pack a COCO folder with jobs/prepare_data.py first.")
    name = config.run.name or f"{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}"
    resolved = replace(
        config,
        weights=config.weights if config.weights in ("imagenet", "none") else absolute(config.weights),
        data=replace(config.data, train=absolute(train), val=absolute(val) if val else ""),
        run=replace(config.run, name=name, storage=absolute(storage)),
        tracking=replace(config.tracking, uri=tracking_uri(config.tracking.uri, storage)),
    )
    if resolved.run.sample_log and is_remote(resolved.run.storage):
        raise UserError(
            f"--run.sample-log appends to a file, which {resolved.run.storage} cannot do. "
            f"Use a local --run.storage for an audit of the order."
        )
    _ = resolved.plan  # refuse an impossible number of workers before anything starts
    return resolved


def tracking_uri(uri: str, storage: str) -> str:
    """Return the MLflow tracking URI to use with a storage folder."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith(_SQLITE):
        return _SQLITE + absolute(uri.removeprefix(_SQLITE))
    if uri:
        return uri
    if is_remote(storage):
        raise UserError(
            f"No MLflow server is named and {storage} cannot hold a SQLite file. "
            f"Use --tracking.uri http://host:5000 or $MLFLOW_TRACKING_URI."
        )
    return f"{_SQLITE}{absolute(storage)}/mlflow.db"


def without_none(hint: Any) -> Any:
    """Return X for the type `X | None`."""
    return next(inner for inner in hint.__args__ if inner is not type(None))


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as JSON-able nested dictionaries (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


Config = TypeVar("Config")


def from_dict(kind: type[Config], values: dict[str, Any]) -> Config:
    """Rebuild a configuration from `to_dict`'s result.

    Raises:
        UserError: it has a leaf that this version does not know.
    """
    hints = typing.get_type_hints(kind)
    unknown = sorted(values.keys() - hints.keys())
    if unknown:
        raise UserError(
            f"A saved {kind.__name__} has {', '.join(unknown)}, which this version does not know. "
            f"Use the version of the program that saved it."
        )
    return kind(**{name: _rebuilt(hints[name], value) for name, value in values.items()})


def _rebuilt(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value)
    if isinstance(hint, types.UnionType):
        return value if value is None else _rebuilt(without_none(hint), value)
    return tuple(_rebuilt(None, item) for item in value) if isinstance(value, list) else value


def _at_least(part: str, config: Any, **limits: int) -> None:
    for name, limit in limits.items():
        if getattr(config, name) < limit:
            raise ValueError(f"{part}.{name} must be at least {limit}, got {getattr(config, name)}.")
