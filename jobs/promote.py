"""Set an alias of a registered model to a version whose PQ is better than that of the version it names now.

python jobs/promote.py --model maskformer-r50 --version 7 --dry-run
python jobs/promote.py --model maskformer-r50 --version 7 --alias champion
python jobs/promote.py --model maskformer-r50 --rollback
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from pipelines.config.promote import PromoteConfig

if TYPE_CHECKING:
    from pipelines.tracking.gate import Decision


@dataclass(frozen=True, kw_only=True)
class _Flags:
    promote: Annotated[PromoteConfig, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show the output of MLflow instead of writing it to a log file."""


def main() -> int:
    flags = parse(_Flags, description=__doc__)
    config = flags.promote
    with quiet(flags.verbose):
        from pipelines.config.resolve import registry_uri
        from pipelines.tracking.gate import promote  # imports MLflow, which --help should not

        decision = promote(registry_uri(config.tracking.uri), config)
    for line in _numbers(decision):
        print_line(line)
    print_line(_outcome(decision, config))
    return 1 if decision.action == "refused" else 0


def _numbers(decision: "Decision") -> list[str]:
    lines = []
    if decision.obstacle:
        lines.append(f"not compared: {decision.obstacle}")
    if decision.evaluation:
        lines.append(f"data set   {decision.evaluation.data_name}, hash {decision.evaluation.digest}")
        lines.append(f"version {decision.version:<10} PQ {100 * decision.evaluation.pq:6.2f}")
    if decision.before:
        lines.append(f"version {decision.previous:<10} PQ {100 * decision.before.pq:6.2f}")
    if difference := decision.difference:
        lines.append(
            f"difference         {100 * difference.value:+6.2f}, {100 * difference.confidence:g} % interval "
            f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}, p = {difference.p_value:.2g}, "
            f"{difference.images} images"
        )
    return lines


def _outcome(decision: "Decision", config: PromoteConfig) -> str:
    name, version, previous = f"{config.model}@{config.alias}", decision.version, decision.previous
    if decision.action == "unchanged":
        return f"{name} is version {version} already."
    if decision.action == "refused":
        return (
            f"{name} stays at version {previous}: version {version} is not better beyond chance, since the interval of "
            f"the difference reaches 0 or below."
        )
    why = {
        "first": "the first one, compared with nothing",
        "better": f"better than version {previous}",
        "forced": f"forced, was {f'version {previous}' if previous else 'not set'}",
        "rollback": f"back from version {previous}",
    }[decision.action]
    return f"{name} {'would become' if config.dry_run else 'is now'} version {version}: {why}."


if __name__ == "__main__":
    run(main)
