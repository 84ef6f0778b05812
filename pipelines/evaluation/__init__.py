"""PQ of a checkpoint: quick during training, whole afterwards. `evaluate` is the way in."""

from pipelines.evaluation.score import EvaluationResult, evaluate

__all__ = ["EvaluationResult", "evaluate"]
