"""TrainConfig: the complete configuration of a training run, as frozen dataclasses. Every field is a flag.

A recipe (recipes.py) is a complete TrainConfig. `resolve` (resolve.py) makes its paths absolute and fills in defaults.
The docstring below a field is its help text; `--help` shows the first sentence, `--help-all` all of it.
"""

import math
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from maskformer.config import MAX_SIDE, LossConfig, ModelConfig, OptimizerConfig, PanopticConfig, ScheduleConfig
from pipelines.data.augment_config import AugmentConfig
from pipelines.data.order import BatchSplit
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.manifest import PackedSet
    from pipelines.data.sample_order import SampleOrder


def at_least(part: str, config: Any, **limits: int) -> None:
    """Raise ValueError if a field of `config`, the part of a configuration named `part`, is below its limit."""
    for name, limit in limits.items():
        if getattr(config, name) < limit:
            raise ValueError(f"{part}.{name} must be at least {limit}, got {getattr(config, name)}.")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The packed data and how it is read."""

    train: str = ""
    """Pack of training images, from prepare_data.py. Path or s3:// URI. Default: $MASKFORMER_TRAIN_DATA."""
    val: str = ""
    """Pack of validation images for the quick PQ. Default: $MASKFORMER_VAL_DATA, or no quick PQ if that is unset."""
    require_thing: bool = True
    """Skip images without a non-crowd thing segment, as mmdetection does."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    group_by_area: int = 0
    """Steps within which images of about the same area form a step; 0: none. Otherwise 16 is a good value: on many
    GPUs a step then hardly waits for its largest image. It changes the order of the images, and so the result."""
    samples_per_task: int = 64
    """Images that one Ray Data task decodes and augments."""
    object_store_gb: float = 1.5
    """GB of Ray's object store that the stream of each worker may use. Measured with 0.75 for
    each of its data CPUs."""
    prefetch: int = 8
    """Micro-batches that each worker prefetches."""
    damaged: Literal["stop", "skip"] = "stop"
    """What to do about an image that cannot be read. `stop` ends the run; `skip` trains on the pack's next image in its
    place and says so, which leaves all other positions of the order as they are."""

    def __post_init__(self) -> None:
        at_least("data", self, group_by_area=0, samples_per_task=1, prefetch=1)
        if not self.object_store_gb > 0:
            raise ValueError(f"data.object_store_gb must be above 0, got {self.object_store_gb:g}.")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Name, folder, length and batch size of a run."""

    name: str = ""
    """Name of the run; an existing run of that name is resumed. It is also the name of the run's folder. Default: the
    recipe's name with date and time."""
    storage: str = ""
    """Folder that holds all runs. A path or s3:// URI. Default: $MASKFORMER_STORAGE."""
    seed: int = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    epochs: float = 75
    """Passes over the training images. Ignored if run.steps is set."""
    steps: int | None = None
    """Optimizer steps to train for, instead of run.epochs."""
    global_batch: int = 16
    """Images per optimizer step, over all workers."""
    micro_batch: int = 1
    """Images per forward pass of one worker. It affects the result: images are padded to the largest of the batch, and
    convolutions, GroupNorm and Swin's windows see the padding."""
    patience: int = 0
    """Quick PQs without a new best after which the run ends early; 0 disables it."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a step that is not finite two times in a row. It is repeated once from the checkpoint before.
    `stop` ends the run and writes what jobs/replay.py needs; `skip` leaves the weights as they are for that step."""
    sample_log: bool = False
    """Log the image ids of every step to samples.jsonl. One line per step and worker; needs a local run.storage."""

    def __post_init__(self) -> None:
        at_least("run", self, seed=0, global_batch=1, micro_batch=1, patience=0)
        if self.seed >= 2**64:
            raise ValueError(f"run.seed must be below 2**64, got {self.seed}.")
        if not math.isfinite(self.epochs):
            raise ValueError(f"run.epochs must be a finite number, got {self.epochs}.")
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise ValueError(f"A run needs at least one step, got run.epochs {self.epochs} and run.steps {self.steps}.")
        encoded = self.name.encode("utf-8", "backslashreplace")
        if "/" in self.name or self.name.startswith(".") or len(encoded) > 255 or encoded.decode() != self.name:
            raise ValueError(
                f"run.name must be the name of one folder, at most 255 bytes of UTF-8, got {self.name[:300]!r}. Set "
                f"its parent folder by --run.storage."
            )


