"""One trial of a sweep, as Ray Tune runs it: a whole training run, and the rule by which it is ended early.

Tune never stops a trial. It would take the trial for ended at once and start the next one on workers that are not
free yet, and at the end of a sweep it kills within seconds what may take minutes to save. A trial is told to end
instead, saves, gives back its workers, and says so.
"""

import queue
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

from pipelines.config import TrainConfig, from_dict
from pipelines.errors import RunFailed, UserError
from pipelines.training import Listener, fit

_LOOK_SECONDS = 1.0


class Orders:
    """Which trials are to end before their time: files in a folder that the driver and its trials see."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def end(self, name: str) -> None:
        """Tell one trial to end."""
        (self._folder / name).touch()

    def end_all(self) -> None:
        """Tell all trials to end, and those to come not to begin."""
        self.end("all")

    @property
    def all(self) -> bool:
        return (self._folder / "all").exists()

    def given_to(self, name: str) -> bool:
        """Tell whether this trial itself was told to end."""
        return (self._folder / name).exists()


class TrainingTrial(tune.Trainable):
    """Trains in a thread; answers with each quick PQ as `step` and `pq`, and in the end with `status` and `cause`."""

    def setup(self, config: dict[str, Any]) -> None:
        trial = config["trial"]
        self._name, self._orders = trial["name"], Orders(trial["orders"])
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._listener = Listener(on_quick_pq=lambda step, pq: self._news.put({"step": step, "pq": pq}))
        training = from_dict(TrainConfig, trial["config"])
        threading.Thread(target=self._train, args=(training,), name="training", daemon=True).start()

    def step(self) -> dict[str, Any]:
        while True:
            if self._orders.all or self._orders.given_to(self._name):
                self._listener.stop.set()
            try:
                return self._news.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue

    def _train(self, config: TrainConfig) -> None:
        try:
            status = "stopped" if self._orders.all else fit(config, self._listener).status
            end = {"status": status, "cause": ""}
        except KeyboardInterrupt:  # told to end before there was anything to save
            end = {"status": "stopped", "cause": ""}
        except (UserError, RunFailed) as error:
            end = {"status": "failed", "cause": str(error)}
        except BaseException as error:  # it belongs to the trial, and no other thread would see it
            end = {"status": "failed", "cause": f"{type(error).__name__}: {error}"}
        self._news.put({**end, "done": True})


class SuccessiveHalving(FIFOScheduler):
    """Ray's ASHA over trials known by their own names, so that a sweep that goes on remembers those before."""

    def __init__(self, grace_period: int, reduction_factor: int, steps: int, orders: Orders) -> None:
        super().__init__()
        self._steps, self._orders = steps, orders
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
        """Take down a result and tell whether its trial should go on; the last step is always allowed to end.

        A result that is told again, after the loss of the driver, counts once.
        """
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
        name = trial.config["trial"]["name"]
        if "pq" in result and not self.judge(name, result["step"], result["pq"]):
            self._orders.end(name)
        return TrialScheduler.CONTINUE
