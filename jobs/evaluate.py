"""Compute the PQ of a checkpoint on a packed data set, log it to MLflow, and register the model if asked to.

python jobs/evaluate.py --checkpoint runs/demo --data runs/demo-data/val
python jobs/evaluate.py --checkpoint runs/demo@best --data runs/demo-data/val
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from pipelines.config.publish import PublishConfig


@dataclass(frozen=True, kw_only=True)
class _Flags:
    publish: Annotated[PublishConfig, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


def main() -> None:
    flags = parse(_Flags, description=__doc__)
    with quiet(flags.verbose):
        from pipelines.evaluation.publish import publish  # imports Ray, which --help should not

        published = publish(flags.publish)
    quality = published.evaluation.quality
    print(f"\n{'percent':<26}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>9}")
    for name, group in (("all", quality.all), ("things", quality.things), ("stuff", quality.stuff)):
        print(f"{name:<26}{100 * group.pq:>7.1f}{100 * group.sq:>7.1f}{100 * group.rq:>7.1f}{group.num_classes:>9}")
    for name, values in quality.per_class.items():
        if values.tp + values.fp + values.fn:
            print(f"  {name:<24}{100 * values.pq:>7.1f}{100 * values.sq:>7.1f}{100 * values.rq:>7.1f}")
    print(f"\n{quality.num_images} images; predictions in {published.evaluation.output}")
    print(published.mlflow_run)
    if published.model_version:
        name, alias = flags.publish.register, flags.publish.alias
        print(f"registered as models:/{name}/{published.model_version}")
        newer = published.alias_version != published.model_version
        print(f"models:/{name}@{alias} {'stays at the newer' if newer else 'is'} version {published.alias_version}")


if __name__ == "__main__":
    run(main)
