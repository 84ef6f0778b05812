"""Early stopping by Ray's ASHA, including the results of a sweep that was interrupted."""

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.sweep.trainable import StopRequests


class SuccessiveHalving(FIFOScheduler):
    """Ray's ASHA with trials identified by name, so that a resumed sweep can replay its earlier results."""

    def __init__(self, grace_period: int, reduction_factor: int, steps: int, stop_requests: StopRequests) -> None:
        super().__init__()
        self._steps, self._stop_requests = steps, stop_requests
        self._asha = ASHAScheduler(
            time_attr="step",
            metric="pq",
            mode="max",
            grace_period=grace_period,
            max_t=max(steps, grace_period),
            reduction_factor=reduction_factor,
        )
        self._known: set[str] = set()

    def judge(self, name: str, step: int, pq: float) -> bool:
        """Record a result and return whether its trial should continue. A trial at its last step is never stopped.

        A result that is reported again, after the driver was lost, counts once.
        """
        trial: Any = SimpleNamespace(trial_id=name)
        if name not in self._known:
            self._known.add(name)
            self._asha.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]  # ASHA does not use it
        decision = self._asha.on_trial_result(
            None,  # pyright: ignore[reportArgumentType]  # as above
            trial,
            {"step": step, "pq": pq},
        )
        return decision != TrialScheduler.STOP or step >= self._steps

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name = trial.config["name"]
        if "pq" in result and not self.judge(name, result["step"], result["pq"]):
            self._stop_requests.add(name)
        return TrialScheduler.CONTINUE
