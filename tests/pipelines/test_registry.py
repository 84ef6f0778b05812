"""The registry: a version that loads and segments where nothing of this checkout is, from a file and from a server."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient
from PIL import Image

from maskformer import PanopticConfig, Segmenter, build_model
from maskformer.postprocess import decode_ids
from pipelines import checkpoint, registry, tracking
from pipelines.checkpoint import SavedModel, TrainingState
from pipelines.config import PublishConfig, TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.publish import publish
from pipelines.storage import locate

pytestmark = pytest.mark.timeout(400)

ROOT, NAME, ALIAS = Path(__file__).parents[2], "shapes", "candidate"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run an MLflow server that hands out artifacts itself; return its address."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    places = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    # In a session of its own, so that its children end with it.
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes that nobody needs
    process = subprocess.Popen([*command, *places], cwd=folder, env=environment, start_new_session=True)
    uri = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(uri, process)
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _wait_until_healthy(uri: str, process: subprocess.Popen[bytes], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"the MLflow server did not start within {seconds} s (exit status {process.poll()})")


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db" if request.param == "sqlite" else request.getfixturevalue("server")


@dataclass(frozen=True)
class Picture:
    file: Path
    pixels: np.ndarray


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Picture:
    folder = tmp_path_factory.mktemp("picture")
    draw_dataset(folder, SyntheticConfig(split="test", num_images=1))
    (file,) = (folder / "test").iterdir()
    return Picture(file, np.array(Image.open(file).convert("RGB")))


def saved_model(tiny: TrainConfig, packs: dict[str, str], seed: int, step: int) -> SavedModel:
    torch.manual_seed(seed)
    config = replace(tiny, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.25))
    weights = build_model(config.model).state_dict()
    weights["mask_head.4.weight"] *= 10  # bold masks, so that there are several segments
    return SavedModel(f"/runs/run/checkpoints/step_{step:08d}", step, weights, config, open_pack(packs["val"]).taxonomy)


def segmented(saved: SavedModel, image: np.ndarray) -> tuple[np.ndarray, list[dict[str, object]]]:
    model = build_model(saved.config.model)
    model.load_state_dict(saved.weights)
    shown = saved.config.evaluation
    segment = Segmenter(
        model, saved.taxonomy, saved.config.panoptic, short_side=shown.short_side, long_side=shown.long_side
    )
    return segment(image)


ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path

# Without the finder of the editable install this is a machine that never saw the checkout.
sys.meta_path = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
sys.path = [entry for entry in sys.path if "__editable__" not in entry]
for name in ("ray", "pipelines", "jobs"):
    sys.modules[name] = None
assert importlib.util.find_spec("maskformer") is None

import mlflow.pyfunc
import pandas as pd

uri, model, image, output = sys.argv[1:]
mlflow.set_tracking_uri(uri)
loaded = mlflow.pyfunc.load_model(model)
result = loaded.predict(pd.DataFrame({"image": [Path(image).read_bytes()]}))
import maskformer
Path(output, "segments.json").write_text(result["segments_info"][0])
Path(output, "ids.png").write_bytes(result["png"][0])
print(json.dumps(maskformer.__file__))
"""


