"""The model of a checkpoint is found from a run's folder or a checkpoint's folder, and from no other."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from maskformer.taxonomy import COCO, Taxonomy
from pipelines.checkpoints import state as checkpoint
from pipelines.checkpoints.saved_model import find, is_native, load_model
from pipelines.checkpoints.state import BestCheckpoint, TrainingState, step_folder, write_best
from pipelines.config.recipes import DEMO
from pipelines.errors import UserError
from pipelines.storage import Location, locate

TAXONOMY = Taxonomy(COCO.categories[:7])


@pytest.fixture
def run(tmp_path: Path) -> Location:
    return locate(tmp_path / "run")


def save(run: Location, step: int) -> Path:
    folder = step_folder(run, step)
    checkpoint.save(folder, TrainingState(step, {"weight": torch.full((3,), float(step))}, {}), DEMO, TAXONOMY)
    return Path(folder.path)


def damage(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 10)


def test_a_model_is_read_from_a_run_or_from_a_checkpoint(run: Location) -> None:
    folders = [save(run, step) for step in (5, 10, 15)]
    damage(folders[-1])
    found = load_model(run)
    assert (found.step, found.uri, found.folder) == (10, str(folders[1]), str(run))
    assert (found.config, found.taxonomy) == (DEMO, TAXONOMY)
    assert found.weights["weight"].tolist() == [10.0, 10.0, 10.0]
    assert load_model(locate(f"{folders[0]}/")).step == 5
    moved = Path(run.path).with_name("step_00000005")
    shutil.copytree(folders[0], moved)
    found = load_model(locate(moved))
    assert (found.uri, found.folder) == (str(moved), str(moved))
    with pytest.raises(UserError, match=r"step_00000015 is damaged"):
        load_model(locate(folders[-1]))


def test_all_damaged_checkpoints_are_named(run: Location) -> None:
    for step in (5, 10):
        damage(save(run, step))
    with pytest.raises(UserError, match=r"step_00000010.*step_00000005"):
        load_model(run)


@pytest.mark.parametrize("below", ["absent", ".", "run/checkpoints", "run/checkpoints/step_00000005/state.pt"])
def test_other_locations_have_no_model(run: Location, below: str) -> None:
    save(run, 5)
    location = locate(Path(run.path).parent / below)
    assert not is_native(location)
    with pytest.raises(UserError, match=r"Name a run's folder .* or one of its checkpoints/step_\* folders"):
        load_model(location)


def test_runs_and_checkpoints_are_native(run: Location) -> None:
    folder = save(run, 5)
    assert is_native(run)
    assert is_native(locate(folder))


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_best_checkpoint_of_a_run_is_found(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    storage = str(tmp_path) if kind == "local" else request.getfixturevalue("bucket")
    run = locate(storage) / "run"
    for step in (5, 10):
        state = TrainingState(step, {"weight": torch.full((3,), float(step))}, {})
        checkpoint.save(step_folder(run, step), state, DEMO, TAXONOMY)
    write_best(run, BestCheckpoint(5, 0.5))
    for uri in (f"{storage}/run@best", f"{storage}/run/@best"):
        found = load_model(find(uri))
        assert (found.step, found.uri, found.folder) == (5, f"{run}/checkpoints/step_00000005", str(run))
    for uri in (f"{storage}/run", f"{storage}/absent", f"{run}/checkpoints/step_00000005"):
        assert str(find(uri)) == uri


def test_paths_with_an_at_sign_are_paths(run: Location) -> None:
    folder = Path(save(run, 5))
    for name in ("a@best", "b@best.pth", "a@host"):
        moved = Path(run.path).with_name(name)
        shutil.copytree(folder.parent.parent, moved)
        assert str(find(str(moved))) == str(moved)
        assert load_model(find(str(moved))).step == 5
        write_best(locate(moved), BestCheckpoint(5, 0.5))
        assert load_model(find(f"{moved}@best")).step == 5


def test_a_run_without_a_usable_best_checkpoint_is_explained(run: Location) -> None:
    uri = f"{run}@best"
    with pytest.raises(UserError, match=rf"^There is nothing at {run}\. Give a run's folder .* before @best\.$"):
        find(uri)
    folder = save(run, 5)
    with pytest.raises(UserError, match=rf"^{run} has no best checkpoint: .* --checkpoint\.keep-best\. Use {run} for"):
        find(uri)
    write_best(run, BestCheckpoint(10, 0.5))
    with pytest.raises(UserError, match=rf"^The best checkpoint of {run} .*step_00000010 .* Use {run} for its newest"):
        find(uri)
    write_best(run, BestCheckpoint(5, 0.5))
    damage(folder)
    with pytest.raises(UserError, match=rf"^The best checkpoint of {run} .*step_00000005 is damaged.* Use {run} for"):
        find(uri)
    (run / "best.json").write_text("{")
    with pytest.raises(UserError, match=rf"^The best checkpoint of {run} .*best\.json cannot be read.* Use {run} for"):
        find(uri)
