"""The command line of the jobs: user errors are explained in one paragraph, with exit status 2."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import evaluate, train_r50
from jobs.shared.cli import run
from maskformer import build_model
from maskformer.optim import build_optimizer
from pipelines.checkpoints.state import TrainingState, save, step_folder
from pipelines.config.recipes import R50_MMDET
from pipelines.config.train import TrainConfig
from pipelines.data.manifest import open_pack
from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.training import driver, prepare_run
from tests.jobs.command_line import flags

ROOT = Path(__file__).parents[2]
NOBODY = "http://127.0.0.1:9"  # the discard port


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (
        "RAY_ADDRESS",
        "MLFLOW_TRACKING_URI",
        *(f"MASKFORMER_{n}" for n in ("TRAIN_DATA", "VAL_DATA", "STORAGE")),
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the URI of one MLflow database for all tests: to make it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def config(tiny: TrainConfig, storage: Path, database: str) -> TrainConfig:
    """Return a run that could start."""
    run, tracking = replace(tiny.run, storage=str(storage)), replace(tiny.tracking, uri=database)
    return replace(tiny, recipe=R50_MMDET.recipe, run=run, tracking=tracking)


class Refused:
    """Runs a job that must exit with status 2 and one paragraph; returns that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, main: Callable[[], int | None], arguments: list[str]) -> str:
        self._monkeypatch.setattr(sys, "argv", ["job", *arguments])
        with pytest.raises(SystemExit) as end:
            run(main)
        streams = self._capsys.readouterr()
        assert end.value.code == 2, streams
        assert streams.out == ""
        return one_paragraph(streams.err)

    def train(self, config: TrainConfig, *more: str) -> str:
        return self(train_r50.main, [*flags(config, R50_MMDET), *more])


