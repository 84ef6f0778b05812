"""PromoteConfig: which version of a registered model should get an alias, and under which condition."""

from dataclasses import dataclass, field

from pipelines.config.publish import PublishTracking
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PromoteConfig:
    """Which version of a registered model should get an alias, and under which condition."""

    model: str
    """Name of the registered model."""
    version: int | None = None
    """Version that should get the alias. Needed unless --rollback is given."""
    alias: str = "champion"
    """Alias to set."""
    confidence: float = 0.95
    """The version must be better than the alias's present one by an interval of this confidence: its lower end must be
    above 0."""
    data: str = ""
    """Data set to compare on: the beginning of its hash, or its name. Needed if both versions were evaluated on
    several data sets."""
    force: bool = False
    """Set the alias whether the version is better or not, or not comparable. Needs --reason."""
    reason: str = ""
    """Why, in a few words, for the tags."""
    rollback: bool = False
    """Set the alias back to the version that it named before its last promotion."""
    dry_run: bool = False
    """Compare and print, but change nothing."""
    tracking: PublishTracking = field(default_factory=PublishTracking)

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"--confidence must lie between 0 and 1, got {self.confidence}.")
        if self.rollback == (self.version is not None):
            raise UserError("Give either --version, the version to promote, or --rollback.")
        if self.version is not None and self.version < 1:
            raise UserError(f"--version must be at least 1, got {self.version}.")
        if self.force and self.rollback:
            raise UserError("--rollback compares nothing, so it needs no --force.")
        if self.force and not self.reason.strip():
            raise UserError("--force needs a --reason, which is kept in the tags of the version.")
        if len(self.reason) > 300 or not self.reason.isprintable():
            raise UserError("--reason must be at most 300 characters in one line.")
