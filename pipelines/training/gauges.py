"""Prometheus gauges of a run, which Ray shows on the metrics endpoint of the driver's node."""

from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Gauge

_DESCRIPTIONS = {
    "step": "Steps done, when the losses were logged last.",
    "loss": "Mean total loss of the last step that was logged.",
    "images_per_second": "Images trained on per second.",
    "data_wait_share": "Share of the time that worker 0 waited for data, 0..1.",
    "quick_pq": "PQ of a fixed subset of the validation images, a fraction.",
}


class RunGauges:
    """Gauges such as `maskformer_loss`, tagged with the name of the run; Ray writes `ray_` before their names."""

    def __init__(self, run: str) -> None:
        """Create the gauges, without values.

        Args:
            run: name of the run.
        """
        self._tags = {"run": run}
        self._gauges = {
            name: Gauge(f"maskformer_{name}", text, tag_keys=("run",)) for name, text in _DESCRIPTIONS.items()
        }

    def set(self, figures: Mapping[str, Any]) -> None:
        """Set the gauges that `figures` has values for; its other values are ignored."""
        for name, gauge in self._gauges.items():
            if name in figures:
                gauge.set(figures[name], self._tags)
