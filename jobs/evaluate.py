"""Compute the PQ of a checkpoint or of predictions, write a report, log it to MLflow, register the model if asked to.

python jobs/evaluate.py --checkpoint runs/demo@best --data runs/demo-data/val
python jobs/evaluate.py --checkpoint runs/demo --data runs/demo-data/val --compare runs/other
python jobs/evaluate.py --predictions results.json --data packed/val2017 --output scores
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from maskformer.untrusted import escaped
from pipelines.columns import left, width
from pipelines.config.publish import PublishConfig

if TYPE_CHECKING:
    from maskformer.analysis.bootstrap import Difference
    from pipelines.evaluation.publish import Reported
    from pipelines.evaluation.result import EvaluationResult


_LONGEST = 60
"""Characters of a class name in the table."""


@dataclass(frozen=True, kw_only=True)
class _Flags:
    publish: Annotated[PublishConfig, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


def main() -> int:
    flags = parse(_Flags, description=__doc__)
    with quiet(flags.verbose):
        from pipelines.evaluation.publish import publish, score  # imports Ray, which --help should not

        found = publish(flags.publish) if flags.publish.checkpoint else score(flags.publish)
    evaluation = found.evaluation
    lines = ["", *_table(evaluation)]
    if found.other and found.difference:
        lines += ["", _difference(found.difference, found.other.output)]
    lines += ["", f"{evaluation.quality.num_images} images; results in {evaluation.output}"]
    if found.report:
        lines.append(f"report: {found.report}")
    for line in [*lines, *_records(found, flags.publish)]:
        print_line(line)
    if found.check is None:
        return 0
    agrees = "agrees" if found.check.agrees else "DISAGREES"
    print(f"panopticapi {agrees}: PQ {100 * found.check.pq:.6f}, largest difference {found.check.difference:.1e}")
    return 0 if found.check.agrees else 1


def _table(evaluation: "EvaluationResult") -> list[str]:
    quality, intervals = evaluation.quality, evaluation.analysis.intervals
    classes = [
        (f"  {escaped(name, _LONGEST)}", values)
        for name, values in quality.per_class.items()
        if values.tp + values.fp + values.fn
    ]
    first = max([26, *(width(name) for name, _ in classes)])
    lines = [f"{'percent':<{first}}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>9}   95 % interval of PQ"]
    for name, group in (("all", quality.all), ("things", quality.things), ("stuff", quality.stuff)):
        span = f"   {100 * intervals[name].low:.1f} to {100 * intervals[name].high:.1f}" if name in intervals else ""
        lines.append(
            f"{name:<{first}}{_percent(group.pq)}{_percent(group.sq)}{_percent(group.rq)}{group.num_classes:>9}{span}"
        )
    for name, values in classes:
        lines.append(f"{left(name, first)}{_percent(values.pq)}{_percent(values.sq)}{_percent(values.rq)}")
    lost = {name.removeprefix("lost/"): value for name, value in evaluation.metrics.items() if name.startswith("lost/")}
    ranked = sorted(lost, key=lambda cause: -lost[cause])
    lines += ["", "lost: " + ", ".join(f"{cause.replace('_', ' ')} {100 * lost[cause]:.1f}" for cause in ranked)]
    return lines


def _percent(value: float) -> str:
    return f"{100 * value:>7.1f}"


def _difference(found: "Difference", other: str) -> str:
    return (
        f"{100 * found.value:+.2f} PQ against {other}: {100 * found.confidence:g} % interval "
        f"{100 * found.low:+.2f} to {100 * found.high:+.2f}, p = {found.p_value:.2g}"
    )


def _records(found: "Reported", config: PublishConfig) -> list[str]:
    """Say where the evaluation was logged, and what was registered."""
    from pipelines.evaluation.publish import Published

    if not isinstance(found, Published):
        return []
    lines = [str(found.mlflow_run)]
    if found.model_version:
        is_set = found.alias_version == found.model_version
        lines.append(f"registered as models:/{config.register}/{found.model_version}")
        lines.append(
            f"models:/{config.register}@{config.alias} {'is' if is_set else 'stays at'} version {found.alias_version}"
        )
    return lines


if __name__ == "__main__":
    run(main)
