"""Jobs sent to a cluster: what is sent, what is refused beforehand, and whole rounds on a real head node."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs import submit, train_r50
from pipelines.checkpoints import state as checkpoint
from pipelines.cluster import submission
from pipelines.config.recipes import R50_MMDET
from pipelines.config.train import TrainConfig
from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.training import ledger
from tests import ray_nodes
from tests.jobs.command_line import flags
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
TRAIN = ("python", "jobs/train_r50.py")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a small project with our ignore files, and with everything that must not be sent."""
    root = tmp_path / "project"
    for name in ("jobs/train_r50.py", "maskformer/model.py", "pipelines/data/pack.py", "pyproject.toml", "sweep.json",
                 "tests/jobs/shared/test_cli.py", "docs/demo.png", "cluster/README.md", ".ci/settings", "mlflow.db",
                 ".git/objects/aa/bb",
                 ".venv/bin/python", ".venv/lib/python3.11/x.py", "jobs/__pycache__/cli.pyc", ".hypothesis/unicode/a",
                 "maskformer_ray.egg-info/PKG-INFO", "runs/demo/config.json", "packed/train/shard-00000.parquet",
                 ".pytest_cache/v/cache/lastfailed", ".ruff_cache/0.1/a", "mlruns/0/meta.yaml"):  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, root)
    return root


def test_what_a_job_needs_is_sent_and_nothing_else(project: Path, tmp_path: Path) -> None:
    wanted = {"jobs/train_r50.py", "maskformer/model.py", "pipelines/data/pack.py", "pyproject.toml", "sweep.json"}
    assert submission.sent_files(project).keys() == wanted | {".gitignore", ".rayignore"}
    # The same from Ray itself.
    package = tmp_path / "package.zip"
    excludes = get_runtime_env_default_excludes()
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as content:
        sizes = {file.filename: file.file_size for file in content.infolist() if not file.is_dir()}
    assert submission.sent_files(project) == sizes


def test_the_project_itself_is_small_and_complete() -> None:
    sent = submission.sent_files(ROOT)
    modules = {
        file.relative_to(ROOT).as_posix()
        for package in ("jobs", "maskformer", "pipelines")
        for file in (ROOT / package).rglob("*.py")
    }
    assert modules | {"pyproject.toml"} <= sent.keys()
    assert not [name for name in sent if name.startswith(("tests/", "cluster/", ".venv/", ".git/"))]
    assert sum(sent.values()) < 2 * submission.MIB


Refused = Callable[..., str]


