"""Train a small MaskFormer on drawn pictures, evaluate it and register it: the whole way in minutes on a laptop."""

from dataclasses import replace

from jobs.cli import parse, run
from jobs.training import TrainFlags, chosen_recipe
from pipelines.recipes import DEMO


def main() -> int:
    default = replace(DEMO, run=replace(DEMO.run, storage="runs"))
    flags = parse(TrainFlags, TrainFlags(training=chosen_recipe((default,))), __doc__)

    from pipelines.demo import ALIAS, MODEL_NAME, run_demo  # imports Ray, which --help should not

    report = run_demo(flags.training)
    if report.published is None:
        print(f"Stopped at step {report.training.step}; the same command goes on.")
        return 130
    rows = {
        "untrained model": report.untrained,
        "nearest-colour baseline": report.baseline,
        "trained model": report.published.evaluation.quality,
    }
    print(f"\n{'percent':<26}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'things':>9}{'stuff':>8}")
    for name, quality in rows.items():
        values = (quality.pq, quality.sq, quality.rq, quality.things.pq, quality.stuff.pq)
        print(f"{name:<26}" + "".join(f"{100 * v:>{w}.1f}" for v, w in zip(values, (7, 7, 7, 9, 8), strict=True)))
    for name, quality in report.published.evaluation.quality.per_class.items():
        print(f"  {name:<24}{100 * quality.pq:>7.1f}{100 * quality.sq:>7.1f}{100 * quality.rq:>7.1f}")
    print(f"\nrun folder      {report.training.folder}")
    print(f"predictions     {report.published.evaluation.output}")
    print(f"MLflow run      {report.published.mlflow_run_id}")
    print(f"model version   models:/{MODEL_NAME}@{ALIAS} is version {report.published.model_version}")
    print(f"look next       mlflow ui --backend-store-uri {report.published.tracking_uri}")
    print(f"PQ {100 * report.published.evaluation.quality.pq:.1f}")
    return 0


if __name__ == "__main__":
    run(main)
