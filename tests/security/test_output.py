"""What jobs print about hostile names: valid UTF-8 without control characters, and no line that a name has begun.

Each job of jobs/ must be attacked at least once, on its command line and in what it reads.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image

from jobs import evaluate
from jobs.shared.cli import run
from maskformer import Taxonomy, build_model
from pipelines.cluster import submission
from pipelines.columns import width
from pipelines.config.serialize import VERSION, to_dict
from pipelines.config.train import TrainConfig
from pipelines.data.coco import CocoLayout, read_coco
from pipelines.data.pack import PackConfig, pack
from pipelines.data.synthetic import CATEGORIES, SyntheticConfig, draw_dataset
from pipelines.tracking.evaluations import EvaluatedData
from tests.checkpoints import saved
from tests.jobs.test_plan import SMALL
from tests.pipelines.data.coco_folder import SPLIT, edit_json, write_coco_folder
from tests.pipelines.evaluation.test_predictions import write_results
from tests.pipelines.tracking import versions
from tests.pipelines.training import test_replay as bundles

ROOT = Path(__file__).parents[2]
JOBS = sorted(file.stem for file in (ROOT / "jobs").glob("*.py") if file.stem != "__init__")

NAME = "\x1b[2J\x1b]0;title\x07\r\nFORGED  99.9  99.9\nerror: FORGED\u202e\u2028\x85\x9b31m\udcff"
"""Clears the terminal, sets its title, and begins lines; ends in a byte that is no UTF-8."""
UTF8 = NAME[:-1]
"""For files and folders that are read: others are refused by name, except pictures."""
TEXT = f"{NAME}{10_000 * 'x'}"
FORGED = ("FORGED", "error: FORGED")

Attack = Callable[..., "Answer"]
attacked: set[str] = set()


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str

    def refused(self) -> str:
        """Return the complaint; fail unless it is all there is: one paragraph, or the box that tyro draws."""
        assert (self.status, self.out) == (2, ""), self
        lines = self.err.splitlines()
        if lines[0].startswith("╭─"):
            assert all(line.startswith(("╭─", "│ ", "├─", "╰─")) for line in lines), self
            return self.err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self
        return lines[-1]


def checked(status: int, out: bytes, err: bytes, allowed: Iterable[int] = (0, 2)) -> Answer:
    """Return an answer whose every character is printable and whose every line is the job's own."""
    answer = Answer(status, out.decode(), err.decode())
    for text in (answer.out, answer.err):
        assert {char for char in text if not char.isprintable()} <= {"\n", "\t"}, answer
        assert not [line for line in text.splitlines() if line.strip().startswith(FORGED)], answer
    assert status in allowed, answer
    return answer


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", submission.ADDRESS, "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    for name in ("TRAIN_DATA", "VAL_DATA", "STORAGE"):
        monkeypatch.delenv(f"MASKFORMER_{name}", raising=False)


@pytest.fixture
def attack(monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]) -> Attack:
    """Return a function that runs a job in this process and returns what reached the file descriptors."""

    def call(job: str, *arguments: object, allowed: Iterable[int] = (0, 2)) -> Answer:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run(import_module(f"jobs.{job}").main)
        sys.stdout.flush()
        sys.stderr.flush()
        attacked.add(job)
        out, err = capfdbinary.readouterr()
        return checked(int(end.value.code or 0), cast(bytes, out), cast(bytes, err), allowed)

    return call


# ---- the command line


