"""Panoptic quality of a checkpoint: a quick estimate during training, all images afterwards with `evaluate`."""

from pipelines.evaluation.evaluate import EvaluationResult, evaluate

__all__ = ["EvaluationResult", "evaluate"]
