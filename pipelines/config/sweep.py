"""SweepConfig: search space, number of trials and early stopping of a sweep."""

from dataclasses import dataclass

from pipelines.config.train import at_least


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Search space, number of trials and early stopping of a sweep."""

    space: tuple[str, ...] = ()
    """Settings to vary, each `SETTING=VALUES`. A range: `model.dropout=0..0.4`; a logarithmic range:
    `optimizer.lr=1e-5..1e-3:log`; choices: `loss.dice_weight=1,2,5`."""
    trials: int = 8
    """Number of trials. With ranges they are a Latin hypercube; with choices only, each combination is tried at most
    once."""
    grace_period: int | None = None
    """Steps that every trial runs before it may be stopped early. Default: evaluation.every."""
    reduction_factor: int = 3
    """At each rung, the best 1 in this many trials continue (ASHA). The first rung is the grace period; each further
    rung is this factor times the one before."""
    concurrency: int | None = None
    """Number of trials that run at the same time. Default: as many as fit the cluster."""
    keep_gigabytes: float = 50
    """Disk space in GB for checkpoints of ended trials. The best trials keep theirs; the best one always does."""

    def __post_init__(self) -> None:
        at_least("sweep", self, trials=1, reduction_factor=2)
        for name in ("grace_period", "concurrency"):
            if getattr(self, name) is not None:
                at_least("sweep", self, **{name: 1})
        if not self.keep_gigabytes >= 0:
            raise ValueError(f"sweep.keep_gigabytes must not be negative, got {self.keep_gigabytes}.")
