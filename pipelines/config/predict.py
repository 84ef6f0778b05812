"""PredictConfig: which pictures to segment with which model, and what to write."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.publish import ThresholdConfig


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """What is written for each picture."""

    overlays: bool = True
    """Write overlays/NAME.jpg: the picture with painted and named segments."""
    pngs: bool = True
    """Write panoptic/NAME.png: segment ids in COCO's colors, R + 256 G + 65536 B."""
    json: bool = True
    """Write predictions.json: all segments in COCO's panoptic result format."""


@dataclass(frozen=True, kw_only=True)
class PredictScaling:
    """Number and resources of the inference workers."""

    workers: int | None = None
    """Processes that run the model, each with one device. Default: one per GPU, or one per two CPUs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each worker. `auto`: a GPU if there is one."""
    cpus_per_worker: float = 0.5
    """CPUs of each worker, and of each task that reads or writes pictures. Fractions are allowed."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"scaling.workers must be at least 1, got {self.workers}.")
        if not self.cpus_per_worker > 0:
            raise ValueError(f"scaling.cpus_per_worker must be positive, got {self.cpus_per_worker}.")


@dataclass(frozen=True, kw_only=True)
class PredictTracking:
    """MLflow's registry."""

    uri: str = ""
    """MLflow tracking URI of a models:/ checkpoint. Default: $MLFLOW_TRACKING_URI."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Which pictures to segment with which model, and what to write."""

    checkpoint: str
    """Model: a path or URI. A run's folder, or the folder@best; one of its checkpoints/step_* folders; a checkpoint of
    mmdetection, detectron2 or Hugging Face; or models:/NAME@ALIAS of MLflow's registry."""
    input: tuple[str, ...] = ()
    """More pictures: files, folders, globs, s3:// prefixes, videos, or @FILE with a path in each line."""
    output: str
    """Folder to write to, a path or an s3:// URI. The same command continues an interrupted one."""
    every: int = 1
    """Of videos, segment each Nth frame, the first one included."""
    write: WriteConfig = field(default_factory=WriteConfig)
    panoptic: ThresholdConfig = field(default_factory=ThresholdConfig)
    scaling: PredictScaling = field(default_factory=PredictScaling)
    tracking: PredictTracking = field(default_factory=PredictTracking)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}.")
