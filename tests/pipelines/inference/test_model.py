"""Models of other origins than a run: MLflow's registry."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from maskformer import PanopticConfig, Taxonomy
from pipelines.checkpoints.saved_model import SavedModel
from pipelines.config.publish import ThresholdConfig
from pipelines.config.train import TrainConfig
from pipelines.data.synthetic import CATEGORIES
from pipelines.errors import UserError
from pipelines.inference.model import fingerprint, open_segmenter
from pipelines.tracking import registry
from pipelines.tracking.logged_model import logged_model
from pipelines.tracking.runs import TrackedRun
from pipelines.tracking.server import current
from tests.checkpoints import saved, untrained

TAXONOMY = Taxonomy.from_coco(CATEGORIES)


@pytest.mark.timeout(300)
def test_a_registered_model(tiny: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config, model = untrained(tiny)
    run = TrackedRun.open(uri, "experiment", "run", "/runs/run", {})
    in_memory = SavedModel("/runs/run/checkpoints/step_00000005", 5, model.state_dict(), config, TAXONOMY)
    client = MlflowClient(uri)
    with current(uri):
        logged = logged_model(client, in_memory, client.get_run(run.run_id).info.experiment_id, run.run_id)
        registry.register(client, logged, in_memory, "shapes", "best", description="card", tags={})

    expected = saved(tiny, TAXONOMY, tmp_path / "run")
    found, source = open_segmenter("models:/shapes@best", ThresholdConfig(), uri)
    assert source == "models:/shapes@best"
    assert found.config == expected.config
    assert fingerprint(found) == fingerprint(expected)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3), np.uint8)
    assert np.array_equal(found(pixels).ids, expected(pixels).ids)
    with pytest.raises(UserError, match="models:/shapes@worst cannot be loaded from sqlite"):
        open_segmenter("models:/shapes@worst", ThresholdConfig(), uri)
    with pytest.raises(UserError, match=r"Set it by --tracking.uri or \$MLFLOW_TRACKING_URI"):
        open_segmenter("models:/shapes@best", ThresholdConfig())


def test_thresholds_replace_those_of_the_model(tiny: TrainConfig, tmp_path: Path) -> None:
    expected = saved(tiny, TAXONOMY, tmp_path / "run")
    found, source = open_segmenter(str(tmp_path / "run"), ThresholdConfig(score_threshold=0.5))
    assert source.endswith("/run/checkpoints/step_00000005")
    assert found.config == replace(expected.config, score_threshold=0.5)
    assert open_segmenter(str(tmp_path / "run"), ThresholdConfig())[0].config == expected.config != PanopticConfig()
    other = saved(tiny, TAXONOMY, tmp_path / "other", seed=1)
    assert fingerprint(found) == fingerprint(expected) != fingerprint(other)