@pytest.fixture
def refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Return a function that calls jobs/submit.py in `project` and returns its complaint."""
    monkeypatch.chdir(project)
    for name in ("RAY_ADDRESS", submission.ADDRESS):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["submit.py", *arguments])
        with pytest.raises(UserError) as refusal:
            submit.main()
        assert "\n" not in str(refusal.value)
        return str(refusal.value)

    return call


def test_another_folder_is_refused(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path} is not the root of the project" in refused("--", *TRAIN)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ([], "A command with a script of the project is needed after `--`, got nothing"),
        (["--", "python", "-m", "jobs.train_r50"], "is needed after `--`, got: python -m jobs.train_r50"),
        (["--", "python", "jobs/train.py"], "The script jobs/train.py will not be on the cluster: it is not in /"),
        (["--", "python", "/app/jobs/train_r50.py"], "The script /app/jobs/train_r50.py will not be on the cluster"),
        (["--", "python", "tests/jobs/shared/test_cli.py"], "it is excluded by .gitignore or .rayignore"),
    ],
)
def test_a_command_that_cannot_run_there_is_refused(refused: Refused, command: list[str], complaint: str) -> None:
    assert complaint in refused(*command)


def test_too_much_to_send_is_refused_with_the_largest(refused: Refused, project: Path) -> None:
    (project / "photographs" / "holiday").mkdir(parents=True)
    for number in range(3):
        (project / "photographs" / "holiday" / f"{number}.jpg").write_bytes(bytes(submission.MIB))
    (project / "weights.pth").write_bytes(bytes(submission.MIB // 2))
    complaint = refused("--max-mib", "1", "--", *TRAIN)
    assert re.search(r"too large to send: 3\.5 MiB in 11 files, and the limit is 1 MiB\.", complaint)
    assert "The largest: photographs/ 3.0 MiB, weights.pth 0.5 MiB, " in complaint
    assert ".rayignore" in complaint
    (project / ".rayignore").write_text("/photographs\n")
    assert "No address to submit jobs to is set." in refused("--max-mib", "1", "--", *TRAIN)


SECRET_FILES = (
    ".env", ".env.production", "deploy/prod.env", ".netrc", ".aws/config", ".kube/config", ".ssh/known_hosts", ".npmrc",
    ".docker/config.json", ".git-credentials", ".pypirc", ".pgpass", "keys/id_rsa", "id_ed25519", "tls/server.pem",
    "TLS/Server.KEY", "a.p12", "a.pfx", "a.jks", ".ray/auth_token", "github-token.txt", "credentials",
    "my-credentials.json", "client_secret_1.json", "my-service-account.json", "secrets.yaml", "kubeconfig",
    ".config/gcloud/x", ".envrc", "kaggle.json", "password.txt", "openai_api_key.txt", "keys/id_rsa.bak",
    "main.tfstate", "aws_credentials", ".config/gh/hosts.yml",
)  # fmt: skip
OTHER_FILES = (
    ".env.example", "tokenizer.json", "jobs/token.py", "environment.yaml", "keys.py", "monkey.txt", "id_rsa.pub",
    "settings.json", "docs-of-mine/secrets.md", "token_classes.txt", "added_tokens.json",
    "tokens.txt", "password.py",
)  # fmt: skip


def put(root: Path, names: Sequence[str], content: str = "{}") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@pytest.mark.parametrize("name", SECRET_FILES)
def test_a_file_that_looks_like_a_credential_is_not_sent(refused: Refused, project: Path, name: str) -> None:
    (project / ".rayignore").write_text("/mlflow.db\n")
    put(project, [name])
    complaint = refused("--", *TRAIN)
    assert "Nothing was sent: these files look like credentials" in complaint
    assert f"could read them: {name}. List them in .rayignore" in complaint
    (project / ".rayignore").write_text(f"/mlflow.db\n/{name}\n")
    assert "No address to submit jobs to is set." in refused("--", *TRAIN)


@pytest.mark.parametrize(
    "content",
    [
        "-----BEGIN PRIVATE KEY-----\nMIIE",
        "\n-----BEGIN OPENSSH PRIVATE KEY-----\nb3Bl",
        "-----BEGIN RSA PRIVATE KEY-----",
        "PuTTY-User-Key-File-3: x",
    ],
)
def test_a_private_key_is_recognized_by_its_content(refused: Refused, project: Path, content: str) -> None:
    put(project, ["notes.md"], content)
    assert "could read them: notes.md. List" in refused("--", *TRAIN)
    put(project, ["notes.md"], f"Keys begin with {content}")
    put(project, ["account.json"], '{"type": "service_account", "private_key": "x"}')
    assert "could read them: account.json. List" in refused("--", *TRAIN)


def test_all_such_files_are_listed_up_to_a_number(refused: Refused, project: Path) -> None:
    put(project, [f"{number:02d}.pem" for number in range(25)])
    complaint = refused("--", *TRAIN)
    assert all(f"{number:02d}.pem" in complaint for number in range(10))
    assert "09.pem and 15 more. List" in complaint


def test_files_with_ordinary_names_are_sent(refused: Refused, project: Path) -> None:
    put(project, OTHER_FILES)
    assert set(OTHER_FILES) <= submission.sent_files(project).keys()
    assert "No address to submit jobs to is set." in refused("--", *TRAIN)


def test_links_out_of_the_folder_are_refused(refused: Refused, project: Path, tmp_path: Path) -> None:
    put(tmp_path / "home", ["notes.txt", "deep/er/x.txt"])
    (project / "data").symlink_to(tmp_path / "home")
    (project / "jobs" / "notes.txt").symlink_to("../../home/notes.txt")
    (project / "again").symlink_to(".")
    (project / "loop").symlink_to("loop")
    complaint = refused("--", *TRAIN)
    for link in (f"again -> ., data -> {tmp_path}/home", "jobs/notes.txt -> ../../home/notes.txt", "loop -> loop"):
        assert link in complaint
    (project / ".rayignore").write_text("/data\n/jobs/notes.txt\n/again\n/loop\n/mlflow.db\n")
    (project / "alias.py").symlink_to("jobs/train_r50.py")
    (project / "aliases").symlink_to("pipelines")
    assert {"alias.py", "aliases/data/pack.py"} <= submission.sent_files(project).keys()
    assert "No address to submit jobs to is set." in refused("--", *TRAIN)


def test_a_command_or_address_with_a_password_is_refused(refused: Refused) -> None:
    for arguments in (
        ("--address", "http://me:secret@127.0.0.1:9", "--", *TRAIN),
        ("--", *TRAIN, "--tracking.uri", "http://me:secret@127.0.0.1:9"),
    ):
        complaint = refused(*arguments)
        assert "http://127.0.0.1:9 has a user name, password, key or token in it" in complaint
        assert "RAY_AUTH_TOKEN" in complaint
        assert "secret" not in complaint


def test_variables_that_others_can_read_are_named(caplog: pytest.LogCaptureFixture) -> None:
    submission.environment(["AWS_SECRET_ACCESS_KEY=abc", "HF_TOKEN=def", "DB_PASSWORD=ghi", "BATCH=4"])
    [message] = caplog.messages
    assert "can read the value of AWS_SECRET_ACCESS_KEY, HF_TOKEN, DB_PASSWORD." in message
    assert not [value for value in ("abc", "def", "ghi", "BATCH") if value in message]


def test_variables_are_given_or_taken_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERE", "a=b")
    assert submission.environment(["HERE", "THERE=c=d", "EMPTY="]) == {"HERE": "a=b", "THERE": "c=d", "EMPTY": ""}


@pytest.mark.parametrize(("setting", "complaint"), [("ABSENT", "--env ABSENT=VALUE"), ("a b=1", "got 'a b'.")])
def test_variables_that_mean_nothing_are_refused(refused: Refused, setting: str, complaint: str) -> None:
    assert complaint in refused("--env", setting, "--", *TRAIN)


def test_an_address_is_needed(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No address to submit jobs to is set." in refused("--", *TRAIN)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert "Jobs cannot be submitted to 10.0.0.1:6379." in refused("--", *TRAIN)


def test_nobody_at_the_address(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    [port] = ray_nodes.free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"http://127.0.0.1:{port}")  # used if it is a dashboard's
    assert f"Nothing answers at http://127.0.0.1:{port}: [Errno 111] Connection refused." in refused("--", *TRAIN)
    monkeypatch.setenv(submission.ADDRESS, "http://127.0.0.1:9")  # rather than RAY_ADDRESS
    assert "Nothing answers at http://127.0.0.1:9: " in refused("--", *TRAIN)
    assert f"Nothing answers at http://localhost:{port}: " in refused(
        "--address", f"http://localhost:{port}", "--", *TRAIN
    )


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Serve on loopback, answering everything with the attributes `status` and `body`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(self.server.status)  # pyright: ignore[reportAttributeAccessIssue]
            self.send_header("Content-Length", str(len(self.server.body)))  # pyright: ignore[reportAttributeAccessIssue]
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(self.server.body)  # pyright: ignore[reportAttributeAccessIssue]

        do_HEAD = do_PUT = do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as serving:
        threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
        yield serving
        serving.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (200, b'{"ray_version": "2.44.1"}', f"runs Ray 2.44.1, this program Ray {ray.__version__}."),
        (401, b"Missing token", "no token was sent (401). Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        (403, b"Wrong token", "the token that was sent is wrong (403). Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        (404, b"", "is not Ray's dashboard (HTTP status 404)"),
        (200, b"<html>MLflow</html>", "is not Ray's dashboard (JSONDecodeError"),
        (200, b"[1]", "is not Ray's dashboard (TypeError"),
    ],
)
def test_who_answers_is_looked_at(refused: Refused, server: Any, status: int, body: bytes, complaint: str) -> None:
    server.status, server.body = status, body
    address = f"http://127.0.0.1:{server.server_port}"
    said = refused("--address", address, "--", *TRAIN)
    assert address in said
    assert complaint in said


def test_who_is_not_a_web_server_is_looked_at(refused: Refused) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with listening.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=answer, daemon=True).start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert "is not Ray's dashboard (BadStatusLine: SSH-2.0" in refused("--address", address, "--", *TRAIN)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("INFO reading\nerror: There is no pack.\n2026 core_worker shutting down\n", "error: There is no pack."),
        ("Traceback (most recent call last):\n  File x\nray.exceptions.RayError: a\n", "ray.exceptions.RayError: a"),
        ("Running entrypoint\nKilled\n", "Killed"),
        ("", "its log is empty"),
    ],
)  # fmt: skip
def test_the_cause_is_found_in_the_log(log: str, cause: str) -> None:
    assert submission.cause(log) == cause


def test_a_mistake_ends_with_status_2_and_one_paragraph(tmp_path: Path) -> None:
    end = subprocess.run(
        [sys.executable, ROOT / "jobs/submit.py", "--", *TRAIN], cwd=tmp_path, capture_output=True, text=True
    )
    assert (end.returncode, end.stdout) == (2, "")
    assert re.fullmatch(r"error: .* is not the root of the project: .*\n", end.stderr)


@pytest.mark.parametrize("metadata", ["disabled", pytest.param("silent", marks=pytest.mark.slow)])
def test_credentials_that_are_missing_are_named(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: str
) -> None:
    server.status, server.body = 403, b"<Error><Code>AccessDenied</Code></Error>"
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    arguments = ["--scaling.device", "cpu", "--tracking.uri", "http://127.0.0.1:9",
                 "--data.train", "s3://nowhere/packed", "--run.storage", "s3://nowhere/runs"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["train_r50.py", *arguments])
    with socket.create_server(("127.0.0.1", 0)) as hole:  # connects and says nothing, as outside of a cloud
        if metadata == "disabled":
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        else:
            monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UserError) as refusal:
            train_r50.main()
    seconds = time.monotonic() - start
    assert seconds < 30
    assert (seconds > 5) == (metadata == "silent")  # or the hole was not asked
    complaint = str(refusal.value)
    assert re.match(r"Cannot access s3://nowhere/packed/manifest.json: .*ACCESS_DENIED", complaint)
    assert (
        "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, which are not set here, or a role of the machine)" in complaint
    )
    assert "AWS_ENDPOINT_URL" in complaint


# ---- on a real head node

STEPS, EVERY = 60, 1000  # whatever is saved before the last step is saved by a stop


@pytest.fixture(scope="module")
def head() -> Iterator[ray_nodes.Head]:
    # RAY_JOB_STOP_WAIT_TIME_S is not set here: jobs/submit.py brings it along.
    environment = {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    with ray_nodes.head(environment) as started:
        yield started


Submit = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def submitted(head: ray_nodes.Head, tmp_path: Path) -> Iterator[Submit]:
    """Return a function that starts jobs/submit.py and collects what it prints in a file."""
    started: list[subprocess.Popen[str]] = []

    def start(log: str, *arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"], submission.ADDRESS: head.dashboard}
        environment |= {"RAY_AUTH_MODE": "disabled", **variables}
        with (tmp_path / log).open("w") as file:
            job = subprocess.Popen(
                [sys.executable, str(ROOT / "jobs/submit.py"), *arguments],
                cwd=cwd, env=environment, stdout=file, stderr=file, text=True, start_new_session=True,
            )  # fmt: skip
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()
        job.wait()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_round_from_the_folder_to_a_checkpoint(
    tiny: TrainConfig, head: ray_nodes.Head, submitted: Submit, tmp_path: Path
) -> None:
    # Only what is sent, with another text where it counts: the cluster must not run the installed package.
    copy = tmp_path / "copy"
    for name in submission.sent_files(ROOT):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    driver = copy / "pipelines/training/driver.py"
    driver.write_text(driver.read_text() + "\nlogger.error('sent with the job')\n")
    nowhere = replace(tiny, data=replace(tiny.data, train=""), run=replace(tiny.run, storage="", steps=2))
    job = submitted(
        "log", "--name", "round", "--env", "MASKFORMER_TRAIN_DATA", "--env", f"MASKFORMER_STORAGE={tmp_path}/runs",
        "--", *TRAIN, *flags(nowhere, R50_MMDET), cwd=copy, **{"MASKFORMER_TRAIN_DATA": tiny.data.train},
    )  # fmt: skip
    log = tmp_path / "log"
    assert job.wait(500) == 0, log.read_text()
    assert "sent with the job" in log.read_text()
    assert re.search(r"^job round succeeded$", log.read_text(), re.MULTILINE)
    assert checkpoint.load(checkpoint.step_folder(locate(str(tmp_path / "runs/run")), 2)).step == 2
    [unpacked] = (head.folder / "session_latest/runtime_resources/working_dir_files").glob("_ray_pkg_*/")
    there = {
        path.relative_to(unpacked).as_posix()
        for path in unpacked.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == submission.sent_files(copy).keys()

    again = submitted("again", "--name", "round", "--", *TRAIN)
    assert again.wait(240) == 2
    assert re.search(r"error: .*round already exists.*Leave --name out", (tmp_path / "again").read_text())


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_fails_says_why_last_and_a_relative_storage_is_refused(
    tiny: TrainConfig, submitted: Submit, tmp_path: Path
) -> None:
    lost = submitted(
        "lost", "--", *TRAIN, "--data.train", "/nowhere", "--run.storage", "/tmp", "--scaling.device", "cpu"
    )
    assert lost.wait(240) == 2
    last = (tmp_path / "lost").read_text().splitlines()[-1]
    assert re.fullmatch(r"job \w+ failed with exit status 2: error: There is no pack at /nowhere; .*", last)
    here = replace(tiny, run=replace(tiny.run, storage="runs"))
    relative = submitted("relative", "--", *TRAIN, *flags(here, R50_MMDET))
    assert relative.wait(240) == 2
    last = (tmp_path / "relative").read_text().splitlines()[-1]
    assert re.search(
        r"error: --run\.storage is /.*/runs, inside the working directory that Ray made for this job", last
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_it_saves_and_submitted_again_it_resumes(
    tiny: TrainConfig, head: ray_nodes.Head, submitted: Submit, tmp_path: Path
) -> None:
    config = replace(
        tiny,
        run=replace(tiny.run, steps=STEPS, sample_log=True),
        checkpoint=replace(tiny.checkpoint, every=EVERY),
    )
    run, client = tmp_path / config.run.name, JobSubmissionClient(head.dashboard)
    command = ["--", *TRAIN, *flags(config, R50_MMDET)]

    def steps_done() -> list[int]:
        log = run / "samples.jsonl"
        return [json.loads(line)["step"] for line in log.read_text().split("\n")[:-1]] if log.exists() else []

    first = submitted("first", "--name", "first", *command)
    wait_for(lambda: len(steps_done()) >= 6 or first.poll() is not None, "steps")
    assert client.stop_job("first")
    assert first.wait(240) == 130, (tmp_path / "first").read_text()
    assert (tmp_path / "first").read_text().endswith("job first stopped\n")
    assert client.get_job_status("first") == JobStatus.STOPPED
    end = ledger.read(locate(str(run)))[-1]
    assert (end["event"], end["status"]) == ("end", "stopped")
    stopped = end["step"]
    assert stopped == max(steps_done()) + 1 < STEPS
    assert checkpoint.load(checkpoint.step_folder(locate(str(run)), stopped)).step == stopped

    # Whoever only looks on may leave.
    second = submitted("second", "--name", "second", *command)
    wait_for(lambda: len(steps_done()) > 2 * stopped or second.poll() is not None, "more steps")
    os.killpg(second.pid, signal.SIGINT)
    assert second.wait(60) == 130
    assert re.search(r"job second continues\. To follow it: .* ray job logs --follow second; "
                     r"to save and stop it: .*stop second",
                     (tmp_path / "second").read_text())  # fmt: skip
    assert "Traceback" not in (tmp_path / "second").read_text()
    wait_for(lambda: client.get_job_status("second").is_terminal(), "end")
    assert client.get_job_status("second") == JobStatus.SUCCEEDED
    starts = [event["step"] for event in ledger.read(locate(str(run))) if event["event"] == "start"]
    assert starts == [0, stopped]
    assert sorted(steps_done()) == [step for step in range(STEPS) for _ in range(config.scaling.max_workers)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_token_is_needed_where_there_is_one(submitted: Submit, tmp_path: Path) -> None:
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    with ray_nodes.head(environment) as head:

        def end(log: str, **variables: str) -> tuple[int, str]:
            job = submitted(log, "--address", head.dashboard, "--", *TRAIN, "--describe", **variables)
            return job.wait(240), (tmp_path / log).read_text()

        status, said = end("without")
        assert status == 2
        assert re.search(r"error: .*no token was sent \(401\)\. Set RAY_AUTH_MODE=token", said)
        status, said = end("none", RAY_AUTH_MODE="token", HOME=str(tmp_path))
        assert status == 2
        assert re.search(r"error: .*this machine has no token\. Set RAY_AUTH_MODE=token", said)
        status, said = end("wrong", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="b" * 64)
        assert status == 2
        assert re.search(r"error: .*the token that was sent is wrong \(403\)\.", said)
        status, said = end("right", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="a" * 64)
        assert status == 0, said
