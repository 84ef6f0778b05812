"""Measure how many images of a COCO folder are checked and packed per second: by one CPU, and by all through Ray Data.

python jobs/bench/pack.py --input coco --split val2017
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.shared.cli import parse, run
from pipelines.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Measure how many images of a COCO folder are checked and packed per second."""

    input: str
    """The data set's folder, on this machine."""
    split: str
    """Name of the split, such as val2017."""
    images: int = 1000
    """Images to check and pack: those of the folder again and again, under new ids and names."""
    cpus: int = 2
    """CPUs for Ray."""


def main() -> None:
    flags = parse(Pack, description=__doc__)
    if flags.images < 128 or flags.cpus < 1:
        raise UserError("--images must be at least 128, and --cpus at least 1.")

    import ray  # --help should not import it

    from pipelines.data.check_tasks import CheckImages
    from pipelines.data.checks import CheckConfig
    from pipelines.data.coco import CocoLayout, read_coco
    from pipelines.data.pack import PackConfig, pack
    from pipelines.data.validate import validate

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repeat(CocoLayout.find(flags.input, flags.split), folder / "coco", flags.images)
        dataset = read_coco(CocoLayout.find(f"{folder}/coco", "all"))
        few = dataset.without(dataset.records["image_id"].to_pylist()[128:])
        layout = dataset.layout
        check = CheckImages(layout.images, layout.panoptic, dataset.taxonomy, CheckConfig(), layout.roots)
        config = PackConfig(shard_megabytes=16)  # so that each CPU has several
        single = {
            "check": _rate(len(few.records), lambda: check(few.records)),
            "pack": _rate(flags.images, lambda: pack(dataset, f"{folder}/one", config, in_process=True)),
        }
        ray.init(num_cpus=flags.cpus, dashboard_port=0, log_to_driver=False)
        try:
            validate(few, CheckConfig())  # starts the workers
            pack(few, f"{folder}/few", config)
            through = {
                "check": _rate(flags.images, lambda: validate(dataset, CheckConfig())),
                "pack": _rate(flags.images, lambda: pack(dataset, f"{folder}/ray", config)),
            }
        finally:
            ray.shutdown()
        equal = all(
            file.read_bytes() == (folder / "ray" / file.name).read_bytes() for file in (folder / "one").iterdir()
        )
    for name, rate in through.items():
        share = rate / single[name] / flags.cpus
        print(
            f"{name:<6}one CPU {single[name]:6.1f} images/s, {flags.cpus} CPUs through Ray Data {rate:6.1f}: "
            f"{share:.0%} of {flags.cpus} times one CPU"
        )
    print(f"The packs of one CPU and of Ray Data are {'equal' if equal else 'NOT EQUAL'}, byte for byte.")


def _rate(images: int, work: Callable[[], Any]) -> float:
    since = time.perf_counter()
    work()
    return images / (time.perf_counter() - since)


def repeat(layout: Any, target: Path, images: int) -> None:
    """Write a COCO folder with the images of another again and again. Its files are links, where possible."""
    document = json.loads(layout.annotations.read_bytes())
    of_image = {entry["id"]: entry for entry in document["images"]}
    annotations = document["annotations"]
    document["images"], document["annotations"] = [], []
    pngs = target / "annotations" / "panoptic_all"
    for folder in (target / "all", pngs):
        folder.mkdir(parents=True)
    for number in range(images):
        annotation = annotations[number % len(annotations)]
        image = of_image[annotation["image_id"]]
        new = f"{number:012d}"
        suffix = Path(image["file_name"]).suffix
        _link(f"{layout.images.path}/{image['file_name']}", target / "all" / f"{new}{suffix}")
        _link(
            f"{layout.panoptic.path}/{annotation['file_name']}", target / "annotations" / "panoptic_all" / f"{new}.png"
        )
        document["images"].append({**image, "id": number, "file_name": f"{new}{suffix}"})
        document["annotations"].append({**annotation, "image_id": number, "file_name": f"{new}.png"})
    (target / "annotations" / "panoptic_all.json").write_text(json.dumps(document))


def _link(file: str, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:  # another file system
        shutil.copyfile(file, name)


if __name__ == "__main__":
    run(main)
