import json
from dataclasses import replace
from pathlib import Path

import pytest

from maskformer import PanopticConfig, Taxonomy, build_model, weights
from pipelines.checkpoints import pretrained, state
from pipelines.checkpoints.details import model_details
from pipelines.checkpoints.state import TrainingState
from pipelines.config.recipes import DEMO
from pipelines.storage import locate

ANIMALS = Taxonomy.from_coco([{"id": 4, "name": "cow", "isthing": 1}, {"id": 9, "name": "meadow", "isthing": 0}])
CONFIG = replace(
    DEMO,
    model=replace(DEMO.model, num_classes=2, decoder_layers=1, encoder_layers=0),
    panoptic=PanopticConfig(score_threshold=0.25),
)


def evaluated(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(content)


def metrics(pq: float) -> str:
    return json.dumps({"num_images": 3, "metrics": {"pq/all": pq}})


def test_a_run_states_its_settings_and_the_evaluations_of_this_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(CONFIG.model)
    for step in (7, 8):
        place = locate(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
        state.save(place, TrainingState(step, dict(model.state_dict()), {}), CONFIG, ANIMALS)
    evaluated(tmp_path / "run" / "evaluation" / "00000007-val", metrics(0.5))
    evaluated(tmp_path / "run" / "evaluation" / "00000008-val", metrics(0.75))
    evaluated(tmp_path / "run" / "evaluation" / "00000008-broken", "{")
    for uri, pq in ((f"{tmp_path}/run", 0.75), (f"{tmp_path}/run/checkpoints/step_00000007", 0.5)):
        assert model_details(uri, pretrained.read(uri)) == weights.ModelDetails(
            short_side=DEMO.evaluation.short_side,
            long_side=DEMO.evaluation.long_side,
            panoptic=CONFIG.panoptic,
            recipe="demo",
            evaluations=(weights.Evaluation(data="val", num_images=3, metrics={"pq/all": pq}),),
        )
    assert "00000008-broken/metrics.json is not used: JSONDecodeError" in caplog.text


def test_a_file_has_the_published_settings_and_the_evaluations_beside_it(tmp_path: Path) -> None:
    weights.save(build_model(CONFIG.model), tmp_path / "animals.safetensors", taxonomy=ANIMALS)
    uri = str(tmp_path / "animals.safetensors")
    assert model_details(uri, pretrained.read(uri)) == weights.ModelDetails()
    evaluated(tmp_path / "animals" / "evaluation" / "00000000-val", metrics(0.5))
    [evaluation] = model_details(uri, pretrained.read(uri)).evaluations
    assert evaluation.metrics == {"pq/all": 0.5}
