"""What many tests share: one Ray session, one small synthetic data set, one tiny configuration."""

from tests.shapes import enforce

enforce()  # before anything imports maskformer

import multiprocessing
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
import ray
from moto.server import ThreadedMotoServer

from jobs.bench.shared.faulty_server import FaultyServer
from pipelines.cluster.session import session
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.data.pack import PackConfig
from pipelines.data.synthetic import SyntheticConfig, draw_and_pack
from tests.browser import Browser, chromium

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# One server forks the processes of all tests. It imports once what they use, which counts as their
# memory and sets pyarrow's memory pool, and is started by whichever test is first.
multiprocessing.set_forkserver_preload(
    [
        "tests.security.checkpoint_attacks",
        "tests.security.hostile_use",
        "tests.pipelines.tracking.versions",
        "tests.pipelines.training.test_reduction",
    ]
)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a job in the background of a script
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[str]:
    """Start Ray on this machine once for all tests; return its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with session():
            yield ray.get_runtime_context().gcs_address


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Serve a real S3 API on loopback; return its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Point the environment at `s3_server` and return the URI of a new bucket."""
    for variable, value in {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(variable, value)
    name = f"bucket-{uuid.uuid4().hex}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def faulty_s3(s3_server: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """Put a server that can be told to fail between this test and the S3 server of `bucket`."""
    with FaultyServer(s3_server) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start Chromium once for all tests; skip them if it is not installed."""
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="session")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Draw and pack 80 training and 12 held-out images of ragged sizes."""
    folder = tmp_path_factory.mktemp("data")
    return {
        split: draw_and_pack(folder, SyntheticConfig(split=split, num_images=count), PackConfig(rows_per_shard=16))
        for split, count in (("train", 80), ("val", 12))
    }


@pytest.fixture(scope="session")
def tiny_in(packs: dict[str, str]) -> Callable[[Path], TrainConfig]:
    """Return a function that describes, for a storage folder, a run of 25 steps, ten an epoch.

    Two workers, accumulation, dropout, ragged micro-batches.
    """
    return lambda storage: replace(
        DEMO,
        model=replace(DEMO.model, hidden_dim=32, feedforward_dim=64, num_queries=8, decoder_layers=2, dropout=0.1),
        data=replace(DEMO.data, train=packs["train"], val=packs["val"], samples_per_task=8),
        run=replace(DEMO.run, name="run", storage=str(storage), steps=25, global_batch=8, micro_batch=2),
        checkpoint=replace(DEMO.checkpoint, every=5, keep=10),
        evaluation=replace(DEMO.evaluation, every=0, images=6),
        tracking=replace(DEMO.tracking, log_every=1),
    )


@pytest.fixture
def tiny(tiny_in: Callable[[Path], TrainConfig], tmp_path: Path) -> TrainConfig:
    """Describe the run of `tiny_in` in a folder of the test's own."""
    return tiny_in(tmp_path)
