"""Training: `fit` is the entry point."""

from pipelines.training.driver import TrainResult, fit
from pipelines.training.monitor import TrainCallbacks
from pipelines.training.preflight import PreparedRun, prepare_run

__all__ = ["PreparedRun", "TrainCallbacks", "TrainResult", "fit", "prepare_run"]
