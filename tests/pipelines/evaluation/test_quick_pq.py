"""Quick PQ on two ranks, which are threads here. The oracle is one rank that evaluates all images."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ray.exceptions import RayError

from maskformer import MaskFormer, PanopticQuality, Segmenter, build_model
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.data.pixels import decode_panoptic
from pipelines.errors import StorageUnavailableError
from pipelines.evaluation import quick_pq as module
from pipelines.evaluation.quick_pq import quick_pq

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(300)]


@pytest.fixture
def evaluated(tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, float] | None]]:
    def evaluate(samples: PackedSet, workers: int) -> list[dict[str, float] | None]:
        """Return what each rank returns; all of them must take part in one exchange."""
        barrier = threading.Barrier(workers)
        ranks: dict[int, int] = {}
        shared: list[Any] = [None] * workers

        def all_gather_object(parts: list[Any], part: Any) -> None:
            shared[ranks[threading.get_ident()]] = part
            barrier.wait(timeout=120)
            parts[:] = shared
            barrier.wait(timeout=120)

        def run(rank: int) -> dict[str, float] | None:
            ranks[threading.get_ident()] = rank
            return quick_pq(networks[rank], tiny, samples, rank, workers)

        monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
        networks: list[MaskFormer] = []
        for _ in range(workers):
            torch.manual_seed(0)
            networks.append(build_model(tiny.model).train())
        random_state = torch.get_rng_state()
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(run, range(workers)))
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(part.training for network in networks for part in network.modules())
        return results

    return evaluate


def partly_right(segment: Segmenter, row: dict[str, Any]) -> PanopticQuality:
    """Predict the ground truth of an image without its first segments, more of them the larger the image's id."""
    ids = decode_panoptic(row["panoptic"])
    found = [part for part in row["segments"] if not part["iscrowd"]][row["image_id"] % 3 :]
    quality = PanopticQuality(segment.taxonomy)
    predicted = np.where(np.isin(ids, [part["id"] for part in found]), ids, 0)
    quality.update((predicted, found), (ids, row["segments"]), row["image_id"])
    return quality


def test_every_rank_returns_the_pq_of_all_images(
    evaluated: Callable[..., list[dict[str, float] | None]], packs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score_row", partly_right)
    samples = open_pack(packs["val"])
    (expected,) = evaluated(samples, workers=1)
    assert expected is not None
    assert 0 < expected["quick_pq/all"] < 1
    first, second = evaluated(samples, workers=2)
    assert first == second == pytest.approx(expected)


def test_images_that_one_rank_cannot_read_end_it_on_all(
    evaluated: Callable[..., list[dict[str, float] | None]],
    tiny: TrainConfig,
    packs: dict[str, str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The damaged images are among those of rank 1 alone."""
    shutil.copytree(packs["val"], tmp_path / "copy")
    samples = open_pack(str(tmp_path / "copy"))
    images = samples.subset(tiny.evaluation.images)
    shard = Path(samples.shards[0])
    content = bytearray(shard.read_bytes())
    table = pq.read_table(shard)
    for index in range(1, len(images), 2):
        image = table["image"][int(images.row[index])].as_py()
        content[content.index(image) + len(image) // 2] ^= 1
    shard.write_bytes(content)
    assert evaluated(samples, workers=2) == [None, None]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert warning.startswith("The quick PQ is left out, training goes on. worker 1: Row ")
    assert f"{shard} is damaged" in warning


@pytest.mark.parametrize("error", [StorageUnavailableError("no answer"), RayError("a worker\ndied")])
def test_a_storage_that_is_away_ends_it_on_all(
    evaluated: Callable[..., list[dict[str, float] | None]],
    packs: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def unreadable(*args: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(module, "resized_images", unreadable)
    assert evaluated(open_pack(packs["val"]), workers=2) == [None, None]
    (warning,) = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert warning.endswith(f"worker 0: {' '.join(str(error).split())}")
