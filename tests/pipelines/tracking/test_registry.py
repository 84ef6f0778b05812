"""A registered version loads, segments and answers HTTP requests on a machine without this repository."""

import base64
import contextlib
import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from PIL import Image

from maskformer import PanopticConfig, Segmenter, build_model
from maskformer.coco_format import decode_ids
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.errors import UserError
from pipelines.tracking import registry
from pipelines.tracking.alias import require_alias_name
from pipelines.tracking.history import Entry
from pipelines.tracking.logged_model import logged_model
from pipelines.tracking.registry import Registered
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import current

pytestmark = pytest.mark.timeout(400)

ROOT, NAME, ALIAS = Path(__file__).parents[3], "shapes", "candidate"


@dataclass(frozen=True)
class ImageFile:
    path: Path
    pixels: np.ndarray


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> ImageFile:
    folder = tmp_path_factory.mktemp("image")
    draw_dataset(folder, SyntheticConfig(split="test", num_images=1))
    (path,) = (folder / "test").iterdir()
    return ImageFile(path, np.array(Image.open(path).convert("RGB")))


def saved_model(tiny: TrainConfig, packs: dict[str, str], seed: int, step: int) -> SavedModel:
    torch.manual_seed(seed)
    config = replace(tiny, panoptic=PanopticConfig(score_threshold=0.0, overlap_threshold=0.25))
    weights = build_model(config.model).state_dict()
    weights["mask_head.4.weight"] *= 10  # confident masks, so that there are several segments
    return SavedModel(f"/runs/run/checkpoints/step_{step:08d}", step, weights, config, open_pack(packs["val"]).taxonomy)


def segmented(saved: SavedModel, image: np.ndarray) -> tuple[np.ndarray, list[dict[str, object]]]:
    model = build_model(saved.config.model)
    model.load_state_dict(saved.weights)
    size = saved.config.evaluation
    segment = Segmenter(
        model, saved.taxonomy, saved.config.panoptic, short_side=size.short_side, long_side=size.long_side
    )
    return segment(image)


