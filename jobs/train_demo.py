"""Train a small MaskFormer on synthetic images, evaluate it and register it: every part, in minutes on a laptop."""

from dataclasses import replace

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from jobs.shared.training import TrainFlags, chosen_recipe
from pipelines.config.recipes import DEMO

_SHOWN = (
    "run.storage", "run.name", "run.steps", "run.seed", "tracking.uri", "checkpoint.every", "evaluation.every",
    "scaling.workers", "scaling.cpus_per_worker", "scaling.data_cpus", "scaling.threads", "verbose",
)  # fmt: skip


def main() -> int:
    default = replace(DEMO, run=replace(DEMO.run, storage="runs"))
    recipe = chosen_recipe({default.recipe: default})
    flags = parse(TrainFlags, TrainFlags(training=recipe), __doc__, _SHOWN, usage="[--SETTING VALUE ...]")
    with quiet(flags.verbose):
        from pipelines.demo.run import ALIAS, MODEL_NAME, run_demo  # imports Ray, which --help should not

        report = run_demo(flags.training)
    if report.published is None:
        print(f"stopped at step {report.training.step}; to resume: the same command")
        return 130
    rows = {
        "untrained model": report.untrained,
        "nearest-color baseline": report.baseline,
        "trained model": report.published.evaluation.quality,
    }
    print(f"\n{'percent':<26}{'PQ':>7}{'SQ':>7}{'RQ':>7}{'things':>9}{'stuff':>8}")
    for name, quality in rows.items():
        values = (quality.pq, quality.sq, quality.rq, quality.things.pq, quality.stuff.pq)
        print(f"{name:<26}" + "".join(f"{100 * v:>{w}.1f}" for v, w in zip(values, (7, 7, 7, 9, 8), strict=True)))
    for name, quality in report.published.evaluation.quality.per_class.items():
        print(f"  {name:<24}{100 * quality.pq:>7.1f}{100 * quality.sq:>7.1f}{100 * quality.rq:>7.1f}")
    mlflow_run = report.published.mlflow_run
    print()
    print_line(f"run folder      {report.training.folder}")
    print_line(f"report          {report.published.report}")
    print(f"MLflow run      {mlflow_run.run_id}")
    print(f"model version   models:/{MODEL_NAME}@{ALIAS} is version {report.published.model_version}")
    print_line(f"look next       the report in a browser; mlflow ui --backend-store-uri {mlflow_run.uri}")
    print(f"PQ {100 * report.published.evaluation.quality.pq:.1f}")
    return 0


if __name__ == "__main__":
    run(main)
