"""One trial of a sweep, as Ray Tune runs it: a whole training run, and the rule by which it may be stopped early."""

import contextlib
import queue
import threading
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.config import TrainConfig, from_dict
from pipelines.errors import RunFailed, UserError
from pipelines.training import Listener, fit

_HEARTBEAT = 5.0
"""Seconds after which a trial without news answers nevertheless: Tune can stop it only between two answers."""


class TrainingTrial(tune.Trainable):
    """Trains in a thread; answers with each quick PQ as `step` and `pq`, and in the end with `status` and `cause`.

    When Tune stops it, the run stops as by Ctrl-C: it saves, and its workers and their placement group are gone when
    the trial is. A trial that is killed instead leaves its placement group to a helper of Ray's that may not work.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._listener = Listener(on_quick_pq=lambda step, pq: self._news.put({"step": step, "pq": pq}))
        training = from_dict(TrainConfig, config["trial"]["config"])
        self._thread = threading.Thread(target=self._train, args=(training,), name="training", daemon=True)
        self._thread.start()

    def step(self) -> dict[str, Any]:
        with contextlib.suppress(queue.Empty):
            return self._news.get(timeout=_HEARTBEAT)
        return {}

    def cleanup(self) -> None:
        self._listener.stop.set()
        self._thread.join()

    def _train(self, config: TrainConfig) -> None:
        try:
            end = {"status": fit(config, self._listener).status, "cause": ""}
        except (UserError, RunFailed) as error:
            end = {"status": "failed", "cause": str(error)}
        except BaseException as error:  # it belongs to the trial, and no other thread would see it
            end = {"status": "failed", "cause": f"{type(error).__name__}: {error}"}
        self._news.put({**end, "done": True})


class SuccessiveHalving(FIFOScheduler):
    """Ray's ASHA over trials known by their own names, so that a sweep that goes on remembers those before."""

    def __init__(self, grace_period: int, reduction_factor: int, steps: int) -> None:
        super().__init__()
        self._steps = steps
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
        """Take down a result and tell whether its trial should go on; the last step is always allowed to end."""
        trial: Any = SimpleNamespace(trial_id=name)
        if name not in self._known:
            self._known.add(name)
            self._asha.on_trial_add(None, trial)  # pyright: ignore[reportArgumentType]  # ASHA does not look at it
        decision = self._asha.on_trial_result(
            None,  # pyright: ignore[reportArgumentType]  # as above
            trial,
            {"step": step, "pq": pq},
        )
        return decision != TrialScheduler.STOP or step >= self._steps

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if "pq" not in result or self.judge(trial.config["trial"]["name"], result["step"], result["pq"]):
            return TrialScheduler.CONTINUE
        return TrialScheduler.STOP
