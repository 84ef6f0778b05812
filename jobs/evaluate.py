"""Compute the PQ of a checkpoint over a packed data set, log it to MLflow, and register the model if asked to."""

from jobs.cli import parse, run
from pipelines.config import PublishConfig


def main() -> None:
    config = parse(PublishConfig, description=__doc__)

    from pipelines.publish import publish  # imports Ray, which --help should not

    published = publish(config)
    quality = published.evaluation.quality
    print(f"\n{'percent':<26}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'classes':>9}")
    for name, group in (("all", quality.all), ("things", quality.things), ("stuff", quality.stuff)):
        print(f"{name:<26}{100 * group.pq:>7.1f}{100 * group.sq:>7.1f}{100 * group.rq:>7.1f}{group.num_classes:>9}")
    for name, values in quality.per_class.items():
        if values.tp + values.fp + values.fn:
            print(f"  {name:<24}{100 * values.pq:>7.1f}{100 * values.sq:>7.1f}{100 * values.rq:>7.1f}")
    print(f"\n{quality.num_images} images; predictions in {published.evaluation.output}")
    print(f"MLflow run {published.mlflow_run_id} at {published.tracking_uri}")
    if published.model_version:
        print(f"registered as models:/{config.register}@{config.alias}, version {published.model_version}")


if __name__ == "__main__":
    run(main)
