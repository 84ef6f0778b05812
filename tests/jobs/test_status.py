"""What jobs/status.py says about runs in every state, on disk and on S3, and about folders that are none."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs import status
from jobs.shared.cli import run
from pipelines.storage import Location, locate

ROOT = Path(__file__).parents[2]

START = {"event": "start", "attempt": 1, "step": 0, "workers": 2}
SPLIT = {"first_batch": 1.0, "steps": 51.0}


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    return locate(tmp_path if request.param == "local" else request.getfixturevalue("bucket") + "/runs")


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/status.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run(status.main)
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


def write_run(
    folder: Location, events: list[dict[str, Any]], last: dict[str, Any] | None, steps: tuple[int, ...] = (10, 20)
) -> None:
    config = {
        "config": {"tracking": {"uri": "http://me:secret@tracking:5000"}},
        "total_steps": 40,
        "mlflow_run_id": "abc1",
    }
    (folder / "config.json").write_text(json.dumps(config))
    if events:
        (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if last is not None:
        (folder / "status.json").write_text(json.dumps(last))
    for step in steps:
        (folder / "checkpoints" / f"step_{step:08d}" / "manifest.json").write_text("{}")


def started(now: float) -> dict[str, Any]:
    """Return the event of an attempt that began 106 seconds before `now`."""
    return {**START, "time": now - 100, "began": now - 106, "entered": now - 101, "restored": now - 100}


def training(now: float, age: float) -> dict[str, Any]:
    """Return a status of that attempt, `age` seconds old."""
    figures = {"step": 25, "total": 40, "loss": 1.25, "images_per_second": 12.345, "eta_seconds": 42.0}
    split = {"first_batch": 10.0, "steps": 90.0 - age}
    times = {"time": now - age, "began": now - 106, "until": now - age, "split": split}
    return {"attempt": 1, "phase": "training", **figures, **times}


def end(now: float, state: str, **facts: Any) -> dict[str, Any]:
    return {"event": "end", "time": now - 5, "attempt": 1, "status": state, "step": 40, "cause_class": "user", **facts}


def test_a_running_run(ask, storage: Location) -> None:
    now = time.time()
    folder = storage / "run"
    write_run(folder, [started(now)], training(now, 2.0), steps=(10, 20))
    # The checkpoint that is being written is not complete.
    (folder / "checkpoints" / "step_00000030" / "state.pt").write_text("half")
    (folder / "checkpoints" / "notes" / "manifest.json").write_text("{}")
    (folder / "best.json").write_text('{"step": 10, "quick_pq": 0.312}')
    code, out, err = ask("--run", folder)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:4] == [
        f"{folder}: running, training",
        "  step 25 of 40 (62.5 %), loss 1.2500, 12.3 images/s, 42.0 s left",
        "  checkpoints: newest step 20; best step 10, quick PQ 31.2",
        "  MLflow run abc1 at http://tracking:5000",
    ]
    assert lines[4].startswith("Goodput 84.6 %: of 0:01:44, 88.0 s were new steps.")
    assert "secret" not in out


def test_a_dead_run(ask, storage: Location) -> None:
    now = time.time()
    write_run(storage / "run", [started(now)], training(now, 80.0))
    _, out, _ = ask("--run", storage / "run")
    assert out.splitlines()[0].startswith(f"{storage}/run: dead: no sign of its driver for ")
    silent = float(out.split("driver for ")[1].split(" s;")[0])
    assert 80 <= silent < 99
    assert out.splitlines()[1] == "  step 25 of 40 (62.5 %), loss 1.2500"


@pytest.mark.parametrize(
    ("state", "cause", "line"),
    [
        ("finished", "", "finished"),
        ("stopped", "", "stopped"),
        ("failed", "worker 1: MemoryError", "failed: worker 1: MemoryError"),
        ("interrupted", "KeyboardInterrupt", "interrupted: KeyboardInterrupt"),
    ],
)
def test_a_run_that_ended(ask, tmp_path: Path, state: str, cause: str, line: str) -> None:
    now = time.time()
    folder = locate(tmp_path / "run")
    facts = {"until": now - 7, "split": {"first_batch": 10.0, "steps": 83.0}}
    ended = {**training(now, 1.0), "phase": "ended"}
    write_run(folder, [started(now), end(now, state, cause=cause, **facts)], ended, steps=())
    code, out, _ = ask("--run", folder)
    assert code == 0
    lines = out.splitlines()
    assert lines[0] == f"{folder}: {line}"
    assert lines[2] == "  checkpoints: none"
    assert "left" not in lines[1]
    assert lines[4].startswith("Goodput 82.2 %: of 0:01:41, 83.0 s were new steps.")


def test_how_alive_a_run_is(ask, tmp_path: Path) -> None:
    now = time.time()
    later = {"attempt": 2, "began": now - 2, "phase": "starting", "time": now - 1}
    stopped = end(now, "stopped")
    cases = {
        "resumed": ([started(now), stopped], later, "running"),
        "just-begun": ([], {"attempt": 1, "began": now - 1, "phase": "starting", "time": now}, "running"),
        "waiting": ([], {"attempt": 0, "phase": "waiting for resources", "time": now}, "running"),
        "left": ([started(now)], {**training(now, 3.0), "phase": "ended"}, "dead"),
        "clock-ahead": ([started(now)], training(now, -30.0), "running"),
        "far-future": ([started(now)], training(now, -1e6), "dead"),
        "no-status": ([started(now)], None, "dead"),
        "only-config": ([], None, "not started"),
    }
    for name, (events, last, _) in cases.items():
        write_run(locate(tmp_path / name), events, last)
    _, out, _ = ask("--run", tmp_path, "--json")
    found = {report["run"].rpartition("/")[2]: report["state"] for report in json.loads(out)}
    assert found == {name: state for name, (_, _, state) in cases.items()}


def test_several_runs_in_a_line_each(ask, storage: Location) -> None:
    now = time.time()
    write_run(storage / "a", [started(now)], training(now, 2.0))
    write_run(storage / "b", [started(now), end(now, "finished")], None, steps=())
    (storage / "data" / "manifest.json").write_text("{}")
    (storage / "model" / "config.json").write_text('{"architectures": []}')
    (storage / "mlflow.db").write_text("x")
    code, out, _ = ask("--run", storage)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["run", "a", "b"]
    assert rows[1] == ["a", "running", "25", "of", "40", "(62.5", "%)", "20", "42.0", "s", "84.6", "%", "0"]
    assert rows[2][:5] == ["b", "finished", "40", "of", "40"]


def test_json_has_everything(ask, tmp_path: Path) -> None:
    now = time.time()
    folder = locate(tmp_path / "run")
    write_run(folder, [started(now)], training(now, 2.0))
    report = json.loads(ask("--run", folder, "--json")[1])
    assert (report["step"], report["total"], report["newest_checkpoint"]) == (25, 40, 20)
    assert report["goodput"]["attempts"][0]["workers"] == 2
    assert report["goodput"]["seconds"]["steps"] == pytest.approx(88, abs=1e-3)
    assert report["goodput"]["metrics"]["goodput/attempts"] == 1
    assert report["goodput"]["metrics"]["goodput/useful_share"] == pytest.approx(88 / 104)


def test_the_number_of_attempts_listed(ask, tmp_path: Path) -> None:
    failures = [
        {"event": "failure", "time": float(turn + 1), "began": float(turn), "attempt": turn + 1, "cause": "no node"}
        for turn in range(30)
    ]
    write_run(locate(tmp_path / "run"), failures, None)
    listed = {n: ask("--run", tmp_path / "run", "--attempts", n)[1].count("  attempt ") for n in (0, 3, 100)}
    assert listed == {0: 0, 3: 3, 100: 30}
    code, _, err = ask("--run", tmp_path / "run", "--attempts", -1)
    assert code == 2
    assert err.startswith("error: --attempts is -1. ")


def test_damaged_files_are_noted(ask, tmp_path: Path) -> None:
    now = time.time()
    folder = locate(tmp_path / "run")
    write_run(folder, [started(now), end(now, "finished")], None)
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"event": "start", "ti')
    for name in ("config.json", "status.json", "best.json"):
        (folder / name).write_text('["half')
    code, out, err = ask("--run", folder)
    assert (code, err) == (0, "")
    assert out.startswith(f"{folder}: finished\n  step 40\n")
    assert [line for line in out.splitlines() if line.startswith("note: ")] == [
        "note: 1 damaged line(s) of ledger.jsonl are left out.",
        "note: status.json is damaged and left out.",
        "note: config.json is damaged and left out.",
        "note: best.json is damaged and left out.",
    ]


HOSTILE = "\x1b]0;title\x07\r\x1b[2Jok \u202e\u2028\x85\ud800"


@pytest.mark.parametrize("value", [HOSTILE, None, 1e400, -1, [HOSTILE], {HOSTILE: HOSTILE}, True, 10**30])
def test_hostile_files(ask, tmp_path: Path, value: Any) -> None:
    """Whatever stands in the files, the answer is a page of plain text, or plain JSON."""
    now = time.time()
    facts = [started(now), end(now, "finished", cause="", until=now, split=SPLIT), training(now, 2.0)]
    record = {"config": {"tracking": {"uri": "x"}}, "total_steps": 40, "mlflow_run_id": "abc1"}
    best = {"step": 1, "quick_pq": 0.5}
    objects: dict[str, dict[str, Any]] = dict(zip(("start", "end", "status"), facts, strict=True))
    objects |= {"config": record, "best": best}
    for name, key in [(name, key) for name, values in objects.items() for key in values] + [("uri", "uri")]:
        changed = {each: {**values, key: value} if each == name else values for each, values in objects.items()}
        if name == "uri":
            changed["config"] = {**record, "config": {"tracking": {"uri": value}}}
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "ledger.jsonl").write_text(f"{json.dumps(changed['start'])}\n{json.dumps(changed['end'])}\n")
        for file in ("status", "config", "best"):
            (folder / f"{file}.json").write_text(json.dumps(changed[file]))
        for arguments in (("--run", folder), ("--run", tmp_path), ("--run", folder, "--json")):
            code, out, err = ask(*arguments)
            assert (code, err) == (0, "")
            assert out.replace("\n", "").isprintable(), (name, key)
            out.encode()
        json.loads(out, parse_constant=pytest.fail)  # no NaN


def test_a_name_with_control_characters(ask, tmp_path: Path) -> None:
    write_run(locate(tmp_path / "a\x1b[31m\nb"), [], None)
    for folder in (tmp_path, tmp_path / "a\x1b[31m\nb"):
        code, out, _ = ask("--run", folder)
        assert code == 0
        assert "a\\x1b[31m\\nb" in out
        assert "\x1b" not in out


def test_folders_that_are_no_run(ask, storage: Location) -> None:
    (storage / "data" / "manifest.json").write_text("{}")
    (storage / "run" / "checkpoints" / "step_00000010" / "config.json").write_text('{"config": {}, "categories": []}')
    (storage / "odd" / "\x1b[2J").write_text("")
    for name, found in {
        "data": "holds 'manifest.json'",
        "run/checkpoints": "holds 'step_00000010'",
        "run/checkpoints/step_00000010": "holds 'config.json'",
        "missing": "is empty or does not exist",
        "odd": "holds '\\x1b[2J'",
    }.items():
        code, out, err = ask("--run", f"{storage}/{name}")
        assert (code, out) == (2, "")
        assert err == (
            f"error: {storage}/{name} is not the folder of a run or of several runs: it {found}. "
            f"Give --run <storage>/<run name>, or the storage.\n"
        )


def test_a_file_is_no_run(ask, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    code, out, err = ask("--run", tmp_path / "file")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: Cannot list {tmp_path}/file: ")
    assert err.count("\n") == 1


def test_neither_ray_nor_torch_is_imported(tmp_path: Path) -> None:
    """A machine that only looks at runs starts in a moment, and does not join a cluster."""
    now = time.time()
    write_run(locate(tmp_path / "run"), [started(now)], training(now, 2.0))
    code = (
        "import sys; sys.argv = ['status.py', '--run', sys.argv[1]]\n"
        "from jobs.status import main; main()\n"
        "print(sorted({'ray', 'torch', 'mlflow', 'boto3'}.intersection(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
