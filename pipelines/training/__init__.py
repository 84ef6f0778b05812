"""Training: `fit` is the way in."""

from pipelines.training.driver import TrainResult, fit
from pipelines.training.watch import Listener

__all__ = ["Listener", "TrainResult", "fit"]
