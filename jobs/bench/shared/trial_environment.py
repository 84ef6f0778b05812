"""Where the runs of jobs/bench/chaos.py live: a simulated cluster, S3, MLflow, and a small configuration."""

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.shared.faulty_server import FaultyServer
from pipelines.cluster.simulated import Node, SimulatedCluster, simulated
from pipelines.config.recipes import DEMO
from pipelines.config.train import TrainConfig
from pipelines.data.pack import PackConfig
from pipelines.data.synthetic import SyntheticConfig, draw_and_pack
from pipelines.storage import locate, set_patience

STEPS, EVERY, IMAGES, GLOBAL, MICRO = 24, 4, 48, 8, 2
TRIAL_SECONDS = 400.0
_POLL = 0.002


@dataclass
class Servers:
    """The servers that runs use: S3 behind a proxy, and MLflow."""

    storage: FaultyServer
    bucket: str
    mlflow: FaultyServer
    mlflow_uri: str


@contextmanager
def trial_environment() -> Iterator[tuple[SimulatedCluster, Servers]]:
    """Start S3, MLflow and a simulated cluster of two nodes for workers and one for data tasks."""
    from moto.server import ThreadedMotoServer

    with ExitStack() as stack:
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        stack.callback(moto.stop)
        host, port = moto.get_host_and_port()
        storage = stack.enter_context(FaultyServer(f"http://{host}:{port}"))
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        environment = {
            "AWS_ENDPOINT_URL": storage.url,
            "AWS_ACCESS_KEY_ID": "chaos",
            "AWS_SECRET_ACCESS_KEY": "chaos",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        os.environ.update(environment)
        import boto3

        boto3.client("s3").create_bucket(Bucket="chaos")
        set_patience(300)
        mlflow = stack.enter_context(mlflow_server())
        cluster = stack.enter_context(simulated([Node(1)], environment, dashboard=True))
        cluster.nodes = [cluster.add(Node(1)) for _ in range(2)]  # pyright: ignore[reportAttributeAccessIssue]
        yield cluster, Servers(storage, "s3://chaos", mlflow, mlflow.url)


@contextmanager
def mlflow_server() -> Iterator[FaultyServer]:
    import socket
    import urllib.request

    with tempfile.TemporaryDirectory(prefix="mlflow-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        command = [
            sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination", folder, "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:

            def answers() -> bool:
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                    return True
                return False

            wait(answers, "the MLflow server", poll=0.5)
            with FaultyServer(f"http://127.0.0.1:{port}") as proxy:
                yield proxy
        finally:
            for child in [*psutil.Process(process.pid).children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            process.wait()


def base_config(folder: Path) -> TrainConfig:
    """Draw a data set in `folder`; return the configuration that the trials vary."""
    packs = {
        split: draw_and_pack(folder, SyntheticConfig(split=split, num_images=count, max_side=64), PackConfig())
        for split, count in (("train", IMAGES), ("val", 4))
    }
    return replace(
        DEMO,
        model=replace(DEMO.model, hidden_dim=32, feedforward_dim=64, num_queries=8, decoder_layers=2, dropout=0.1),
        data=replace(DEMO.data, train=packs["train"], val=packs["val"], samples_per_task=16),
        run=replace(
            DEMO.run, name="reference", storage=str(folder / "runs"), steps=STEPS, global_batch=GLOBAL,
            micro_batch=MICRO, sample_log=True,
        ),
        scaling=replace(DEMO.scaling, cpus_per_worker=0.5, data_cpus=1, hang_timeout=8, storage_patience=300),
        checkpoint=replace(DEMO.checkpoint, every=EVERY, keep=3),
        evaluation=replace(DEMO.evaluation, every=2 * EVERY, images=4),
        tracking=replace(DEMO.tracking, log_every=1, uri=f"sqlite:///{folder}/mlflow.db"),
    )  # fmt: skip


def remote_data(base: TrainConfig, servers: Servers) -> Any:
    """Return the data settings for the same packs on S3; the packs are copied there once."""
    remote = {}
    for split in ("train", "val"):
        source, target = Path(getattr(base.data, split)), locate(f"{servers.bucket}/{split}")
        if not (target / "manifest.json").exists():
            for file in sorted(source.iterdir(), key=lambda file: file.name == "manifest.json"):
                (target / file.name).write_bytes(file.read_bytes())
        remote[split] = f"{servers.bucket}/{split}"
    return replace(base.data, **remote)


def wait(condition: Callable[[], Any], what: str, seconds: float = TRIAL_SECONDS, poll: float = _POLL) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"There is no {what} within {seconds:.0f} s.")
        time.sleep(poll)
    return found