ELSEWHERE = """
import importlib.util, json, sys
from pathlib import Path

# Without the finder of the editable install, this process has no access to the repository.
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


def assert_loads_elsewhere(uri: str, saved: SavedModel, image: ImageFile, folder: Path) -> None:
    """Load the model by its alias in a process that has the packages but not this project."""
    folder.mkdir()
    (folder / "elsewhere.py").write_text(ELSEWHERE)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MLFLOW", "RAY"))}
    answer = subprocess.run(
        [sys.executable, "-I", "elsewhere.py", uri, f"models:/{NAME}@{ALIAS}", str(image.path), str(folder)],
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

    ids, segments = segmented(saved, image.pixels)
    found = decode_ids(np.asarray(Image.open(folder / "ids.png")))
    assert len(segments) > 1
    np.testing.assert_array_equal(found, ids)
    assert json.loads((folder / "segments.json").read_text()) == json.loads(json.dumps(segments))


def register(uri: str, saved: SavedModel, alias: str = ALIAS) -> Registered:
    """Register a model as `publish` does, without evaluating it; each call is another MLflow run."""
    run = TrackedRun.start(uri, "experiment", "evaluation", {}, {})
    client = MlflowClient(uri)
    with current(uri):
        experiment_id = client.get_run(run.run_id).info.experiment_id
        model = logged_model(client, saved, experiment_id, run.run_id)
        return registry.register(client, model, saved, NAME, alias, description="card", tags={"pq": "0.25"})


def test_a_version_loads_without_this_repository(
    uri: str,
    tiny: TrainConfig,
    packs: dict[str, str],
    image: ImageFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = saved_model(tiny, packs, seed=0, step=10), saved_model(tiny, packs, seed=2, step=20)
    assert register(uri, first) == Registered("1", "1")
    assert_loads_elsewhere(uri, first, image, tmp_path / "first")

    client = MlflowClient(uri)
    version = client.get_model_version_by_alias(NAME, ALIAS)
    assert int(version.version) == 1  # some stores return a string
    assert version.tags == {"checkpoint": first.uri, "step": "10", "pq": "0.25"}
    assert version.description == "card"

    # Another model is a new version and moves the alias. The first one once more is neither.
    assert register(uri, second) == Registered("2", "2")
    assert register(uri, first) == Registered("1", "2")
    assert client.get_model_version_by_alias(NAME, ALIAS).tags["step"] == "20"
    assert len(client.search_logged_models([client.get_experiment_by_name("experiment").experiment_id])) == 2  # pyright: ignore[reportOptionalMemberAccess]
    assert not np.array_equal(segmented(first, image.pixels)[0], segmented(second, image.pixels)[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # registering does not change the setting of MLflow itself
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@{ALIAS}")
    images = {"image": [image.path.read_bytes()]}
    (png,) = loaded.predict(images)["png"]
    np.testing.assert_array_equal(pixels(png), segmented(second, image.pixels)[0])

    # Thresholds are parameters, with those that were evaluated as defaults.
    schema = loaded.metadata.get_params_schema()
    assert schema
    assert schema.to_dict() == [
        {"name": "score_threshold", "type": "double", "default": 0.0, "shape": None},
        {"name": "overlap_threshold", "type": "double", "default": 0.25, "shape": None},
    ]
    stricter = PanopticConfig(score_threshold=0.0, overlap_threshold=0.9)
    answer = loaded.predict(images, params={"overlap_threshold": 0.9})
    ids, segments = segmented(replace(second, config=replace(second.config, panoptic=stricter)), image.pixels)
    np.testing.assert_array_equal(pixels(answer["png"][0]), ids)
    assert json.loads(answer["segments_info"][0]) == json.loads(json.dumps(segments))
    assert len(segments) < len(segmented(second, image.pixels)[1])
    np.testing.assert_array_equal(pixels(loaded.predict(images)["png"][0]), segmented(second, image.pixels)[0])
    with pytest.raises(MlflowException, match=r"score_threshold must lie in \[0, 1\], got 3"):
        loaded.predict(images, params={"score_threshold": 3.0})
    with pytest.raises(MlflowException, match="image of row 1 cannot be read"):
        loaded.predict({"image": [image.path.read_bytes(), b"no image"]})

    # The device can be chosen, here one on which nothing is computed.
    elsewhere = mlflow.pyfunc.load_model(f"models:/{NAME}@{ALIAS}", model_config={"device": "meta"})
    assert {weight.device.type for weight in elsewhere.unwrap_python_model()._segmenter.model.parameters()} == {"meta"}

    # The example is an image that the model segments.
    example = loaded.metadata.load_input_example(download_artifacts(f"models:/{NAME}@{ALIAS}"))
    (png,) = loaded.predict(example)["png"]
    assert pixels(png).shape == (64, 96)

    # Loading weights never executes code: nothing is a pickle, by name or by content (protocols 2 to 5, torch's zip).
    artifacts = Path(download_artifacts(f"models:/{NAME}@{ALIAS}", dst_path=str(tmp_path / "copy")))
    files = [path for path in artifacts.rglob("*") if path.is_file()]
    assert {"about.json", "model.safetensors", "registered_model.py"} <= {path.name for path in files}
    for path in files:
        assert path.suffix not in (".pkl", ".pickle", ".pt", ".pth", ".bin")
        assert not path.read_bytes().startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK"))
    requirements = (artifacts / "requirements.txt").read_text()
    assert "ray" not in {line.partition("==")[0] for line in requirements.splitlines()}


def pixels(png: bytes) -> np.ndarray:
    return decode_ids(np.asarray(Image.open(io.BytesIO(png))))


def test_names_that_mlflow_refuses_are_refused_before_an_evaluation(uri: str) -> None:
    client = MlflowClient(uri)
    registry.require_names(client, "new-name", "candidate")
    for name in ("a/b", "a:b", " ", "models:/x"):
        with pytest.raises(UserError, match="does not allow to register") as refusal:
            registry.require_names(client, name, "candidate")
        assert "\n" not in str(refusal.value)
    for alias in ("latest", "LATEST", "v1", "a b", "a/b", ""):
        with pytest.raises(UserError, match="does not allow the alias"):
            registry.require_names(client, "new-name", alias)
    client.create_registered_model("guarded", tags={"history.champion": json.dumps([dataclasses.asdict(ENTRY)])})
    registry.require_names(client, "guarded", "candidate")
    with pytest.raises(UserError, match=r"jobs/promote\.py decides.*--alias champion"):
        registry.require_names(client, "guarded", "champion")


ENTRY = Entry(action="first", version="1", previous="", by="me", at="today", reason="the first")


def test_mlflow_itself_refuses_these_aliases(database: Path) -> None:
    """So that our refusal is not stricter than necessary."""
    client = MlflowClient(f"sqlite:///{database}")
    client.create_registered_model("aliases")
    with current(f"sqlite:///{database}"):
        client.create_model_version("aliases", "file:///nowhere")
    for alias in ("latest", "v1", "V3", "a b", "a/b", ""):
        with pytest.raises(MlflowException):
            client.set_registered_model_alias("aliases", alias, "1")
    for alias in ("vnext", "v1a", "Äther-1_x"):
        client.set_registered_model_alias("aliases", alias, "1")
        require_alias_name(alias)


@pytest.mark.slow
def test_a_served_model_answers_as_the_local_one(
    server: tuple[str, psutil.Process], tiny: TrainConfig, packs: dict[str, str], image: ImageFile, tmp_path: Path
) -> None:
    """By `mlflow models serve`, which takes half a minute to start."""
    uri = server[0]
    saved = saved_model(tiny, packs, seed=4, step=30)
    version = register(uri, saved, "served").version
    with serving(uri, f"models:/{NAME}/{version}", tmp_path) as address:
        content = base64.b64encode(image.path.read_bytes()).decode()
        for body, thresholds in (
            ({"dataframe_split": {"columns": ["image"], "data": [[content]]}}, saved.config.panoptic),
            (
                {"inputs": {"image": [content]}, "params": {"overlap_threshold": 0.9}},
                PanopticConfig(score_threshold=0.0, overlap_threshold=0.9),
            ),
        ):
            status, answer = post(f"{address}/invocations", body)
            assert status == 200, answer
            (row,) = answer["predictions"]
            ids, segments = segmented(replace(saved, config=replace(saved.config, panoptic=thresholds)), image.pixels)
            np.testing.assert_array_equal(pixels(base64.b64decode(row["png"])), ids)
            assert json.loads(row["segments_info"]) == json.loads(json.dumps(segments))
        status, answer = post(f"{address}/invocations", {"inputs": {"image": ["bm8gaW1hZ2U="]}})
        assert status == 400
        assert "image of row 0 cannot be read" in json.dumps(answer)


@contextlib.contextmanager
def serving(uri: str, model: str, folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": uri,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # it starts uvicorn by its name
    }
    with (folder / "log").open("w") as log:
        process = psutil.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)], cwd=folder, env=environment, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 300
        while not answers(f"http://127.0.0.1:{port}/ping"):
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            processes = [*process.children(recursive=True), process]
            for member in processes:
                member.kill()
            psutil.wait_procs(processes, timeout=30)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def post(url: str, body: object) -> tuple[int, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())
