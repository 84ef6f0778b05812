"""Segment pictures or videos with a trained model: overlays, panoptic PNGs and COCO's results.

python jobs/predict.py --checkpoint runs/demo --output out photos/ "more/*.png" clip.mp4
python jobs/predict.py --checkpoint s3://bucket/runs/r50 --output s3://bucket/out s3://bucket/photos @list.txt

The same command continues after what is finished. Up to 8 local pictures are segmented without Ray.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from jobs.shared.cli import parse, run
from jobs.shared.console import quiet
from jobs.shared.streams import print_line
from pipelines.config.predict import PredictConfig

_LISTED = 10
"""Failed pictures that are printed; failed.json has all."""


@dataclass(frozen=True, kw_only=True)
class _Flags:
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT")] = ()
    """Files, folders (searched recursively), globs, s3:// prefixes, videos, or @FILE with a path in each line."""
    predict: Annotated[PredictConfig, tyro.conf.arg(name="")]
    verbose: bool = False
    """Show the output of Ray and MLflow instead of writing it to a log file."""


def main() -> int:
    flags = parse(
        _Flags, description=__doc__, usage="--checkpoint MODEL --output FOLDER INPUT ... [--SETTING VALUE ...]"
    )
    config = replace(flags.predict, input=(*flags.inputs, *flags.predict.input))
    with quiet(flags.verbose):
        from pipelines.inference import predict  # imports torch, which --help should not

        result = predict(config)
    before = f", {result.before} finished before" if result.before else ""
    print_line(f"{result.done} segmented{before}, {len(result.failed)} failed: {result.output}")
    for failure in result.failed[:_LISTED]:
        print_line(f"  {failure['reason']}")
    if len(result.failed) > _LISTED:
        print_line(f"  and {len(result.failed) - _LISTED} more in {result.output}/failed.json")
    return 1 if result.failed else 0


if __name__ == "__main__":
    run(main)
