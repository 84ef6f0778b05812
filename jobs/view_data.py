"""Look at the data: pictures with classes and outlines, in one HTML page and as PNGs.

python jobs/view_data.py --data packed/val2017 --output view

Without more, images as packed. With --augmented the first images as training sees them; with --step exactly those of
one training step, by worker. --recipe, or the --config of a run, and any setting of theirs say how it trains.
"""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobs.shared.cli import parse, run
from jobs.shared.streams import print_line
from jobs.shared.training import USAGE, TrainFlags, chosen_recipe, with_recipes
from pipelines.config.recipes import RECIPES
from pipelines.errors import UserError

if TYPE_CHECKING:
    from pipelines.data.augment_config import AugmentConfig
    from pipelines.data.manifest import PackedSet

_SHOWN = (
    "data", "output", "augmented", "images", "step", "recipe", "config", "run.seed", "run.epochs", "run.steps",
    "run.global_batch", "run.micro_batch", "scaling.workers", "data.require_thing", "data.augment.short_sides",
    "data.augment.long_side", "data.augment.crop_probability", "data.augment.crop_size",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Flags(TrainFlags):
    output: str = ""
    """A new or empty folder for the page and the PNGs: a path or an s3:// URI."""
    data: str = ""
    """Pack to look at: a path or an s3:// URI. Default: data.train of the file, or $MASKFORMER_TRAIN_DATA."""
    augmented: bool = False
    """Show images as training sees them: the first ones of its order."""
    images: int | None = None
    """Number of images. Default: 16."""
    step: int | None = None
    """Show exactly the images of this training step. Counted from 0, as in samples.jsonl and replay bundles."""

    def __post_init__(self) -> None:
        if self.images is not None and self.step is not None:
            raise ValueError("--step shows all images of the step: leave --images out.")


def main() -> None:
    flags = parse(
        _Flags,
        _Flags(training=chosen_recipe(RECIPES)),
        with_recipes(__doc__, RECIPES),
        shown=_SHOWN,
        usage=f"--output FOLDER [--data PACK] {USAGE}",
        required=("output",),
    )
    if not flags.output:
        raise UserError("The pictures need a folder. Give a new or empty one with --output.")

    from pipelines.config.resolve import or_environment  # imports pyarrow, which --help should not
    from pipelines.data import view
    from pipelines.data.manifest import open_pack
    from pipelines.data.order import total_steps
    from pipelines.progress import progress

    config = flags.training
    count = 16 if flags.images is None else flags.images
    view.require_drawable(count, f"--images {count}")
    uri = flags.data or or_environment("data.train", config.data.train)
    if not uri:
        raise UserError("There is no pack to look at. Give one, from jobs/prepare_data.py, with --data.")
    samples = open_pack(uri)
    facts = [("pack", samples.uri)]
    if not flags.augmented and flags.step is None:
        count = min(count, len(samples))
        facts.append(("shown", f"{count} of {len(samples):,} images as packed, evenly spaced"))
        images = view.view_packed(samples, count)
    else:
        if flags.step is not None and flags.config:
            _require_same_data(flags.config, samples)
        samples = samples.with_things() if config.data.require_thing else samples
        order = config.sample_order(samples)
        facts += [
            ("order", f"of {len(samples):,} images, seed {config.run.seed}"),
            ("augmentation", _described(config.data.augment)),
        ]
        if flags.step is None:
            parts = view.first_positions(count)
            facts.append(("shown", f"positions 0 to {count - 1}"))
        else:
            split = config.batch_split
            steps = config.run.steps or total_steps(config.run.epochs, len(samples), split.global_batch)
            parts = view.step_positions(order, flags.step, steps)
            count = split.global_batch
            facts.append(("shown", f"step {flags.step} (of 0 to {steps - 1:,}), a batch of {split}"))
        images = view.view_augmented(
            samples,
            order,
            parts,
            damaged=config.data.damaged,
        )
    title = "Images as packed" if flags.step is None and not flags.augmented else "Images as training sees them"
    written = view.write_view(
        progress(images, count, "images drawn"), count, samples.taxonomy, flags.output, title, facts
    )
    print_line(f"{len(written) - 1} images: {flags.output.rstrip('/')}/{written[-1]}")


def _require_same_data(config: str, samples: "PackedSet") -> None:
    """Refuse a pack other than the one that a run trains on, if `config` is the file of a run.

    Raises:
        UserError: its steps would have other images.
    """
    from pipelines.storage import locate  # imports pyarrow, which --help should not

    record = json.loads(locate(config).read_bytes())  # `chosen_recipe` has read it
    if record.get("data_hash", samples.data_hash) != samples.data_hash:
        raise UserError(
            f"{config} is of a run on another pack than {samples.uri} (the hashes of their manifests differ), so its "
            f"steps had other images. Give the pack of that run with --data, or leave --step out."
        )


def _described(config: "AugmentConfig") -> str:
    short, crops = config.short_sides, config.crop_size
    crop = f"crop to {crops[0]} to {crops[1]} pixels with probability {config.crop_probability:g}"
    return (
        f"flip with probability {config.flip_probability:g}, {crop if config.crop_probability else 'no crop'}, "
        f"short side {min(short)} to {max(short)}, long side at most {config.long_side}"
    )


if __name__ == "__main__":
    run(main)