@dataclass(frozen=True, kw_only=True)
class ScalingConfig:
    """Number and resources of the workers, and failure limits. Nothing here changes the training mathematically."""

    workers: int | str = 16
    """Training processes, each with one device: a number, or a range such as 2:8. Of a range, the largest number that
    divides the global batch and fits the cluster is used; the run continues with fewer workers when nodes are lost and
    with more when they return. Gradient accumulation follows from run.global_batch."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Device of each worker: one GPU, or the CPU."""
    cpus_per_worker: float = 2
    """CPUs that each worker reserves in Ray. Fractions are allowed."""
    data_cpus: float = 16
    """CPUs for decoding and augmentation, all workers together. Ray Data tasks run there. Fractions are allowed."""
    threads: int = 1
    """PyTorch threads per worker. On CPUs the number affects rounding, so bit-identical resuming needs the same one."""
    reduction: Literal["auto", "exact", "fast"] = "auto"
    """How gradients are added. `exact` adds them in the same order whatever the number of workers, so 1, 2, 4 and 8
    give the same bits; `fast` is DDP, which adds during the backward pass, and large images are spread evenly
    among the workers. `auto` is exact on CPUs, fast on GPUs."""
    compile: bool = False
    """Compile the network with torch.compile. It needs a C++ compiler on every node, and minutes for each of the first
    eight sizes of a micro-batch; other sizes run as without it. Rounding and dropout differ from those without it, and
    a resumed run is exact in the data but not to the bit."""
    max_failures: int = 8
    """Failures in a row without a new checkpoint after which the run fails."""
    node_wait: float = 120
    """Seconds to wait for a lost node before continuing with fewer workers. Only for a range of workers."""
    storage_patience: float = 900
    """Seconds to wait for a storage that does not answer before the run fails."""
    hang_timeout: float = 300
    """Minimum seconds without a step before workers are restarted. The limit is 20 usual steps if that is longer."""
    collective_timeout: float = 300
    """Timeout of collective operations such as all-reduce, in seconds. Waiting for the storage is allowed on top."""

    def __post_init__(self) -> None:
        at_least("scaling", self, threads=1, max_failures=0, collective_timeout=1, hang_timeout=1)
        for name in ("cpus_per_worker", "data_cpus", "collective_timeout", "hang_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"scaling.{name} must be a positive number, got {getattr(self, name)}.")
        for name in ("node_wait", "storage_patience"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"scaling.{name} must be at least 0, got {getattr(self, name)}.")
        if isinstance(self.workers, str):
            match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", self.workers)
            if match is None:
                raise ValueError(f"scaling.workers must be a number or a range such as 2:8, got {self.workers!r}.")
            if match[2] is None:
                object.__setattr__(self, "workers", int(match[1]))
            elif int(match[1]) > int(match[2]):
                raise ValueError(f"scaling.workers must be a range from less to more, got {self.workers}.")
        if self.min_workers < 1:
            raise ValueError(f"scaling.workers must be at least 1, got {self.workers}.")

    @property
    def min_workers(self) -> int:
        """The least number of workers to train with."""
        return int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """The largest number of workers to train with."""
        return int(str(self.workers).rpartition(":")[2])

    @property
    def exact(self) -> bool:
        """Whether gradients are added in an order that does not depend on the number of workers."""
        return self.reduction == "exact" or (self.reduction == "auto" and self.device == "cpu")

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources that each worker reserves, by Ray's names."""
        gpu = {"GPU": 1.0} if self.device == "cuda" else {}
        return {"CPU": self.cpus_per_worker, **gpu}


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """How often checkpoints are written, and how many are kept."""

    every: int = 500
    """Steps between checkpoints. A failure repeats at most this many, and those done while a checkpoint is written."""
    keep: int = 3
    """Number of newest checkpoints to keep. If the newest is damaged, the one before it is used."""
    keep_best: bool = True
    """Also keep the checkpoint of the best quick PQ. `evaluate.py --checkpoint RUN@best` uses it."""

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every=1, keep=1)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Image size in evaluation, and the quick PQ during training."""

    short_side: int = 800
    """Short side in pixels to which images are resized for evaluation. At most 10,000."""
    long_side: int = 1333
    """Upper limit of the long side in pixels. At most 10,000. Takes precedence over short_side."""
    every: int = 5000
    """Steps between computations of the quick PQ; 0 disables it."""
    images: int = 256
    """Images for the quick PQ. Always the same ones, evenly spaced in data.val."""

    def __post_init__(self) -> None:
        at_least("evaluation", self, short_side=1, long_side=1, every=0, images=1)
        for name in ("short_side", "long_side"):
            if getattr(self, name) > MAX_SIDE:
                raise ValueError(f"evaluation.{name} must be at most {MAX_SIDE} pixels, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Logging to MLflow."""

    uri: str = ""
    """MLflow tracking URI. Default: $MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in a local run.storage."""
    experiment: str = "maskformer"
    """MLflow experiment of the run. Created if it does not exist."""
    log_every: int = 20
    """Steps between logged losses."""
    tensorboard: bool = False
    """Write the metrics that MLflow has to TensorBoard's event files too. They are in the run's folder, so run.storage
    must be local."""
    parent: str = ""
    """Id of the parent MLflow run. A sweep sets it for its trials."""

    def __post_init__(self) -> None:
        at_least("tracking", self, log_every=1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A complete training run."""

    recipe: str
    """Recipe that the configuration is based on."""
    weights: str = "imagenet"
    """Initial weights: `imagenet`, `none`, or a path or URI. `imagenet` is the backbone from torch hub's cache; `none`
    is random initialization. A path or URI is that of a backbone, of a complete model of mmdetection, detectron2 or
    Hugging Face, or of a run."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the network (autocast): bfloat16 or float32. `auto` is bfloat16 on GPUs and float32 on CPUs.
    Weights, matching and losses are always float32, and so is every evaluation."""
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
    def batch_split(self) -> BatchSplit:
        """How the global batch is split among workers and micro-batches; with the most workers of a range.

        Raises:
            UserError: the global batch does not divide evenly among the workers.
        """
        return self.batch_splits[0]

    @property
    def batch_splits(self) -> list[BatchSplit]:
        """The splits for every possible number of workers, the most workers first.

        Raises:
            UserError: no number of workers divides the global batch evenly.
        """
        run, scaling = self.run, self.scaling
        if scaling.min_workers == scaling.max_workers:
            return [_split(run, scaling.max_workers)]
        one = _split(run, 1)
        possible = [n for n in range(scaling.max_workers, scaling.min_workers - 1, -1) if one.accumulation % n == 0]
        if not possible:
            raise UserError(
                f"No number of workers in --scaling.workers {scaling.workers} divides the {one.accumulation} "
                f"micro-batches of the global batch of {run.global_batch}. Use a range with one of: "
                f"{', '.join(str(n) for n in range(1, one.accumulation + 1) if one.accumulation % n == 0)}."
            )
        return [_split(run, workers) for workers in possible]

    def sample_order(self, samples: "PackedSet") -> "SampleOrder":
        """Return the order in which a run uses images, and each worker its micro-batches."""
        from pipelines.data.sample_order import SampleOrder  # imports torch, which --help should not

        return SampleOrder(
            image_ids=samples.image_ids,
            heights=samples.index["height"].to_numpy(),
            widths=samples.index["width"].to_numpy(),
            seed=self.run.seed,
            augmentation=self.data.augment,
            split=self.batch_split,
            # Exact means the same sums for any number of workers, so none may depend on which worker has what.
            dealt=not self.scaling.exact,
            window=self.data.group_by_area,
        )

    def network_precision(self, device_type: str) -> Literal["bfloat16", "float32"]:
        """Return the precision of the network on devices of a type, `cuda` or `cpu`."""
        if self.precision == "auto":
            return "bfloat16" if device_type == "cuda" else "float32"
        return self.precision

    def with_workers(self, workers: int) -> "TrainConfig":
        """Return the configuration for exactly this number of workers."""
        return replace(self, scaling=replace(self.scaling, workers=workers))


def _split(run: RunConfig, workers: int) -> BatchSplit:
    return BatchSplit(global_batch=run.global_batch, micro_batch=run.micro_batch, workers=workers)
