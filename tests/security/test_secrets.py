"""A server of a stranger sees no credential, whatever a job is given, and no file of a run has one."""

import base64
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from jobs.shared import console
from jobs.shared.cli import run
from maskformer import Taxonomy
from pipelines.config.recipes import DEMO, R50_MMDET
from pipelines.config.serialize import VERSION, to_dict
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.tracking.runs import TrackedRun
from tests.checkpoints import saved
from tests.jobs.command_line import flags
from tests.pipelines.data.coco_folder import SPLIT, edit_json, write_coco_folder
from tests.pipelines.tracking.versions import evaluated_version
from tests.pipelines.training import test_replay
from tests.security.planted import Planted

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[2]
SECRETS = {
    "MLFLOW_TRACKING_PASSWORD": "mlflow/password+1",
    "MLFLOW_TRACKING_TOKEN": "mlflow-token-2345",
    "AWS_SECRET_ACCESS_KEY": "aws/secret+key+3456",
    "AWS_SESSION_TOKEN": "aws-session-token-4567",
    "RAY_AUTH_TOKEN": "ray-auth-token-5678" * 3,
}
NAMES = {"MLFLOW_TRACKING_USERNAME": "mlflow-user-of-mine", "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7MINE"}
BASIC = base64.b64encode(f"{NAMES['MLFLOW_TRACKING_USERNAME']}:{SECRETS['MLFLOW_TRACKING_PASSWORD']}".encode()).decode()
FORMS = [*SECRETS.values(), *(json.dumps(value)[1:-1] for value in SECRETS.values()), BASIC]
JOBS = sorted(file.stem for file in (ROOT / "jobs").glob("*.py") if file.stem != "__init__")


@dataclass(frozen=True)
class Answer:
    """How a job ended, and all that it wrote to the terminal and to its log."""

    status: int
    text: str


Job = Callable[..., Answer]


@pytest.fixture
def stranger() -> Iterator[Planted]:
    with Planted() as server:
        yield server
        assert not server.received, [received.text for received in server.received]


@pytest.fixture
def own() -> Iterator[Planted]:
    """Stand in for this user's object store."""
    with Planted() as server:
        yield server


@pytest.fixture
def credentials(own: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set all credentials in the environment, and no address but that of the object store."""
    for name in ("MLFLOW_TRACKING_URI", "MASKFORMER_TRAIN_DATA", "MASKFORMER_VAL_DATA", "MASKFORMER_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**SECRETS, **NAMES, "AWS_ENDPOINT_URL": own.url, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def job(credentials: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Job:
    """Return a function that runs a job in this process; none of what it writes may have a secret."""

    def call(name: str, *arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        logs = len(console.log_files)
        with pytest.raises(SystemExit) as end:
            run(import_module(f"jobs.{name}").main)
        text = "".join(capfd.readouterr()) + "".join(log.read_text() for log in console.log_files[logs:])
        require_no_secret(text)

        return Answer(int(end.value.code or 0), text)

    return call


def require_no_secret(text: str) -> None:
    found = [form for form in FORMS if form in text]
    assert not found, text


def require_no_secret_in(folder: Path) -> None:
    """Look into each file, also that of a database."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    for file in files:
        content = file.read_bytes()
        assert not [form for form in FORMS if form.encode() in content], file


def hostile(config: TrainConfig, stranger: Planted) -> TrainConfig:
    """Return the configuration with the addresses of a stranger, wherever it has any."""
    return replace(
        config,
        weights="s3://stranger/weights",
        data=replace(config.data, train="s3://stranger/train", val="s3://stranger/val"),
        run=replace(config.run, storage="s3://stranger/runs"),
        tracking=replace(config.tracking, uri=stranger.url),
    )


@pytest.fixture
def checkpoint(tiny: TrainConfig, stranger: Planted, tmp_path: Path) -> Path:
    """Write the folder of a run that a stranger made."""
    folder = tmp_path / "theirs" / "run"
    config = hostile(tiny, stranger)
    saved(config, Taxonomy.from_coco(CATEGORIES), folder)
    record = {"version": VERSION, "config": to_dict(config), "data_hash": "0", "total_steps": 25, "mlflow_run_id": "1"}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "ledger.jsonl").write_text('{"event": "start", "time": 1.0, "attempt": 1, "workers": 1, "step": 0}\n')
    (folder / "status.json").write_text(json.dumps({"time": 2.0, "began": 1.0, "step": 3, "tracking": stranger.url}))
    return folder


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database without runs: MLflow takes seconds to make one, and a copy takes none."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def database(empty_database: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(empty_database, tmp_path / "mlflow.db"))


