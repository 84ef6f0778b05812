"""Saving checkpoints in the background, while the training continues."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from torch import Tensor

from maskformer.taxonomy import Taxonomy
from pipelines.checkpoints.state import TrainingState, save, step_folder, steps_saved
from pipelines.config.train import TrainConfig
from pipelines.storage import Location


class Saver:
    """Saves in the background on rank 0, and tells Ray of each checkpoint once it is complete."""

    def __init__(self, config: TrainConfig, run: Location, rank: int, taxonomy: Taxonomy) -> None:
        self._run = run
        self._writer = BackgroundWriter(run, config, taxonomy) if rank == 0 else None
        self._unreported: int | None = None

    def save(self, step: int, network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Copy the state and begin to write it, once the checkpoint before is complete."""
        self.finish()
        if self._writer is not None:
            self._writer.submit(
                TrainingState(
                    step=step, model=snapshot(network.state_dict()), optimizer=snapshot(optimizer.state_dict())
                )
            )
        self._unreported = step

    def finish(self) -> None:
        """Wait for the checkpoint under way and report it. All ranks must call this equally often."""
        if self._unreported is None:
            return
        reported = None
        if self._writer is not None:
            self._writer.wait()
            folder = step_folder(self._run, self._unreported)
            reported = Checkpoint(folder.path, filesystem=folder.filesystem)
        ray.train.report(
            {"step": self._unreported}, checkpoint=reported, checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD
        )
        self._unreported = None


class BackgroundWriter:
    """Writes checkpoints in a thread, one at a time, and deletes the oldest."""

    def __init__(self, run: Location, config: TrainConfig, taxonomy: Taxonomy) -> None:
        self._run, self._config, self._taxonomy = run, config, taxonomy
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, state: TrainingState) -> None:
        """Begin to write `state`, once the one before is complete; raises what went wrong with that one."""
        self.wait()
        self._pending = self._pool.submit(self._write, state)

    def wait(self) -> None:
        """Return when everything submitted is complete; raises what went wrong."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _write(self, state: TrainingState) -> None:
        save(step_folder(self._run, state.step), state, self._config, self._taxonomy)
        for step in [step for step in steps_saved(self._run) if step <= state.step][: -self._config.checkpoint.keep]:
            # The manifest goes first: what a kill leaves of the folder is then no checkpoint.
            (step_folder(self._run, step) / "manifest.json").delete()
            step_folder(self._run, step).delete()


def snapshot(value: Any) -> Any:
    """Copy nested tensors to the CPU, so that training can continue while they are written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return value
