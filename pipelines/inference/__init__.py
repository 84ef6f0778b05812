"""Segment pictures with a model of any origin: overlays, panoptic PNGs and COCO's results."""

from pipelines.inference.driver import PredictResult, predict

__all__ = ["PredictResult", "predict"]
