"""The MLflow server of the cluster files: its very command, users and rights, run on this machine."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.server import get_app_client
from requests import HTTPError

from tests.cluster.kustomize import render

CLUSTER = Path(__file__).parents[2] / "cluster"
README = (CLUSTER / "README.md").read_text()
SERVICES = render(CLUSTER / "kubernetes" / "services")
[CONTAINER] = next(
    found["spec"]["template"]["spec"]["containers"]
    for found in SERVICES
    if found["kind"] == "Deployment" and found["metadata"]["name"] == "mlflow"
)
[CONFIG] = [
    found["data"]["auth.ini"]
    for found in SERVICES
    if found["kind"] == "ConfigMap" and found["metadata"]["name"] == "mlflow"
]
ADMIN = ("admin", "the admin's long password")
TRAINING = ("training", "the jobs' long password")
VIEWER = ("viewer", "a colleague's long password")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the Deployment's command in a folder of its own and add the users; yield the address."""
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    (folder / "auth.ini").write_text(CONFIG.replace("////mlflow/", f"///{folder}/"))
    places = {
        "0.0.0.0": "127.0.0.1",
        "5000": port,
        "$(MLFLOW_ARTIFACTS_DESTINATION)": f"{folder}/artifacts",
        "////mlflow/": f"///{folder}/",
        "mlflow:5000": f"mlflow:{port}",
    }
    command = [sys.executable, "-m", *CONTAINER["command"], *CONTAINER["args"]]
    command = [_replaced(word, places) for word in command]
    given = {variable["name"]: variable["value"] for variable in CONTAINER["env"] if "value" in variable}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")},
        **given,
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for this test",
    }
    with (folder / "log").open("w") as log:
        process = psutil.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 180
        while _status(f"http://127.0.0.1:{port}/health") != 200:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.1)
        _add_training_as_the_readme(environment, port)
        address = f"http://127.0.0.1:{port}"
        with _as(ADMIN):
            get_app_client("basic-auth", address).create_user(*VIEWER)
        yield address
    finally:
        processes = [*process.children(recursive=True), process]
        for member in processes:
            member.kill()
        psutil.wait_procs(processes, timeout=30)


def _replaced(word: str, places: dict[str, str]) -> str:
    for old, new in places.items():
        word = word.replace(old, new)
    return word


def _add_training_as_the_readme(environment: dict[str, str], port: str) -> None:
    """Run the README's command for a new user, which gets the password on standard input."""
    [(code, name)] = re.findall(r"exec -i deployment/mlflow -- python -c '(.*?)' (\w+)\n", README, re.S)
    assert name == TRAINING[0]
    command = [sys.executable, "-c", code.replace("127.0.0.1:5000", f"127.0.0.1:{port}"), name]
    subprocess.run(command, input=TRAINING[1], env=environment, text=True, check=True, timeout=120)


def _status(url: str, user: tuple[str, str] | None = None, host: str = "", method: str = "GET") -> int:
    request = urllib.request.Request(url, method=method, data=b"{}" if method == "POST" else None)
    request.add_header("Content-Type", "application/json")
    if user:
        request.add_header("Authorization", "Basic " + b64encode(":".join(user).encode()).decode())
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextmanager
def _as(user: tuple[str, str]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])
        yield


ROUTES = [
    ("GET", "/"),
    ("GET", "/version"),
    ("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0"),
    ("GET", "/ajax-api/2.0/mlflow/experiments/get?experiment_id=0"),
    ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
    ("GET", "/api/2.0/mlflow/registered-models/search"),
    ("POST", "/api/2.0/mlflow/experiments/create"),
    ("POST", "/api/2.0/mlflow/users/create"),
    ("POST", "/graphql"),
    ("POST", "/v1/traces"),
]


@pytest.mark.parametrize(("method", "route"), ROUTES)
def test_nothing_is_served_without_a_password(server: str, method: str, route: str) -> None:
    for user in (None, ("admin", ""), ("admin", "password1234"), ("nobody", ADMIN[1])):
        assert _status(server + route, user, method=method) == 401, user


def test_the_probe_needs_no_password_and_comes_by_address(server: str) -> None:
    probe = CONTAINER["readinessProbe"]["httpGet"]
    assert probe == {"path": "/health", "port": "http"}
    assert _status(server + probe["path"], host="10.1.2.3:5000") == 200


def test_users_are_served_under_the_names_that_are_allowed_only(server: str) -> None:
    route = server + "/api/2.0/mlflow/experiments/get?experiment_id=0"
    for user in (ADMIN, TRAINING, VIEWER):
        assert _status(route, user) == 200, user
        assert _status(route, user, host=f"mlflow:{server.rpartition(':')[2]}") == 200, user
        assert _status(route, user, host="evil.example.com") == 403, user


def test_jobs_write_and_others_read(server: str, tmp_path: Path) -> None:
    client = MlflowClient(tracking_uri=server, registry_uri=server)
    (tmp_path / "weights").write_bytes(b"weights")
    with _as(TRAINING):  # what a run and its registration ask for
        experiment = client.create_experiment("segmentation")
        run = client.create_run(experiment).info.run_id
        client.log_param(run, "lr", 0.1)
        client.log_metric(run, "loss", 1.0, step=1)
        client.log_artifact(run, str(tmp_path / "weights"), "model")
        client.create_registered_model("maskformer")
        source = f"runs:/{run}/model"
        version = client.create_model_version("maskformer", source, run).version
        client.set_registered_model_alias("maskformer", "champion", version)
    with _as(VIEWER):
        assert client.get_run(run).data.params == {"lr": "0.1"}
        assert [file.path for file in client.list_artifacts(run, "model")] == ["model/weights"]
        assert Path(client.download_artifacts(run, "model/weights", str(tmp_path))).read_bytes() == b"weights"
        assert client.get_model_version_by_alias("maskformer", "champion").version == version
        for forbidden in (
            lambda: client.log_param(run, "wd", 0.1),
            lambda: client.log_artifact(run, str(tmp_path / "weights"), "model"),
            lambda: client.delete_run(run),
            lambda: client.create_model_version("maskformer", source, run),
            lambda: client.set_registered_model_alias("maskformer", "champion", version),
            lambda: client.delete_registered_model("maskformer"),
            lambda: get_app_client("basic-auth", server).create_user("another", "a long password"),
            lambda: get_app_client("basic-auth", server).update_user_admin("viewer", True),
        ):
            with pytest.raises((MlflowException, HTTPError), match=r"Permission denied|403"):
                forbidden()


def test_jobs_are_no_administrators(server: str) -> None:
    with _as(TRAINING):
        users = get_app_client("basic-auth", server)
        assert not users.get_user("training").is_admin
        with pytest.raises(MlflowException, match=r"Permission denied|403"):
            users.create_user("another", "a long password")


def test_nobody_but_the_creator_writes_by_default() -> None:
    settings = ConfigParser()
    settings.read_string(CONFIG)
    assert settings["mlflow"]["default_permission"] == "READ"
    assert settings["mlflow"]["database_uri"].startswith("sqlite:////mlflow/")  # on the volume
    assert "admin_password" not in settings["mlflow"]
    # The README's server without Kubernetes has the same rules.
    [written] = re.findall(r"/srv/mlflow/auth\.ini <<'END'\n(.*?)END\n", README, re.S)
    assert written == CONFIG
