"""The curves of a run, as TensorBoard and as MLflow have them."""

from pathlib import Path

import numpy as np
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.tracking.runs import TrackedRun


def in_tensorboard(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows for a run's folder."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(point.step, point.value) for point in reader.Scalars(name)] for name in reader.Tags()["scalars"]}


def in_mlflow(run: TrackedRun) -> dict[str, list[tuple[int, float]]]:
    """Return what MLflow has, in the precision of an event file."""
    client = MlflowClient(run.uri)
    with np.errstate(over="ignore"):  # MLflow has the largest float64 for infinity
        return {
            name: [(p.step, float(np.float32(p.value))) for p in client.get_metric_history(run.run_id, name)]
            for name in client.get_run(run.run_id).data.metrics
        }
