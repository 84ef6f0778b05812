"""Training: `fit` is the entry point.

The names are imported at their first use, so that `goodput` can be read without Ray and torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.training.driver import TrainResult, fit
    from pipelines.training.monitor import TrainCallbacks
    from pipelines.training.preflight import PreparedRun, prepare_run

__all__ = ["PreparedRun", "TrainCallbacks", "TrainResult", "fit", "prepare_run"]

_MODULES = {
    "PreparedRun": "preflight",
    "TrainCallbacks": "monitor",
    "TrainResult": "driver",
    "fit": "driver",
    "prepare_run": "preflight",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