def assert_loads_elsewhere(uri: str, saved: SavedModel, picture: Picture, folder: Path) -> None:
    """Load the model by its alias in a process that has the packages but not this project."""
    folder.mkdir()
    (folder / "elsewhere.py").write_text(ELSEWHERE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW", "RAY"))}
    answer = subprocess.run(
        [sys.executable, "-I", "elsewhere.py", uri, f"models:/{NAME}@{ALIAS}", str(picture.file), str(folder)],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr
    code = Path(json.loads(answer.stdout.splitlines()[-1]))
    assert code.parts[-3:] == ("code", "maskformer", "__init__.py")
    assert not code.is_relative_to(ROOT)

    ids, segments = segmented(saved, picture.pixels)
    found = decode_ids(np.asarray(Image.open(folder / "ids.png")))
    assert len(segments) > 1
    np.testing.assert_array_equal(found, ids)
    assert json.loads((folder / "segments.json").read_text()) == json.loads(json.dumps(segments))


def test_a_version_loads_where_this_checkout_is_not(
    uri: str,
    tiny: TrainConfig,
    packs: dict[str, str],
    picture: Picture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_id = tracking.open_run(uri, "experiment", "run", "/runs/run", {})
    first, second = saved_model(tiny, packs, seed=0, step=10), saved_model(tiny, packs, seed=2, step=20)
    assert registry.register(first, uri, run_id, NAME, ALIAS, {"pq/all": 0.25}) == "1"
    assert_loads_elsewhere(uri, first, picture, tmp_path / "first")

    client = MlflowClient(uri)
    version = client.get_model_version_by_alias(NAME, ALIAS)
    assert int(version.version) == 1  # a string from some stores
    assert version.tags == {"checkpoint": first.uri, "step": "10", "pq": "0.25"}
    assert version.run_id == run_id

    # A second registration is a new version, and takes the alias with it.
    assert registry.register(second, uri, run_id, NAME, ALIAS, {"pq/all": 0.5}) == "2"
    assert client.get_model_version_by_alias(NAME, ALIAS).tags["step"] == "20"
    assert not np.array_equal(segmented(first, picture.pixels)[0], segmented(second, picture.pixels)[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # registering leaves MLflow's own setting as it was
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@{ALIAS}")
    (png,) = loaded.predict({"image": [picture.file.read_bytes()]})["png"]
    (tmp_path / "second.png").write_bytes(png)
    found = decode_ids(np.asarray(Image.open(tmp_path / "second.png")))
    np.testing.assert_array_equal(found, segmented(second, picture.pixels)[0])

    # Loading weights never executes code: nothing is a pickle, by name or by content (protocols 2 to 5, torch's zip).
    artifacts = Path(download_artifacts(f"models:/{NAME}@{ALIAS}", dst_path=str(tmp_path / "copy")))
    files = [path for path in artifacts.rglob("*") if path.is_file()]
    assert {"about.json", "model.safetensors", "registered_model.py"} <= {path.name for path in files}
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin")
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
    requirements = (artifacts / "requirements.txt").read_text()
    assert "ray" not in {line.partition("==")[0] for line in requirements.splitlines()}


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_what_was_scored_is_registered(
    tiny: TrainConfig, packs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thresholds of the command line travel with the version, and its PQ is the one they gave."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = replace(tiny, tracking=replace(tiny.tracking, uri=uri), panoptic=PanopticConfig(score_threshold=1.0))
    torch.manual_seed(0)
    state = TrainingState(7, build_model(config.model).state_dict(), {}, {})
    taxonomy = open_pack(packs["val"]).taxonomy
    checkpoint.save(checkpoint.folder(locate(tmp_path / "run"), 7), state, config, taxonomy)
    published = publish(
        PublishConfig(
            checkpoint=str(tmp_path / "run"),
            data=packs["val"],
            score_threshold=0.0,
            overlap_threshold=0.125,
            cpus=0.5,
            register=NAME,
        )
    )
    assert published.model_version == "1"
    counts = published.evaluation.quality.per_class.values()
    assert sum(values.tp + values.fp for values in counts) > 0, "the checkpoint's own threshold lets nothing pass"
    client = MlflowClient(uri)
    metrics = client.get_run(published.mlflow_run_id).data.metrics
    assert metrics["pq/all"] == published.evaluation.quality.pq
    version = client.get_model_version_by_alias(NAME, ALIAS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert version.tags["pq"] == str(published.evaluation.quality.pq)
    artifacts = Path(download_artifacts(f"models:/{NAME}@{ALIAS}", dst_path=str(tmp_path / "copy")))
    about = json.loads(next(artifacts.rglob("about.json")).read_text())
    assert about["panoptic"] == {"score_threshold": 0.0, "overlap_threshold": 0.125}
