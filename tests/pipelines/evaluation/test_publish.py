"""publish(): an evaluation in MLflow has a run of its own, linked with the training, the model and the data."""

import gzip
import json
import shutil
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.artifacts import download_artifacts
from mlflow.data import get_source
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_SOURCE_NAME, MLFLOW_USER

from maskformer import PanopticConfig, build_model
from maskformer.analysis.image import analyze_image
from maskformer.analysis.summary import summarize
from maskformer.taxonomy import Taxonomy
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.checkpoints.state import TrainingState, step_folder
from pipelines.config.promote import PromoteConfig
from pipelines.config.publish import InferenceScaling, PublishConfig, PublishTracking, ThresholdConfig
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import PackedSet, open_pack
from pipelines.errors import RunFailedError, UserError
from pipelines.evaluation import publish as publishing
from pipelines.evaluation.publish import Published, publish
from pipelines.evaluation.result import EvaluationResult
from pipelines.evaluation.score import ScoredImage
from pipelines.storage import locate
from pipelines.tracking.gate import promote
from pipelines.tracking.runs import TrackedRun

pytestmark = pytest.mark.timeout(400)

STEP = 7
PLANTED = "http://127.0.0.1:9"


@dataclass(frozen=True)
class Trained:
    """A run's folder with one checkpoint, beside the database that its training was logged to."""

    storage: Path
    training: TrackedRun

    @property
    def uri(self) -> str:
        return f"sqlite:///{self.storage}/mlflow.db"

    def config(self, data: str, **settings: Any) -> PublishConfig:
        return PublishConfig(
            checkpoint=str(self.storage / "run"),
            data=data,
            report_images=0,
            scaling=InferenceScaling(cpus_per_worker=0.5),
            **settings,
        )


def save(tiny: TrainConfig, packs: dict[str, str], storage: Path, uri: str) -> None:
    config = replace(
        tiny,
        tracking=replace(tiny.tracking, uri=uri),
        panoptic=PanopticConfig(score_threshold=1.0),
        run=replace(tiny.run, storage=str(storage)),
    )
    torch.manual_seed(0)
    state = TrainingState(STEP, build_model(config.model).state_dict(), {})
    checkpoint.save(step_folder(locate(storage / "run"), STEP), state, config, open_pack(packs["val"]).taxonomy)


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a database without runs: MLflow takes seconds to make one, and a copy takes none."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def _database(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_database, tmp_path / "mlflow.db")


@pytest.fixture
def trained(tiny: TrainConfig, packs: dict[str, str], tmp_path: Path) -> Trained:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    save(tiny, packs, tmp_path, uri)
    training = TrackedRun.open(uri, tiny.tracking.experiment, "run", str(tmp_path / "run"), {"recipe": "demo"})
    training.close("FINISHED", {})
    return Trained(tmp_path, training)