def set_everywhere(database: Path, column: str, value: str, *tables: str) -> None:
    with closing(sqlite3.connect(database)) as connection:
        for table in tables:
            connection.execute(f"UPDATE {table} SET {column} = ?", (value,))
        connection.commit()


def draw(folder: Path) -> str:
    folder.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)).save(folder / "0.png")
    return str(folder)


# ---- a checkpoint's own addresses


def test_predict_and_convert_use_nothing_that_a_checkpoint_names(
    job: Job, checkpoint: Path, own: Planted, tmp_path: Path
) -> None:
    pictures = draw(tmp_path / "in")
    assert job("predict", "--checkpoint", checkpoint, "--output", tmp_path / "out", pictures).status == 0
    output = str(tmp_path / "new.safetensors")
    assert job("convert_weights", "--input", checkpoint, "--output", output, "--to", "native").status == 0
    assert not own.received
    require_no_secret_in(tmp_path / "out")


@pytest.mark.ray
def test_an_evaluation_uses_nothing_that_a_checkpoint_names(
    job: Job,
    checkpoint: Path,
    database: Path,
    packs: dict[str, str],
    ray_session: str,
    own: Planted,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    shutil.move(database, checkpoint.parent / "mlflow.db")
    data = ("--data", packs["val"], "--scaling.device", "cpu", "--report-images", "0")
    answer = job("evaluate", "--checkpoint", checkpoint, *data, "--register", "theirs")
    assert answer.status == 0, answer.text
    assert "--tracking.uri or $MLFLOW_TRACKING_URI chooses another place" in caplog.text
    assert not own.received
    require_no_secret_in(checkpoint.parent)


def test_status_contacts_nothing(job: Job, checkpoint: Path, stranger: Planted, own: Planted) -> None:
    answer = job("status", "--run", checkpoint)
    assert (answer.status, stranger.url in answer.text) == (0, True)
    assert job("status", "--run", checkpoint.parent, "--json").status == 0
    assert not own.received


def test_a_replay_contacts_nothing(job: Job, stranger: Planted, own: Planted, tmp_path: Path) -> None:
    config = hostile(test_replay.CONFIG, stranger)
    bundle = test_replay.write(tmp_path / "replay", test_replay.new_network(), config)
    assert job("replay", "--bundle", bundle).status == 0
    assert not own.received


# ---- files of settings


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("train_r50", ()),
        ("train_swin_l", ()),
        ("train_demo", ()),
        ("sweep", ("--sweep.space", "optimizer.lr=1e-4,1e-3")),
        ("plan", ()),
        ("view_data", ("--output", "view")),
    ],
)
def test_the_addresses_of_a_file_are_not_used_unasked(
    name: str, more: tuple[str, ...], job: Job, tiny: TrainConfig, stranger: Planted, own: Planted, tmp_path: Path
) -> None:
    recipe = {"train_r50": "r50_mmdet", "train_swin_l": "swin_l_mmdet"}.get(name, "demo")
    config = to_dict(hostile(replace(tiny, recipe=recipe), stranger))
    for content in (config, {"version": VERSION, "config": config, "data_hash": "0"}):
        (tmp_path / "theirs.json").write_text(json.dumps(content))
        answer = job(name, "--config", tmp_path / "theirs.json", *more)
        assert answer.status == 2
        assert (
            "theirs.json names addresses on the network, which are not used unasked. To use them, add: " in answer.text
        )
        for setting, value in (("tracking.uri", stranger.url), ("run.storage", "s3://stranger/runs")):
            assert f"--{setting} {value}" in answer.text
    assert not own.received


def test_an_address_of_a_file_is_used_if_asked_for(
    job: Job, own: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"data.train": "s3://mine/train", "run.storage": "/runs", "run.steps": 5}))
    arguments = ("train_r50", "--config", file, "--scaling.device", "cpu")
    assert "add: --data.train s3://mine/train" in job(*arguments).text
    assert not own.received
    job(*arguments, "--data.train", "s3://mine/train")
    assert f"From {file}: run.storage /runs." in caplog.text
    assert "/mine/train" in own.received[-1].line
    own.received.clear()
    monkeypatch.setenv("MASKFORMER_TRAIN_DATA", "s3://mine/train/")
    job(*arguments)
    assert "/mine/train" in own.received[-1].line


# ---- results, packs and data sets


