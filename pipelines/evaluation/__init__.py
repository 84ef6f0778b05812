"""Panoptic quality: a quick estimate during training, all images of a checkpoint or of predictions afterwards."""

from pipelines.evaluation.evaluate import evaluate
from pipelines.evaluation.predictions import evaluate_predictions
from pipelines.evaluation.result import EvaluationResult

__all__ = ["EvaluationResult", "evaluate", "evaluate_predictions"]