class FakeEvaluation:
    """Stands for evaluate(): the ground truth of every image, disturbed, without Ray and without the model."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.error: BaseException | None = None

    def __call__(self, saved: SavedModel, samples: PackedSet, *, output: str, **_: object) -> EvaluationResult:
        if self.error is not None:
            raise self.error
        folder = locate(output)
        for name, content in {"metrics.json": b"{}", **self.files}.items():
            (folder / name).write_bytes(content)
        images = [
            ScoredImage("", [], analyze_image(*pair(saved.taxonomy, good=image_id % 3 > 0), saved.taxonomy, image_id))
            for image_id in samples.image_ids.tolist()
        ]
        return EvaluationResult(
            analysis=summarize([image.analysis for image in images], saved.taxonomy, draws=100),
            images=images,
            output=str(folder),
            png_folder="",
            data=samples,
            model=saved,
        )


def pair(taxonomy: Taxonomy, good: bool) -> tuple[Any, Any]:
    """Return a prediction and a ground truth of 4 x 4 pixels, of one segment of the first or of the second class."""
    ids = torch.ones(4, 4, dtype=torch.int32).numpy()
    truth = [{"id": 1, "category_id": taxonomy.categories[0].id}]
    return (ids, truth if good else [{"id": 1, "category_id": taxonomy.categories[1].id}]), (ids, truth)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEvaluation:
    evaluation = FakeEvaluation()
    monkeypatch.setattr(publishing, "evaluate", evaluation)
    monkeypatch.setattr(publishing, "session", nullcontext)
    return evaluation


def run_of(published: Published) -> Run:
    return MlflowClient(published.mlflow_run.uri).get_run(published.mlflow_run.run_id)


def model_of(run: Run) -> str:
    assert run.inputs
    (model,) = run.inputs.model_inputs
    return model.model_id


def test_an_evaluation_is_linked_with_training_model_and_data(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation
) -> None:
    fake.files = {"report.html": b"<html>", "overlays/1.jpg": b"jpeg"}
    before = MlflowClient(trained.uri).get_run(trained.training.run_id).to_dictionary()
    published = publish(trained.config(packs["val"], panoptic=ThresholdConfig(score_threshold=0.5)))
    client = MlflowClient(trained.uri)
    run, samples = run_of(published), open_pack(packs["val"])

    assert run.info.status == "FINISHED"
    assert run.data.tags[MLFLOW_PARENT_RUN_ID] == trained.training.run_id
    assert {MLFLOW_USER, MLFLOW_SOURCE_NAME} <= run.data.tags.keys()
    assert run.data.tags["checkpoint"].endswith(f"step_{STEP:08d}")
    assert run.data.params["panoptic.score_threshold"] == "0.5"
    assert not [name for name in run.data.params if name.startswith("tracking")]
    after = client.get_run(trained.training.run_id).to_dictionary()
    assert after == before  # nothing is written into the run of the training

    assert run.inputs
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("val", samples.data_hash[:16])
    assert json.loads(dataset.dataset.profile or "") == {"num_images": 12, "hash": samples.data_hash}
    assert get_source(dataset.dataset).to_dict() == {"uri": samples.uri}
    model = client.get_logged_model(model_of(run))
    assert model.source_run_id == trained.training.run_id
    assert model.params["panoptic.score_threshold"] == "0.5"
    assert published.evaluation.metrics
    for key, value in published.evaluation.metrics.items():
        (point,) = [metric for metric in model.metrics or [] if metric.key == key]
        assert (point.value, point.step, point.run_id) == (value, STEP, run.info.run_id)
        assert (point.dataset_name, point.dataset_digest) == ("val", samples.data_hash[:16])
        assert published.mlflow_run.history(key) == [(STEP, value)]

    paths = {file.path for file in client.list_artifacts(run.info.run_id, "evaluation")}
    assert paths == {f"evaluation/{name}" for name in ("metrics.json", "quality.json.gz", "report.html", "overlays")}
    assert [file.path for file in client.list_artifacts(run.info.run_id, "evaluation/overlays")] == [
        "evaluation/overlays/1.jpg"
    ]
    file = Path(client.download_artifacts(run.info.run_id, "evaluation/quality.json.gz", str(trained.storage)))
    counts = json.loads(gzip.decompress(file.read_bytes()))
    assert counts["data_hash"] == samples.data_hash
    first, second = (str(category.id) for category in samples.taxonomy.categories[:2])
    assert counts["images"] == {
        str(id): {first: [1.0, 1, 0, 0]} if id % 3 else {first: [0.0, 0, 0, 1], second: [0.0, 0, 1, 0]}
        for id in samples.image_ids.tolist()
    }


def test_each_evaluation_is_a_run_and_each_model_is_one(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation
) -> None:
    runs = [run_of(publish(trained.config(data))) for data in (packs["val"], packs["val"], packs["train"])]
    stricter = run_of(publish(trained.config(packs["val"], panoptic=ThresholdConfig(overlap_threshold=0.5))))
    assert len({run.info.run_id for run in [*runs, stricter]}) == 4
    models = [model_of(run) for run in runs]
    assert len(set(models)) == 1
    assert model_of(stricter) != models[0]
    points = MlflowClient(trained.uri).get_logged_model(models[0]).metrics or []
    assert {point.dataset_name for point in points if point.key == "pq/all"} == {"val", "train"}


def test_the_registered_version_is_described_and_can_be_promoted(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation
) -> None:
    published = publish(trained.config(packs["val"], register="shapes", panoptic=ThresholdConfig(score_threshold=0.5)))
    assert (published.model_version, published.alias_version) == ("1", "1")
    version = MlflowClient(trained.uri).get_model_version_by_alias("shapes", "candidate")
    assert version.run_id == trained.training.run_id
    assert version.tags["evaluation_run"] == published.mlflow_run.run_id
    assert version.tags["pq"] == str(published.evaluation.quality.pq)
    pq = f"| all | {100 * published.evaluation.quality.pq:.1f} |"
    for part in (pq, "95 % interval", "hash", "score 0.5", "12 images", "License: weights inherit"):
        assert part in (version.description or "")
    decision = promote(trained.uri, PromoteConfig(model="shapes", version=1))
    assert decision.action == "first"
    assert decision.evaluation is not None
    assert decision.evaluation.run_id == published.mlflow_run.run_id
    with pytest.raises(UserError, match=r"jobs/promote\.py decides"):
        publish(trained.config(packs["val"], register="shapes", alias="champion"))


@pytest.mark.parametrize("planted", [PLANTED, "sqlite:////{tmp}/elsewhere/mlflow.db", "sqlite:////{tmp}/run/x.db"])
def test_a_checkpoint_does_not_choose_where_credentials_go(
    tiny: TrainConfig,
    packs: dict[str, str],
    fake: FakeEvaluation,
    tmp_path: Path,
    empty_database: Path,
    planted: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    shutil.copy(empty_database, tmp_path / "given.db")
    planted = planted.replace("/{tmp}", str(tmp_path))
    save(tiny, packs, tmp_path, planted)
    trained = Trained(tmp_path, TrackedRun("", ""))
    published = publish(trained.config(packs["val"]))
    assert published.mlflow_run.uri == trained.uri
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "run" / "x.db").exists()
    assert f"The training was logged to {planted}" in caplog.text
    assert MLFLOW_PARENT_RUN_ID not in run_of(published).data.tags

    given = f"sqlite:///{tmp_path}/given.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert publish(trained.config(packs["val"])).mlflow_run.uri == given
    monkeypatch.setenv("MLFLOW_TRACKING_URI", PLANTED)
    flags = PublishTracking(uri=given)
    assert publish(trained.config(packs["val"], tracking=flags)).mlflow_run.uri == given
    with pytest.raises(UserError, match=f"{PLANTED} does not answer"):
        publish(trained.config(packs["val"]))


@pytest.mark.parametrize("location", ["s3://stranger/a", "/etc", "file:///etc", "{tmp}/mlartifacts/../../a"])
def test_a_database_beside_a_checkpoint_stores_nothing_elsewhere(
    tiny: TrainConfig, packs: dict[str, str], fake: FakeEvaluation, tmp_path: Path, location: str
) -> None:
    location = location.replace("{tmp}", str(tmp_path))
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    MlflowClient(uri).create_experiment(tiny.tracking.experiment, artifact_location=location)
    save(tiny, packs, tmp_path, uri)
    fake.error = AssertionError("It was evaluated.")
    with pytest.raises(UserError, match="which is not in its folder"):
        publish(Trained(tmp_path, TrackedRun("", "")).config(packs["val"]))


def test_a_logged_model_of_a_database_beside_a_checkpoint_is_not_registered(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation
) -> None:
    theirs = model_of(run_of(publish(trained.config(packs["val"]))))
    published = publish(trained.config(packs["val"], register="shapes"))
    mine = model_of(run_of(published))
    assert mine != theirs
    assert MlflowClient(trained.uri).get_model_version("shapes", "1").source == f"models:/{mine}"
    given = trained.config(packs["val"], register="shapes", tracking=PublishTracking(uri=trained.uri))
    assert model_of(run_of(publish(given))) == theirs


def test_the_database_above_a_trial_of_a_sweep_is_used(
    tiny: TrainConfig, packs: dict[str, str], fake: FakeEvaluation, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    storage = tmp_path / "sweep" / "trials"
    save(tiny, packs, storage, uri)
    trial = TrackedRun.open(uri, tiny.tracking.experiment, "run", str(storage / "run"), {})
    published = publish(Trained(storage, trial).config(packs["val"]))
    assert published.mlflow_run.uri == uri
    assert run_of(published).data.tags[MLFLOW_PARENT_RUN_ID] == trial.run_id
    assert not (storage / "mlflow.db").exists()


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), "KILLED"), (UserError("No room."), "FAILED")])
def test_an_evaluation_that_fails_is_recorded_as_that(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation, error: BaseException, status: str
) -> None:
    fake.error = error
    with pytest.raises(type(error)):
        publish(trained.config(packs["val"]))
    client = MlflowClient(trained.uri)
    runs = client.search_runs([client.get_run(trained.training.run_id).info.experiment_id])
    (run,) = [run for run in runs if run.info.run_id != trained.training.run_id]
    assert (run.info.status, run.data.tags["cause"]) == (status, str(error))


def test_names_that_mlflow_refuses_cost_no_evaluation(
    trained: Trained, packs: dict[str, str], fake: FakeEvaluation
) -> None:
    fake.error = AssertionError("It was evaluated.")
    for settings in ({"register": "a/b"}, {"register": "shapes", "alias": "latest"}):
        with pytest.raises(UserError, match="does not allow"):
            publish(trained.config(packs["val"], **settings))
    client = MlflowClient(trained.uri)
    experiment = client.get_run(trained.training.run_id).info.experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment])] == [trained.training.run_id]


def test_what_mlflow_does_not_accept_after_the_evaluation_is_said(
    trained: Trained,
    packs: dict[str, str],
    fake: FakeEvaluation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(uri: str) -> None:
        raise UserError("The server does not answer.")

    def evaluated(*arguments: Any, **options: Any) -> EvaluationResult:
        for module in ("evaluation.publish", "tracking.runs", "tracking.evaluations"):
            monkeypatch.setattr(f"pipelines.{module}.require_reachable", away)
        return fake(*arguments, **options)

    monkeypatch.setattr(publishing, "evaluate", evaluated)
    output = str(trained.storage / "out")
    with pytest.raises(RunFailedError, match=f"evaluated but not registered as shapes.*{output}"):
        publish(trained.config(packs["val"], register="shapes", output=output))
    assert any("metrics of run" in message and output in message for message in caplog.messages)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_the_evaluated_model_is_registered(trained: Trained, packs: dict[str, str]) -> None:
    """The version has the thresholds of the command line, and the PQ that was measured with them."""
    thresholds = ThresholdConfig(score_threshold=0.0, overlap_threshold=0.125)
    published = publish(trained.config(packs["val"], panoptic=thresholds, register="shapes"))
    counts = published.evaluation.quality.per_class.values()
    assert sum(values.tp + values.fp for values in counts) > 0, "the checkpoint's threshold would reject every query"
    assert published.mlflow_run.history("pq/all") == [(STEP, published.evaluation.quality.pq)]
    version = MlflowClient(trained.uri).get_model_version_by_alias("shapes", "candidate")
    assert version.tags["pq"] == str(published.evaluation.quality.pq)
    mlflow.set_tracking_uri(trained.uri)
    try:
        copy = Path(download_artifacts("models:/shapes@candidate", dst_path=str(trained.storage)))
    finally:
        mlflow.set_tracking_uri(None)  # pyright: ignore[reportArgumentType] -- None unsets it
    about = json.loads(next(copy.rglob("about.json")).read_text())
    assert about["panoptic"] == {"score_threshold": 0.0, "overlap_threshold": 0.125}