def test_a_sweep_of_a_stranger_does_not_move_its_trials(
    job: Job, tiny: TrainConfig, stranger: Planted, database: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    config = replace(
        tiny,
        run=replace(tiny.run, name="theirs", storage=str(tmp_path), steps=10),
        evaluation=replace(tiny.evaluation, every=5),
        tracking=replace(tiny.tracking, uri=f"sqlite:///{database}"),
    )
    values = {"optimizer.lr": 1e-3, "tracking.uri": stranger.url}
    folder.mkdir()
    sweep = {"space": ["optimizer.lr=0.001,0.002"], "trials": 1, "grace_period": None, "reduction_factor": 3}
    record = {
        "version": VERSION,
        "config": to_dict(replace(config, recipe="demo")),
        "sweep": sweep,
        "data_hash": open_pack(tiny.data.train).data_hash,
        "mlflow_run_id": "1",
    }
    (folder / "sweep.json").write_text(json.dumps(record))
    trial = {"name": "trial-000", "values": values, "status": "waiting", "results": [], "cause": ""}
    (folder / "trials.json").write_text(json.dumps([trial]))
    arguments = flags(config, DEMO)
    space = ("--sweep.space", "optimizer.lr=0.001,0.002", "--sweep.trials", "1")
    answer = job("sweep", "--recipe", "demo", *arguments, *space)
    assert answer.status == 2
    assert "trials.json gives trial-000 values of tracking.uri, which no sweep varies" in answer.text


def test_predictions_elsewhere_are_not_opened(
    job: Job, checkpoint: Path, packs: dict[str, str], own: Planted, tmp_path: Path
) -> None:
    theirs = tmp_path / "evaluation"
    theirs.mkdir()
    (theirs / "images.jsonl").write_text("")
    summary = {"data_hash": open_pack(packs["val"]).data_hash, "predictions": "s3://stranger/predictions"}
    (theirs / "metrics.json").write_text(json.dumps(summary))
    answer = job("evaluate", "--checkpoint", checkpoint, "--data", packs["val"], "--compare", theirs)
    assert answer.status == 2
    assert "names s3://stranger/predictions as its predictions, another place" in answer.text
    assert not own.received


@pytest.mark.parametrize("shard", ["http://{}/shard", "s3://stranger/shard", "hdfs://{}/shard"])
def test_a_pack_with_shards_elsewhere(
    shard: str, job: Job, packs: dict[str, str], stranger: Planted, own: Planted, tmp_path: Path
) -> None:
    pack = Path(shutil.copytree(packs["val"], tmp_path / "pack"))
    manifest = json.loads((pack / "manifest.json").read_text())
    for each in manifest["shards"]:
        each["file"] = shard.format(stranger.address)
    (pack / "manifest.json").write_text(json.dumps(manifest))
    assert job("view_data", "--data", pack, "--output", tmp_path / "view").status == 2
    assert not own.received


@pytest.mark.ray
def test_a_data_set_with_images_elsewhere(
    job: Job, stranger: Planted, own: Planted, ray_session: str, tmp_path: Path
) -> None:
    def change(document: dict[str, Any]) -> None:
        for number, image in enumerate(document["images"]):
            address = ("s3://stranger/x.jpg", f"{stranger.url}/x.jpg")[number % 2]
            image.update(file_name=address, coco_url=address, flickr_url=address)

    write_coco_folder(tmp_path / "coco")
    edit_json(tmp_path / "coco", change)
    assert job("prepare_data", "--input", tmp_path / "coco", "--split", SPLIT, "--check").status in (1, 2)
    assert not own.received


# ---- registries and servers


def test_a_registry_does_not_send_predict_to_another_host(
    job: Job, database: Path, stranger: Planted, tmp_path: Path
) -> None:
    uri = f"sqlite:///{database}"
    evaluated_version(uri, "theirs", 10)
    set_everywhere(database, "artifact_location", f"{stranger.url}/a", "logged_models")
    set_everywhere(database, "storage_location", f"{stranger.url}/a", "model_versions")
    arguments = ("--checkpoint", "models:/theirs/1", "--tracking.uri", uri, "--output", tmp_path / "out")
    answer = job("predict", *arguments, draw(tmp_path / "in"))
    assert (answer.status, "another host. It is not contacted" in answer.text) == (2, True), answer.text


def test_a_registry_does_not_send_promote_to_another_host(job: Job, database: Path, stranger: Planted) -> None:
    uri = f"sqlite:///{database}"
    versions = [evaluated_version(uri, "theirs", good) for good in (10, 40)]
    assert job("promote", "--model", "theirs", "--version", versions[0], "--tracking.uri", uri).status == 0
    set_everywhere(database, "artifact_uri", f"{stranger.url}/a", "runs")
    answer = job("promote", "--model", "theirs", "--version", versions[1], "--tracking.uri", uri)
    assert (answer.status, "another host. It is not contacted" in answer.text) == (2, True), answer.text


def test_a_database_beside_a_checkpoint_does_not_send_its_files_to_another_host(
    job: Job, checkpoint: Path, database: Path, stranger: Planted, packs: dict[str, str]
) -> None:
    MlflowClient(f"sqlite:///{database}").create_experiment("maskformer-demo", artifact_location=f"{stranger.url}/a")
    shutil.move(database, checkpoint.parent / "mlflow.db")
    answer = job("evaluate", "--checkpoint", checkpoint, "--data", packs["val"])
    assert (answer.status, "which is not in its folder. Nothing is written there" in answer.text) == (2, True), (
        answer.text
    )


@pytest.mark.parametrize("answered", [(), ("/health",), ("/health", "/api/2.0/mlflow/experiments")])
def test_mlflow_follows_no_redirect(
    answered: tuple[str, ...], credentials: None, stranger: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with Planted(redirect=stranger.url, answered=answered) as mine:
        # What is answered is /health, and then the search for the experiment.
        with pytest.raises(UserError, match="MLflow at" if answered else "redirect") as refusal:
            TrackedRun.open(mine.url, "experiment", "run", "/runs/run", {})
        assert mine.received
    require_no_secret(str(refusal.value))


def test_a_bucket_follows_no_redirect(credentials: None, stranger: Planted, own: Planted) -> None:
    own.redirect = stranger.url
    for use in (lambda at: at.read_bytes(), lambda at: at.names(), lambda at: at.write_bytes(b"mine")):
        with pytest.raises(UserError, match=f"redirect to {stranger.url}"):
            use(locate("s3://mine/file"))
    assert {received.headers.get("Authorization") for received in own.received} == {None}


@pytest.mark.parametrize("answered", [(), ("/api/version",), ("/api/version", "/api/packages")])
def test_submit_follows_no_redirect(answered: tuple[str, ...], stranger: Planted, tmp_path: Path) -> None:
    for name in ("jobs/train_r50.py", "maskformer/x.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **SECRETS, **NAMES}
    with Planted(redirect=stranger.url, answered=answered) as mine:
        command = [
            sys.executable,
            str(ROOT / "jobs/submit.py"),
            "--address",
            mine.url,
            "--",
            "python",
            "jobs/train_r50.py",
        ]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, "RAY_AUTH_MODE": "token"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert any(
            SECRETS["RAY_AUTH_TOKEN"] in received.text for received in mine.received
        )  # so it would be sent along
    assert done.returncode == 2, done.stderr
    assert f"redirect to {stranger.url}" in done.stderr
    require_no_secret(done.stdout + done.stderr)


# ---- what is stored


def test_what_a_server_receives_of_a_run_has_no_secret(
    credentials: None, tiny: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = to_dict(replace(tiny, weights=f"s3://A:{SECRETS['AWS_SECRET_ACCESS_KEY']}@bucket/weights"))
    with Planted() as mine:
        tracked = TrackedRun.open(mine.url, "experiment", "run", "/runs/run", config)
        tracked.close("FAILED", {"cause": f"no answer with {SECRETS['MLFLOW_TRACKING_PASSWORD']}"})
        assert any(BASIC in received.headers.get("Authorization", "") for received in mine.received)
        sent = b"".join(received.body for received in mine.received).decode()
    assert "s3://bucket/weights" in sent
    assert "no answer with [$MLFLOW_TRACKING_PASSWORD]" in sent
    require_no_secret(sent)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_leaves_no_secret(job: Job, tiny: TrainConfig, database: Path, ray_session: str, tmp_path: Path) -> None:
    config = replace(tiny, run=replace(tiny.run, steps=2), tracking=replace(tiny.tracking, uri=f"sqlite:///{database}"))
    assert job("train_r50", *flags(config, R50_MMDET)).status == 0
    assert (tmp_path / "run" / "ledger.jsonl").exists()
    require_no_secret_in(tmp_path)


def test_every_job_is_here() -> None:
    """Each job is called above by its name; `submit` in a process of its own."""
    text = Path(__file__).read_text()
    assert not [name for name in JOBS if f'"{name}"' not in text and f"jobs/{name}.py" not in text]