def one_paragraph(stderr: str) -> str:
    assert "Traceback" not in stderr
    (paragraph,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert stderr.endswith(f"{paragraph}\n")  # nothing comes after it
    return paragraph


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(monkeypatch, capsys)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a training come as far as Ray and no further."""

    @contextmanager
    def session() -> Iterator[None]:
        raise UserError("Ray would be started now.")
        yield

    monkeypatch.setattr(driver, "session", session)
    # Other tests may have started Ray in this process; these are to see a machine without it.
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def test_description_answers_without_ray() -> None:
    code = "import runpy, sys; sys.modules['ray'] = sys.modules['mlflow'] = None; del sys.argv[0]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    line = ["jobs/train_r50.py", "--describe", "--recipe", "r50_original"]
    result = subprocess.run([sys.executable, "-c", code, *line], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("recipe        r50_original\n")
    assert "x0.1 from step 369,600 " in result.stdout


def test_a_recipe_of_another_job(refused: Refused) -> None:
    complaint = refused(train_r50.main, ["--recipe", "swin_l_mmdet"])
    assert "no recipe 'swin_l_mmdet' for this job" in complaint
    assert "r50_mmdet, r50_original, r101_original" in complaint


def test_an_unknown_flag(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--optimizer.weight-decoy", "1"])
    with pytest.raises(SystemExit) as end:
        run(train_r50.main)
    assert end.value.code == 2
    assert "--optimizer.weight-decay" in capsys.readouterr().err


def other_files(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def half_a_pack(folder: Path) -> None:
    (folder / "pack.json").write_text("{}")


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: folder.rmdir(), "There is no pack at {folder}; give the output folder of prepare_data.py."),
        (other_files, "There is no pack at {folder}; give the output folder of prepare_data.py."),
        (half_a_pack, "The pack {folder} is not complete; run prepare_data.py again with the same arguments."),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_data_that_is_no_pack(
    refused: Refused, config: TrainConfig, tmp_path: Path, storage: Path, split: str, fill: Any, message: str
) -> None:
    folder = tmp_path / "pack"
    folder.mkdir()
    fill(folder)
    config = replace(config, data=replace(config.data, **{split: str(folder)}))
    assert refused.train(config) == f"error: {message.format(folder=folder)}"
    assert not storage.exists()


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.train", ""], r"needs the packed training data \(--data\.train or \$MASKFORMER_TRAIN_DATA\)"),
        (["--scaling.workers", "3"], r"3 workers cannot give .* Use --scaling\.workers 2 \(possible: 1, 2, 4\)"),
        (["--run.micro-batch", "3"], r"global batch of 8 is not a multiple .* Use a global batch of 9"),
        (["--model.num-classes", "133"], r"has 7 classes, the model 133\. Use --model\.num-classes 7"),
        (["--weights", "imagenet"], r"no ImageNet weights for the backbone 'small'\. Use --weights none"),
        (["--weights", "/nowhere/r50.pth", "--model.backbone", "resnet50"], r"nothing at /nowhere/r50\.pth\. Give "),
        (["--weights", "imagenet", "--model.backbone", "resnet50"], r"are not at .*torch/hub/checkpoints/resnet50"),
        (["--weights", str(ROOT / "LICENSE"), "--model.backbone", "resnet50"], r"LICENSE has an unknown format"),
        (["--tracking.uri", NOBODY], rf"MLflow server {NOBODY} does not answer: .*--tracking\.uri"),
        (["--tracking.uri", "sqlite:////dev/null/mlflow.db"], r"/dev/null/mlflow\.db cannot be written"),
        (["--tracking.uri", "mlruns"], r"no longer keeps runs in a plain folder"),
        (["--run.storage", "/dev/null/runs"], r"Cannot write /dev/null/runs/\.writable"),
        (["--run.storage", "nothing://runs"], r"Cannot open nothing://runs"),
    ],
)
def test_a_user_error_is_explained_before_anything_starts(
    refused: Refused, config: TrainConfig, storage: Path, more: list[str], message: str
) -> None:
    start = time.monotonic()
    assert re.search(message, refused.train(config, *more))
    assert not storage.exists()
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("no_ray")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_following_the_advice_gets_a_gpu_recipe_started_on_a_cpu(
    refused: Refused, packs: dict[str, str], storage: Path, database: str
) -> None:
    given = ["--data.train", packs["train"], "--run.storage", str(storage), "--tracking.uri", database]
    complaints = []
    while True:
        complaint = refused(train_r50.main, given)
        if complaint == "error: Ray would be started now.":
            break
        advice = re.findall(r"--[a-z][\w.-]* [\w]+", complaint)
        assert advice, complaint
        assert not set(advice) & set(complaints), complaint
        complaints += advice
        given += " ".join(flag for flag in advice if flag != "--weights PATH").split()
    assert complaints == [
        "--scaling.device cpu",
        "--scaling.workers 1",
        "--scaling.cpus-per-worker 1",
        "--scaling.data-cpus 1",
        "--model.num-classes 7",
        "--weights PATH",
        "--weights none",
    ]


@pytest.mark.usefixtures("no_ray")
def test_a_run_keeps_its_configuration_and_its_data(
    refused: Refused, config: TrainConfig, packs: dict[str, str], storage: Path
) -> None:
    known = prepare_run(config).record
    (storage / "run").mkdir(parents=True)
    (storage / "run" / "config.json").write_text(json.dumps(known))
    assert refused.train(config) == "error: Ray would be started now."
    record = (storage / "run" / "config.json").read_bytes()
    complaint = refused.train(config, "--run.seed", "1", "--optimizer.lr", "0.5")
    changes = f"optimizer.lr: {config.optimizer.lr} -> 0.5; run.seed: 0 -> 1."
    assert f"{storage}/run is a run with another configuration: {changes}" in complaint
    assert "--run.name" in complaint
    complaint = refused.train(config, "--data.train", packs["val"])
    assert "the data in data.train: " in complaint
    assert (storage / "run" / "config.json").read_bytes() == record
    assert refused.train(config, "--scaling.workers", "4") == "error: Ray would be started now."


@pytest.mark.usefixtures("no_ray")
def test_a_run_of_an_earlier_version_is_left_to_it(refused: Refused, config: TrainConfig, storage: Path) -> None:
    record = prepare_run(config).record
    del record["version"]  # the first version wrote none
    model = record["config"]["model"]
    model["initialisation"] = model.pop("initialization")  # codespell:ignore
    (storage / "run").mkdir(parents=True)
    (storage / "run" / "config.json").write_text(json.dumps(record))
    complaint = refused.train(config)
    assert f"{storage}/run was started by another version" in complaint
    assert "Resume it with the version that started it, or choose another --run.name." in complaint
    assert json.loads((storage / "run" / "config.json").read_text()) == record


@pytest.mark.usefixtures("no_ray")
def test_a_folder_of_somebody_else_is_left_alone(refused: Refused, config: TrainConfig, storage: Path) -> None:
    (storage / "run").mkdir(parents=True)
    other_files(storage / "run")
    complaint = refused.train(config)
    assert f"{storage}/run is not the folder of a run: it has notes.txt but no config.json." in complaint
    assert os.listdir(storage / "run") == ["notes.txt"]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_too_few_cpus_are_refused_with_numbers(refused: Refused, config: TrainConfig, storage: Path) -> None:
    start = time.monotonic()
    complaint = refused.train(config, "--scaling.cpus-per-worker", "50", "--scaling.data-cpus", "7")
    assert re.search(
        r"The run needs 107 CPU: 2 workers with 50 CPU each, and 7 CPU for data tasks\. The cluster has \d+ CPU, "
        r"with room for 0 workers of this size\.",
        complaint,
    )
    assert "--scaling.cpus-per-worker" in complaint
    assert time.monotonic() - start < 30
    assert not (storage / "run").exists()


def train_elsewhere(config: TrainConfig, address: str, before: str = "pass") -> tuple[str, float]:
    """Run the job in a process of its own that joins the cluster at `address`; return its complaint."""
    code = f"import runpy, sys; {before}; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    start = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, "jobs/train_r50.py", *flags(config, R50_MMDET)],
        env={**os.environ, "RAY_ADDRESS": address},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 2, result.stderr
    return one_paragraph(result.stderr), time.monotonic() - start


@pytest.mark.parametrize("address", ["127.0.0.1:9", pytest.param("ray://127.0.0.1:9", marks=pytest.mark.slow)])
def test_a_cluster_that_is_not_there(config: TrainConfig, address: str) -> None:
    complaint, seconds = train_elsewhere(config, address)
    assert f"RAY_ADDRESS={address}" in complaint
    assert "refused" in complaint
    assert "unset RAY_ADDRESS" in complaint
    assert seconds < 60  # Ray itself tries for minutes; most of this is imports


@pytest.mark.ray
def test_a_cluster_of_another_version(config: TrainConfig, ray_session: str) -> None:
    complaint, _ = train_elsewhere(config, ray_session, before="import ray; ray.__version__ = '2.0.0'")
    assert re.search(r"[Vv]ersion mismatch", complaint)
    assert "This program runs Ray 2.0.0: start the cluster with the same version" in complaint


@pytest.fixture
def trained(config: TrainConfig, storage: Path) -> str:
    """Return the folder of a run with a checkpoint."""
    model = build_model(config.model)
    state = TrainingState(5, model.state_dict(), build_optimizer(model, config.optimizer).state_dict())
    folder = locate(storage) / "run"
    save(step_folder(folder, 5), state, config, open_pack(config.data.train).taxonomy)
    return str(folder)


def test_evaluating_nothing(refused: Refused, packs: dict[str, str], tmp_path: Path) -> None:
    complaint = refused(evaluate.main, ["--checkpoint", str(tmp_path / "run"), "--data", packs["val"]])
    assert f"There is nothing at {tmp_path}/run. Give a run's folder" in complaint
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    complaint = refused(evaluate.main, ["--checkpoint", str(tmp_path / "run"), "--data", packs["val"]])
    assert f"{tmp_path}/run has no complete checkpoint in checkpoints/step_*." in complaint


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_evaluating_into_somebody_elses_folder(
    refused: Refused, trained: str, packs: dict[str, str], tmp_path: Path
) -> None:
    other_files(tmp_path)
    complaint = refused(evaluate.main, ["--checkpoint", trained, "--data", packs["val"], "--output", str(tmp_path)])
    assert "notes.txt" in complaint
    assert "Choose another --output" in complaint
    assert (tmp_path / "notes.txt").read_text() == "mine"
