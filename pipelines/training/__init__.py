"""Training: `fit` is the way in."""

from pipelines.training.driver import TrainResult, fit

__all__ = ["TrainResult", "fit"]
