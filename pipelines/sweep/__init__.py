"""Sweeps: `sweep` is the entry point."""

from pipelines.sweep.driver import SweepResult, sweep

__all__ = ["SweepResult", "sweep"]
