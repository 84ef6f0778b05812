"""Sweeps: `sweep` is the way in."""

from pipelines.sweep.driver import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
