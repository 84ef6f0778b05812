"""A registered version loads and segments on a machine without this repository, from a database and from a server."""

import json
import os
import subprocess
import sys
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
from maskformer.coco_format import decode_ids
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.checkpoints.state import TrainingState, step_folder
from pipelines.config.publish import InferenceScaling, PublishConfig, ThresholdConfig
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.data.synthetic import SyntheticConfig, draw_dataset
from pipelines.evaluation.publish import publish
from pipelines.storage import locate
from pipelines.tracking import registry
from pipelines.tracking.runs import TrackedRun

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


def test_a_version_loads_without_this_repository(
    uri: str,
    tiny: TrainConfig,
    packs: dict[str, str],
    image: ImageFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = TrackedRun.open(uri, "experiment", "run", "/runs/run", {})
    first, second = saved_model(tiny, packs, seed=0, step=10), saved_model(tiny, packs, seed=2, step=20)
    assert registry.register(first, run, NAME, ALIAS, {"pq/all": 0.25}) == "1"
    assert_loads_elsewhere(uri, first, image, tmp_path / "first")

    client = MlflowClient(uri)
    version = client.get_model_version_by_alias(NAME, ALIAS)
    assert int(version.version) == 1  # some stores return a string
    assert version.tags == {"checkpoint": first.uri, "step": "10", "pq": "0.25"}
    assert version.run_id == run.run_id

    # A second registration creates a new version and moves the alias.
    assert registry.register(second, run, NAME, ALIAS, {"pq/all": 0.5}) == "2"
    assert client.get_model_version_by_alias(NAME, ALIAS).tags["step"] == "20"
    assert not np.array_equal(segmented(first, image.pixels)[0], segmented(second, image.pixels)[0])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # registering does not change the setting of MLflow itself
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@{ALIAS}")
    (png,) = loaded.predict({"image": [image.path.read_bytes()]})["png"]
    (tmp_path / "second.png").write_bytes(png)
    found = decode_ids(np.asarray(Image.open(tmp_path / "second.png")))
    np.testing.assert_array_equal(found, segmented(second, image.pixels)[0])

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
def test_the_evaluated_model_is_registered(
    tiny: TrainConfig, packs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version has the thresholds of the command line, and the PQ that was measured with them."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = replace(tiny, tracking=replace(tiny.tracking, uri=uri), panoptic=PanopticConfig(score_threshold=1.0))
    torch.manual_seed(0)
    state = TrainingState(7, build_model(config.model).state_dict(), {})
    taxonomy = open_pack(packs["val"]).taxonomy
    checkpoint.save(step_folder(locate(tmp_path / "run"), 7), state, config, taxonomy)
    published = publish(
        PublishConfig(
            checkpoint=str(tmp_path / "run"),
            data=packs["val"],
            panoptic=ThresholdConfig(score_threshold=0.0, overlap_threshold=0.125),
            scaling=InferenceScaling(cpus_per_worker=0.5),
            register=NAME,
        )
    )
    assert published.model_version == "1"
    counts = published.evaluation.quality.per_class.values()
    assert sum(values.tp + values.fp for values in counts) > 0, "the checkpoint's threshold would reject every query"
    client = MlflowClient(uri)
    logged = client.get_run(published.mlflow_run.run_id)
    assert logged.data.metrics["pq/all"] == published.evaluation.quality.pq
    assert published.mlflow_run.history("pq/all") == [(7, published.evaluation.quality.pq)]
    assert [file.path for file in client.list_artifacts(logged.info.run_id, "evaluation")] == [
        "evaluation/metrics.json"
    ]
    assert logged.info.status == "FINISHED"
    version = client.get_model_version_by_alias(NAME, ALIAS)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert version.tags["pq"] == str(published.evaluation.quality.pq)
    artifacts = Path(download_artifacts(f"models:/{NAME}@{ALIAS}", dst_path=str(tmp_path / "copy")))
    about = json.loads(next(artifacts.rglob("about.json")).read_text())
    assert about["panoptic"] == {"score_threshold": 0.0, "overlap_threshold": 0.125}
