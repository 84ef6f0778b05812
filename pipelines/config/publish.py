"""PublishConfig: which checkpoint to evaluate, on which data, and where to register it."""

from dataclasses import dataclass, field, replace
from typing import Literal

from maskformer.config import PanopticConfig
from pipelines.config.train import at_least


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig:
    """Thresholds of the panoptic fusion, where they differ from those of the checkpoint."""

    score_threshold: float | None = None
    """Keep a query if its class probability is above this. Default: the checkpoint's value."""
    overlap_threshold: float | None = None
    """Keep a segment if at least this share of its mask remains visible. Default: the checkpoint's value."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"panoptic.{name} must lie in [0, 1], got {value}.")

    def over(self, own: PanopticConfig) -> PanopticConfig:
        """Return the thresholds of a checkpoint, replaced where others are given."""
        return replace(own, **{name: value for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True, kw_only=True)
class InferenceScaling:
    """Number and resources of the inference workers."""

    workers: int = 1
    """Processes that run the model, each with one device."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of each worker. `auto`: a GPU if there is one."""
    cpus_per_worker: float = 0.5
    """CPUs of each worker, and of each task that reads or scores images. Fractions are allowed."""

    def __post_init__(self) -> None:
        at_least("scaling", self, workers=1)
        if not self.cpus_per_worker > 0:
            raise ValueError(f"scaling.cpus_per_worker must be positive, got {self.cpus_per_worker}.")


@dataclass(frozen=True, kw_only=True)
class PublishTracking:
    """Logging to MLflow."""

    uri: str = ""
    """MLflow tracking URI. Default: $MLFLOW_TRACKING_URI, else the SQLite file mlflow.db in the folder of the runs."""


@dataclass(frozen=True, kw_only=True)
class PublishConfig:
    """Which checkpoint or predictions to evaluate, on which data, and where to register the model."""

    checkpoint: str = ""
    """Checkpoint to evaluate: a path or URI. A run's folder (<storage>/<run name>) for its newest checkpoint; the same
    with @best at the end for the one of the best quick PQ; one of its checkpoints/step_* folders; or a checkpoint of
    mmdetection, detectron2 or Hugging Face."""
    predictions: str = ""
    """COCO panoptic results to evaluate instead of a checkpoint. The JSON, or a folder with it and its PNGs."""
    data: str
    """Pack to evaluate on, written by prepare_data.py."""
    output: str = ""
    """Folder for predictions, metrics and report.html. The same evaluation continues there after an interruption.
    Default: evaluation/<step>-<name of data> in the run's folder, or beside a checkpoint file."""
    compare: str = ""
    """Evaluation on the same data to compare with. Its folder, or that of a run that was evaluated on this data."""
    report_images: int = 100
    """Images in report.html, half of them the worst, half the best. 0: no report."""
    check_with: Literal["nothing", "panopticapi"] = "nothing"
    """Score the predictions with the official code too, and say whether both agree."""
    register: str = ""
    """Registered model to which a new version is added. Default: nothing is registered."""
    alias: str = "candidate"
    """Alias to set on the new version of the registered model."""
    panoptic: ThresholdConfig = field(default_factory=ThresholdConfig)
    scaling: InferenceScaling = field(default_factory=InferenceScaling)
    tracking: PublishTracking = field(default_factory=PublishTracking)

    def __post_init__(self) -> None:
        if bool(self.checkpoint) == bool(self.predictions):
            what = "both" if self.checkpoint else "none"
            raise ValueError(f"Give either --checkpoint or --predictions, got {what}.")
        if self.predictions and not self.output:
            raise ValueError("--predictions needs an --output for the numbers and the report.")
        if self.predictions and self.register:
            raise ValueError("--register needs a --checkpoint: predictions have no model.")
        if self.report_images < 0:
            raise ValueError(f"report_images must not be below 0, got {self.report_images}.")