def in_a_process(arguments: list[str], environment: dict[str, str] | None = None) -> Answer:
    command = [sys.executable, *arguments]
    variables = {**os.environ, **(environment or {})}
    done = subprocess.run(list(map(os.fsencode, command)), cwd=ROOT, env=variables, capture_output=True, timeout=120)
    return checked(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("job", JOBS)
def test_arguments_that_mean_nothing(job: str) -> None:
    answer = in_a_process([f"jobs/{job}.py", NAME, f"--no-such-{NAME}", "--verbose", NAME])
    assert (answer.status, answer.out) == (2, "")
    assert "FORGED" in answer.err or "x1b" in answer.err or "required" in answer.err


def test_a_job_that_does_not_exist() -> None:
    code = "from jobs.shared.main import main; main()"
    assert r"\x1b[2J" in in_a_process(["-c", code, NAME]).refused()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_lacks_characters(encoding: str, tmp_path: Path) -> None:
    environment = {"PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"}
    answer = in_a_process(["jobs/status.py", "--run", f"{tmp_path}/猫{NAME}"], environment)
    assert "FORGED" in answer.refused()


# ---- what jobs read


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    """Return classes with names that are long, wide and full of markup; `Taxonomy` takes no control characters."""
    return Taxonomy.from_coco([{**each, "name": f"{60 * '猫'}|=1+1<script>{each['id']}"} for each in CATEGORIES])


@pytest.fixture(scope="module")
def hostile(taxonomy: Taxonomy, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pack a data set with hostile class names in a folder with a hostile name; return its parts."""
    folder = tmp_path_factory.mktemp("hostile") / UTF8
    draw_dataset(folder / "coco", SyntheticConfig(split="val", num_images=2, min_side=32, max_side=32))
    file = folder / "coco" / "annotations" / "panoptic_val.json"
    content = json.loads(file.read_text())
    content["categories"] = taxonomy.to_coco()
    file.write_text(json.dumps(content))
    output = str(folder / "packed")
    pack(read_coco(CocoLayout.find(str(folder / "coco"), "val")), output, PackConfig(), in_process=True)
    return {"pack": output, "annotations": str(file.parent)}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Return a file of settings, as somebody else might send it."""
    file = tmp_path / f"{UTF8}.json"
    file.write_text(json.dumps({"recipe": "r50_mmdet", "optimizer": {TEXT: 1}, TEXT: TEXT}))
    return file


@pytest.mark.parametrize("job", ["train_r50", "train_swin_l", "train_demo", "sweep", "plan", "view_data"])
def test_a_file_of_settings(attack: Attack, job: str, config: Path) -> None:
    assert "FORGED" in attack(job, "--config", config).refused()
    config.write_text(json.dumps({"recipe": TEXT}))
    attack(job, "--config", config).refused()
    config.write_text(f"{{{UTF8}")
    attack(job, "--config", config).refused()


@pytest.mark.parametrize("job", ["train_r50", "train_swin_l"])
def test_settings_that_name_what_is_not_there(attack: Attack, job: str, tmp_path: Path) -> None:
    place = f"{tmp_path}/{NAME}"
    for arguments in (
        ("--data.train", place, "--run.storage", place, "--run.name", "run"),
        ("--data.train", place, "--run.storage", place, "--run.name", NAME),
        ("--data.train", place, "--run.storage", place, "--weights", place, "--tracking.uri", NAME),
    ):
        attack(job, *arguments).refused()
    assert not (tmp_path / NAME).exists()


def test_a_description_of_a_hostile_pack(attack: Attack, hostile: dict[str, str]) -> None:
    answer = attack("train_r50", "--describe", "--data.train", hostile["pack"], "--weights", NAME)
    assert answer.status == 0
    assert sum(line.startswith("weights ") for line in answer.out.splitlines()) == 1


@pytest.mark.parametrize("job", ["train_demo", "sweep"])
def test_names_of_runs_and_trials(attack: Attack, job: str, hostile: dict[str, str], tmp_path: Path) -> None:
    space = ("--sweep.space", f"{NAME}=1,2") if job == "sweep" else ()
    places = ("--run.storage", f"{tmp_path}/{UTF8}", "--data.val", hostile["pack"], "--data.train", hostile["pack"])
    attack(job, *places, "--run.name", NAME, "--tracking.uri", f"sqlite:///{tmp_path}/{NAME}.db", *space).refused()
    attack(job, *places, "--run.name", TEXT, *space).refused()
    if job == "sweep":
        attack(job, *places, "--sweep.space", f"optimizer.lr={NAME}").refused()


@pytest.mark.slow
def test_a_plan_for_a_hostile_pack(attack: Attack, hostile: dict[str, str]) -> None:
    answer = attack("plan", *SMALL, "--data.train", hostile["pack"])
    assert answer.status == 0
    assert "FORGED" in answer.out


def test_pictures_of_a_hostile_pack(attack: Attack, hostile: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / UTF8
    answer = attack("view_data", "--data", hostile["pack"], "--output", output)
    assert answer.out.startswith("2 images: ")
    page = (output / "index.html").read_text()
    assert not [char for char in page if not char.isprintable() and char != "\n"]
    assert page.count("<script>") == 1
    attack("view_data", "--data", hostile["pack"], "--output", output).refused()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_the_table_of_an_evaluation(
    ray_session: str, attack: Attack, hostile: dict[str, str], taxonomy: Taxonomy, tmp_path: Path
) -> None:
    results = write_results(tmp_path / UTF8, Path(hostile["annotations"]))
    arguments = ("--predictions", results, "--data", hostile["pack"], "--scaling.cpus-per-worker", "0.5")
    answer = attack("evaluate", *arguments, "--output", tmp_path / f"{UTF8}out")
    assert answer.status == 0
    rows = [line for line in answer.out.splitlines() if line.endswith("  100.0  100.0  100.0")]
    assert 2 <= len(rows) <= taxonomy.num_classes
    assert all(row.startswith("  猫猫猫") for row in rows)
    page = (tmp_path / f"{UTF8}out" / "report.html").read_text()
    assert not [char for char in page if not char.isprintable() and char != "\n"]
    assert page.count("<script>") == 1
    (tmp_path / f"{UTF8}out" / NAME).touch()
    attack("evaluate", *arguments, "--output", tmp_path / f"{UTF8}out").refused()


def test_class_names_in_the_table() -> None:
    """Names that reach the table some other way neither begin a row nor shift one."""
    row = SimpleNamespace(tp=1, fp=0, fn=0, pq=0.5, sq=0.5, rq=1.0)
    group = SimpleNamespace(pq=0.5, sq=0.5, rq=1.0, num_classes=3)
    quality = SimpleNamespace(all=group, things=group, stuff=group, per_class={TEXT: row, 40 * "猫": row, "disk": row})
    found = SimpleNamespace(quality=quality, analysis=SimpleNamespace(intervals={}), metrics={"lost/missed": 0.5})
    lines = evaluate._table(cast(Any, found))
    rows = [line for line in lines if line.endswith("   50.0   50.0  100.0")]
    assert len(rows) == 3
    assert len(set(map(width, rows))) == 1
    assert width(rows[0]) < 300
    assert all(line.isprintable() and not line.startswith(FORGED) for line in lines)


def test_evaluations_of_what_is_not_there(attack: Attack, hostile: dict[str, str], tmp_path: Path) -> None:
    place = f"{tmp_path}/{NAME}"
    attack("evaluate", "--checkpoint", place, "--data", place).refused()
    attack("evaluate", "--checkpoint", place, "--data", hostile["pack"]).refused()
    attack("evaluate", "--predictions", place, "--data", hostile["pack"], "--output", place).refused()


def test_a_checkpoint_with_hostile_settings(
    attack: Attack, tiny: TrainConfig, taxonomy: Taxonomy, hostile: dict[str, str], tmp_path: Path
) -> None:
    """A checkpoint names its run, its recipe, MLflow's address and the data."""
    tracking = replace(tiny.tracking, uri=f"http://{TEXT}", experiment=TEXT)
    data = replace(tiny.data, train=TEXT, val=TEXT)
    settings = replace(tiny, recipe=TEXT, weights=TEXT, tracking=tracking, data=data)
    saved(settings, taxonomy, tmp_path / UTF8)
    picture = tmp_path / f"{NAME}.png"
    Image.new("RGB", (32, 32)).save(os.fsencode(picture))
    answer = attack("predict", "--checkpoint", tmp_path / UTF8, "--output", tmp_path / f"{UTF8}out", picture)
    assert "1 segmented, 0 failed" in answer.out
    attack("convert_weights", "--input", tmp_path / UTF8, "--output", tmp_path / "native", "--to", "native")
    to = ("--output", tmp_path / f"{UTF8}onnx", "--to", "huggingface")
    attack("convert_weights", "--input", tmp_path / UTF8, *to).refused()
    attack(
        "evaluate", "--checkpoint", tmp_path / UTF8, "--data", hostile["pack"], "--tracking.uri", "sqlite:////no.db"
    ).refused()


def test_names_of_pictures_and_folders(attack: Attack, tiny: TrainConfig, tmp_path: Path) -> None:
    saved(tiny, Taxonomy.from_coco(CATEGORIES), tmp_path / "run")
    folder = tmp_path / UTF8
    folder.mkdir()
    for suffix in (".jpg", ".PNG", ".webp"):
        (folder / f"{NAME}{suffix}").write_bytes(b"no picture")
    Image.new("RGB", (32, 32)).save(os.fsencode(folder / f"{NAME}good.png"), "PNG")
    model = ("--checkpoint", tmp_path / "run")
    answer = attack("predict", *model, "--output", tmp_path / f"out{UTF8}", folder, allowed=[1])
    assert "1 segmented, 3 failed" in answer.out
    assert len(answer.out.splitlines()) == 4
    json.loads((tmp_path / f"out{UTF8}" / "failed.json").read_text())
    other = tmp_path / f"{UTF8}other"
    other.mkdir()
    (other / NAME).touch()
    attack("predict", *model, "--output", other, folder).refused()
    attack("predict", *model, "--output", tmp_path / "new", f"{folder}/no{NAME}.png").refused()
    listed = tmp_path / f"{UTF8}.txt"
    listed.write_bytes(os.fsencode(f"{folder}/\x1b[2J.png\r\x07\udcff\n"))
    attack("predict", *model, "--output", tmp_path / "new", f"@{listed}").refused()


def test_names_of_tensors_and_categories(attack: Attack, tmp_path: Path) -> None:
    tensors = {**build_model(bundles.CONFIG.model).state_dict(), NAME: torch.zeros(1), TEXT: torch.zeros(1)}
    file = tmp_path / f"{UTF8}.pth"
    torch.save(tensors, file)
    categories = tmp_path / f"{UTF8}.json"
    categories.write_text(json.dumps([{"id": 1, "name": TEXT, "isthing": 1}, {"id": 1, "name": NAME, "isthing": 0}]))
    to = ("--output", tmp_path / f"{UTF8}out", "--to", "mmdet")
    attack("convert_weights", "--input", file, *to)
    attack("convert_weights", "--input", file, *to, "--categories", categories).refused()
    attack("convert_weights", "--input", categories, *to).refused()
    categories.write_text(json.dumps({NAME: TEXT}))
    attack("convert_weights", "--input", file, *to, "--categories", categories).refused()


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_names_in_a_data_set(ray_session: str, attack: Attack, tmp_path: Path) -> None:
    folder = tmp_path / UTF8
    write_coco_folder(folder)
    pictures = sorted((folder / SPLIT).iterdir())
    pictures[0].rename(folder / SPLIT / f"{UTF8}.jpg")

    def change(document: dict[str, Any]) -> None:
        document["images"][0]["file_name"] = f"{UTF8}.jpg"
        document["annotations"][0]["file_name"] = f"missing{NAME}.png"
        document["annotations"][1]["segments_info"][0]["category_id"] = 999

    edit_json(folder, change)
    data = ("--input", folder, "--split", SPLIT)
    answer = attack("prepare_data", *data, "--check", "--report", tmp_path / f"{UTF8}.json", allowed=[1, 2])
    assert "FORGED" in answer.out + answer.err
    edit_json(folder, lambda document: document["categories"][0].update(name=TEXT))
    attack("prepare_data", *data, "--check", allowed=[1, 2])
    attack("prepare_data", *data, "--output", tmp_path / f"{UTF8}packed", allowed=[1, 2])


def test_a_data_set_that_is_not_there(attack: Attack, tmp_path: Path) -> None:
    attack("prepare_data", "--input", tmp_path / UTF8, "--split", NAME, "--check").refused()
    classes = tmp_path / f"{UTF8}.yaml"
    classes.write_text('rename: {"\\e[2J\\nFORGED": [}')
    write_coco_folder(tmp_path / "coco")
    data = ("--input", tmp_path / "coco", "--split", SPLIT, "--check")
    attack("prepare_data", *data, "--classes", classes).refused()
    classes.write_text('"\\e[2J\\nFORGED": {"\\e[2J\\nFORGED": 1}')
    attack("prepare_data", *data, "--classes", classes).refused()


def test_names_in_a_registry(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    model = "model\x1b[2J\nFORGED\u202e"
    printable_hash = "\x1b[2J\nFORGED"
    for good in (0, 20):
        number, model_id = versions.new_version(uri, model)
        data = EvaluatedData(name=f"{NAME[:-1]}", hash="a1" * 32, uri=NAME[:-1], num_images=versions.IMAGES)
        versions.evaluate(uri, model_id, good, data)
    registry = ("--tracking.uri", uri, "--model", model)
    assert "FORGED" in attack("promote", *registry, "--version", "1").out
    assert "FORGED" in attack("promote", *registry, "--version", number).out
    attack("promote", *registry, "--version", "9").refused()
    attack("promote", *registry, "--version", "1", "--data", printable_hash).refused()
    attack("promote", *registry, "--version", "1", "--alias", NAME).refused()
    attack("promote", *registry, "--rollback", "--alias", "other").refused()
    attack("promote", "--tracking.uri", uri, "--model", NAME[:-1], "--version", "1").refused()
    attack("promote", "--tracking.uri", NAME, "--model", model, "--version", "1").refused()
    client = versions.MlflowClient(uri)
    client.set_registered_model_tag(model, "history.champion", f"[{NAME[:-1]}")
    attack("promote", *registry, "--rollback").refused()


def test_a_bundle_of_somebody_else(attack: Attack, tmp_path: Path) -> None:
    settings = replace(bundles.CONFIG, run=replace(bundles.CONFIG.run, name=UTF8))
    folder = bundles.write(tmp_path / UTF8, bundles.new_network(), settings)
    answer = attack("replay", "--bundle", folder)
    assert (answer.status, "FORGED" in answer.out) == (0, True)
    attack("replay", "--bundle", tmp_path / f"{NAME}no").refused()
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        file.write_text(json.dumps({TEXT: TEXT, "version": TEXT}))
        attack("replay", "--bundle", folder).refused()
        file.write_bytes(content)


def test_records_of_runs(attack: Attack, tmp_path: Path) -> None:
    storage = tmp_path / UTF8
    event = {"event": "end", "time": 5.0, "attempt": 1, "status": TEXT, "cause": TEXT, "cause_class": TEXT}
    for name in (UTF8, "猫猫猫", "short"):
        folder = storage / name
        folder.mkdir(parents=True)
        record = {"version": VERSION, "total_steps": 40, "mlflow_run_id": TEXT}
        record["config"] = {"tracking": {"uri": TEXT}}
        (folder / "config.json").write_text(json.dumps(record))
        (folder / "ledger.jsonl").write_text(json.dumps({**event, "event": "start"}) + "\n" + json.dumps(event) + "\n")
        (folder / "status.json").write_text(json.dumps({"phase": TEXT, "time": 4.0, TEXT: TEXT}))
        assert "FORGED" in attack("status", "--run", folder).out
    rows = attack("status", "--run", storage).out.splitlines()
    assert len(rows) == 4
    assert rows[0].startswith("run ")
    shorter = [row.replace("猫", "xx") for row in rows]  # a wide character takes two columns
    assert len({row.index(r"\x1b[2J\x1b]0;title", 60) for row in shorter[1:]}) == 1
    attack("status", "--run", storage, "--json")
    attack("status", "--run", storage / NAME).refused()


def test_what_a_cluster_answers(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / NAME
    for name in ("jobs/train_r50.py", "maskformer/model.py", f"{NAME}.bin"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(bytes(2**20))
    monkeypatch.chdir(root)
    command = ("--", "python", "jobs/train_r50.py")
    attack("submit", "--max-mib", "1", *command).refused()
    attack("submit", "--address", NAME, *command).refused()
    attack("submit", "--address", f"http://127.0.0.1:9/{NAME}", *command).refused()
    attack("submit", "--env", NAME, *command).refused()
    attack("submit", "--", "python", NAME).refused()
    attack("submit", "--", "python", f"{NAME}.py").refused()

    class Cluster:
        """Answers as a client of Ray does, with words of its own."""

        status = "FAILED"

        def submit_job(self, **options: Any) -> str:
            if options["submission_id"] == "taken":
                raise RuntimeError(f"already exists {NAME}")
            return NAME

        async def tail_job_logs(self, name: str) -> Any:
            for lines in ("\x1b[31mone\x1b[0m\n", f"two{NAME.replace('FORGED', 'THEIRS')}\n", "\x1b"):
                yield lines

        def get_job_info(self, name: str) -> Any:
            message = f"error: it failed{TEXT}"
            return SimpleNamespace(status=submission.JobStatus(self.status), driver_exit_code=2, message=message)

    monkeypatch.setenv(submission.ADDRESS, "http://127.0.0.1:9")
    monkeypatch.setattr(submission, "connect", lambda address: Cluster())
    answer = attack("submit", "--name", NAME, "--max-mib", "50", *command)
    assert (answer.status, answer.out.splitlines()[1]) == (2, "one")
    attack("submit", "--name", "taken", "--max-mib", "50", *command).refused()
    monkeypatch.setattr(Cluster, "status", "SUCCEEDED")
    attack("submit", "--name", NAME, "--max-mib", "50", *command)
    attack("submit", "--no-wait", "--max-mib", "50", *command)


def test_the_training_of_a_run_that_is_another(
    attack: Attack, packs: dict[str, str], tiny: TrainConfig, tmp_path: Path
) -> None:
    """The record in the folder of the run is not that of this configuration."""
    (tmp_path / "run").mkdir()
    values = to_dict(tiny)
    values["weights"], values["recipe"] = TEXT, TEXT
    record = {"version": VERSION, "config": values, "data_hash": TEXT, "total_steps": TEXT, "mlflow_run_id": TEXT}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    data = ("--data.train", packs["train"], "--data.val", packs["val"], "--model.num-classes", "7")
    common = ("--weights", "none", "--scaling.device", "cpu", "--run.storage", tmp_path, "--run.name", "run")
    for job in ("train_r50", "train_swin_l"):
        attack(job, *data, *common).refused()


def test_each_job_was_attacked(request: pytest.FixtureRequest) -> None:
    """A new job needs a test here. Skipped if only some of the tests run."""
    if request.session.testscollected and len(request.session.items) < 20:
        pytest.skip("only some tests run")
    assert attacked == set(JOBS)
