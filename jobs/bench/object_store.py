"""Compare an epoch from a pack in an object store with one from loose files, through an S3 server on this machine.

python jobs/bench/object_store.py --input coco --split val2017

The server is moto's, in a process of its own. It copies the whole object for each range that is asked for, which takes
56 ms for a shard of 128 MB, so shards are small here. Its share is what requests for single bytes take.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jobs.bench.pack import repeat
from jobs.shared.cli import parse, run


@dataclass(frozen=True, kw_only=True)
class ObjectStore:
    """Compare an epoch from a pack in an object store with one from loose files."""

    input: str
    """The data set's folder, on this machine."""
    split: str
    """Name of the split, such as val2017."""
    images: int = 2000
    """Images of the epoch: those of the folder again and again, under new ids and names."""
    shard_megabytes: int = 8
    """MB of a shard."""


def main() -> None:
    flags = parse(ObjectStore, description=__doc__)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_EC2_METADATA_DISABLED="true")
    try:
        _compare(flags)
    finally:
        server.terminate()
        server.wait()


def _compare(flags: ObjectStore) -> None:
    import boto3  # --help should not import them
    import numpy as np
    import torch

    from pipelines.config.recipes import R50_MMDET
    from pipelines.data.augment import Sample, augment, sample_rng
    from pipelines.data.coco import CocoLayout, read_coco
    from pipelines.data.manifest import open_pack
    from pipelines.data.order import samples_at
    from pipelines.data.pack import PackConfig, pack
    from pipelines.data.pixels import decode_image, decode_panoptic, index_map, index_map_type
    from pipelines.data.reading import read_files
    from pipelines.data.tasks import LoadAndAugment
    from pipelines.storage import locate, set_patience

    torch.set_num_threads(1)
    set_patience(60)  # until the server listens
    with tempfile.TemporaryDirectory() as folder:
        repeat(CocoLayout.find(flags.input, flags.split), Path(folder) / "coco", flags.images)
        boto3.client("s3").create_bucket(Bucket="bench")
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            locate(f"s3://bench/{file.relative_to(folder)}").write_bytes(file.read_bytes())
        loose = read_coco(CocoLayout.find("s3://bench/coco", "all"))
        local = read_coco(CocoLayout.find(f"{folder}/coco", "all"))
        pack(local, "s3://bench/pack", PackConfig(shard_megabytes=flags.shard_megabytes), in_process=True)
    samples = open_pack("s3://bench/pack")
    positions = np.arange(flags.images)
    epochs, indices = samples_at(positions, flags.images, 0)
    entries, records = samples.index.take(indices).to_pylist(), loose.records.take(indices).to_pylist()
    layout, taxonomy, config = loose.layout, loose.classes.taxonomy, R50_MMDET.data.augment
    few = min(200, flags.images)

    def request() -> None:
        for entry in entries:
            locate(samples.shards[entry["shard"]]).read_range(0, 1)

    def ranges() -> None:
        for entry in entries:
            read_files(samples.shards[entry["shard"]], entry, "image", "index_map")

    def whole_shards() -> None:
        for shard in samples.shards:
            locate(shard).read_bytes()

    def files() -> None:
        for record in records:
            (layout.images / record["image_file"]).read_bytes()
            (layout.panoptic / record["panoptic_file"]).read_bytes()

    def augmented() -> None:
        LoadAndAugment(samples, 0, config, 60.0, False)(positions[:few], epochs[:few], indices[:few])

    def augmented_files() -> None:
        for record in records[:few]:
            image = decode_image((layout.images / record["image_file"]).read_bytes())
            ids = decode_panoptic((layout.panoptic / record["panoptic_file"]).read_bytes())
            plane, classes = index_map(ids, record["segments"], taxonomy)
            sample = Sample(image, plane.astype(index_map_type(len(classes))), classes)
            augment(sample, sample_rng(0, 0, record["image_id"]), config)

    request()  # opens the shards
    single, one, sequential, many = (
        1000 * _seconds(work) / flags.images for work in (request, ranges, whole_shards, files)
    )
    packed, unpacked = 1000 * _seconds(augmented) / few, 1000 * _seconds(augmented_files) / few
    rows = [
        (f"of {flags.images} images, milliseconds an image", ""),
        ("one byte of each image, the server's share", f"{single:7.2f}"),
        ("bytes, pack, in the order of training", f"{one:7.2f}"),
        ("bytes, pack, whole shards", f"{sequential:7.2f}"),
        ("bytes, loose files", f"{many:7.2f}   {many / one:.1f} and {many / sequential:.1f} times as long"),
        ("decoded and augmented, pack", f"{packed:7.2f}"),
        ("decoded and augmented, loose files", f"{unpacked:7.2f}   {unpacked / packed:.1f} times as long"),
    ]
    print("\n".join(f"{name:<48}{text}" for name, text in rows))


def _seconds(work: Callable[[], None]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


if __name__ == "__main__":
    run(main)
