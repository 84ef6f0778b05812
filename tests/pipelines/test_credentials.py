"""User names, passwords, keys and tokens: which addresses have them, and what is left of a text without them."""

import base64
import json
import logging
import time
from urllib.parse import quote

import pytest

from jobs.shared.console import Formatter
from pipelines.config.resolve import or_environment, registry_uri
from pipelines.credentials import SECRET_VARIABLES, has_credentials, redacted, refuse_credentials
from pipelines.errors import UserError
from pipelines.storage import absolute, locate
from pipelines.tracking.server import require_artifacts, require_reachable
from tests.security.planted import Planted

SECRET = "s3cr+t/w0rd"

WITH_CREDENTIALS = {
    f"http://me:{SECRET}@host:5000/x": "MLFLOW_TRACKING_PASSWORD",
    f"https://{quote(SECRET, safe='')}@host": "MLFLOW_TRACKING_TOKEN",
    f"HTTP://me:{SECRET}@host": "RAY_AUTH_TOKEN",
    f"http://me:{SECRET}@[::1]:5000": "MLFLOW_TRACKING_USERNAME",
    f"https://host/x#access_token={SECRET}": "MLFLOW_TRACKING_TOKEN",
    f"https://host/x?token={SECRET}": "MLFLOW_TRACKING_TOKEN",
    f"https://host/x?a=1&X-Amz-Signature={SECRET}&b=2": "MLFLOW_TRACKING_TOKEN",
    f"https://host/x?sig={SECRET}": "MLFLOW_TRACKING_TOKEN",
    f"s3://AKIAKEY:{SECRET}@bucket/x": "AWS_SECRET_ACCESS_KEY",
    f"s3://AKIAKEY:12/{SECRET}@bucket/x@best": "AWS_SECRET_ACCESS_KEY",
    f"s3://bucket/x?secret_key={SECRET}": "AWS_SECRET_ACCESS_KEY",
    f"gs://{quote(SECRET, safe='')}@bucket/x": "GOOGLE_APPLICATION_CREDENTIALS",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/x": "AZURE_CLIENT_SECRET",
    f"postgresql://me:{SECRET}@host/db": "PGPASSWORD",
    f"postgresql+psycopg2://me:p@{SECRET}@host/db": "PGPASSWORD",
    f"postgresql://host/db?user=me&password={SECRET}": "PGPASSWORD",
    f"mysql+pymysql://me:{SECRET}@host/db": "read_default_file",
    f"mssql+pyodbc:///?odbc_connect=Driver;PWD={SECRET}": "environment",
    f"ray://me:{SECRET}@host:10001": "environment",
    f"file://me:{SECRET}@host/x": "environment",
    f"--tracking.uri=http://me:{SECRET}@host": "MLFLOW_TRACKING_PASSWORD",
    f"@s3://AKIAKEY:{SECRET}@bucket/list.txt": "AWS_SECRET_ACCESS_KEY",
}

WITHOUT = (
    "", "/path/a@b", "a@b.c", "runs/demo@best", "s3://bucket/runs/demo@best", "s3://bucket/a:b/c@best", "models:/a@b",
    "http://127.0.0.1:5000", "http://host:5000/x@y", "http://[::1]:5000/x@y", "https://host/x?page=2",
    "abfs://container@account.dfs.core.windows.net/x", "gs://anonymous@bucket/x", "sqlite:////abs/x@y.db",
    "mysql+pymysql://host/db?read_default_file=/x", "postgresql://host/db?passfile=/x&sslkey=/y&sslmode=require",
)  # fmt: skip


@pytest.mark.parametrize(("uri", "remedy"), WITH_CREDENTIALS.items())
def test_an_address_with_credentials_is_refused_without_showing_them(uri: str, remedy: str) -> None:
    assert has_credentials(f"text before {uri} and after")
    for refuse in (refuse_credentials, require_reachable, absolute, locate, registry_uri):
        if not uri.startswith(("-", "@")) or refuse is refuse_credentials:
            with pytest.raises(UserError, match=remedy) as refusal:
                refuse(uri)
            assert not {SECRET, quote(SECRET, safe=""), "AKIAKEY", "s3cr"} & set(str(refusal.value).split(" "))
            assert "s3cr" not in str(refusal.value)
            assert "\n" not in str(refusal.value)
    assert "s3cr" not in redacted(f"failed at {uri}: no answer from {uri}.")


@pytest.mark.parametrize("sign", ["'", '"', " ", "\n"])
@pytest.mark.parametrize("before", ["", "--tracking.uri="])
def test_a_password_may_have_characters_that_end_words(sign: str, before: str) -> None:
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
        refuse_credentials(f"{before}http://me:a{sign}{SECRET}@host:5000")
    assert "s3cr" not in str(refusal.value)


@pytest.mark.parametrize("uri", WITHOUT)
def test_other_addresses_are_left_alone(uri: str) -> None:
    assert not has_credentials(uri)
    assert redacted(f"failed at {uri}: no answer.") == f"failed at {uri}: no answer."
    refuse_credentials(uri)


@pytest.mark.parametrize(
    "piece", ["a", "a://b:c", "http://", "a:///@", "a://b@", "a://b:1/", "://", "?a", "&token=a", "authorization "]
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("@", ""), ("", "@"), ("http://h?", "")])
def test_a_long_hostile_text_takes_no_time(piece: str, before: str, after: str) -> None:
    text = before + piece * (200_000 // len(piece)) + after
    start = time.process_time()
    redacted(text)
    has_credentials(text)
    assert time.process_time() - start < 2


def test_a_variable_with_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKFORMER_STORAGE", f"s3://AKIAKEY:{SECRET}@bucket")
    with pytest.raises(UserError, match=r"\$MASKFORMER_STORAGE, s3://bucket has a user name"):
        or_environment("run.storage", "")


def test_the_endpoint_has_no_credentials(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(UserError, match=r"The endpoint in \$AWS_ENDPOINT_URL http://127.0.0.1:9 has a user name"):
        locate(bucket)


@pytest.mark.parametrize(
    "text",
    [
        f"{{'Authorization': 'Basic {SECRET}', 'Host': 'x'}}",
        f"authorization: Bearer {SECRET}\nhost: x",
        f"X-Ray-Authorization: {SECRET}, then, {SECRET}\nhost: x",
        f"{{b'Authorization': b'AWS4-HMAC-SHA256 Credential={SECRET}, Signature={SECRET}'}} x",
    ],
)
def test_headers_lose_their_value(text: str) -> None:
    left = redacted(text)
    assert SECRET not in left
    assert left.endswith("x") or left.endswith("'x'}")


@pytest.mark.parametrize("name", SECRET_VARIABLES)
def test_the_secrets_of_the_environment_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value = 'long/"secret"\\+value'
    monkeypatch.setenv(name, value)
    for form in (value, quote(value, safe=""), json.dumps(value)[1:-1]):
        assert redacted(f"denied: {form}.") == f"denied: [${name}]."
    monkeypatch.setenv(name, "the")
    assert redacted("the denied") == "the denied"


def test_the_header_that_mlflow_sends_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    sent = base64.b64encode(b"me:short").decode()
    assert redacted(f"sent {sent}") == "sent [$MLFLOW_TRACKING_PASSWORD]"


def test_log_lines_and_their_tracebacks_have_no_secrets() -> None:
    try:
        raise OSError(f"no answer from http://me:{SECRET}@host")
    except OSError as error:
        record = logging.LogRecord("name", 30, "file", 1, "at %s", (f"s3://A:{SECRET}@bucket",), None)
        record.exc_info = (OSError, error, error.__traceback__)
    text = Formatter("%(message)s").format(record)
    assert "at s3://bucket" in text
    assert "Traceback" in text
    assert SECRET not in text


def test_a_server_that_redirects_is_refused_by_name() -> None:
    with Planted() as other, Planted(redirect=other.url) as server:
        with pytest.raises(UserError, match=rf"redirect to {other.url}, which is not followed"):
            require_reachable(server.url)
        assert len(server.received) == 1
        assert not other.received


@pytest.mark.parametrize(
    ("uri", "location"),
    [
        ("sqlite:////x/mlflow.db", "/x/mlartifacts/1"),
        ("sqlite:////x/mlflow.db", "file:///x/mlartifacts/1"),
        ("sqlite:////x/mlflow.db", "s3://bucket/1"),
        ("postgresql://db/mlflow", "s3://bucket/1"),
        ("http://mlflow:5000", "mlflow-artifacts:/1"),
        ("http://MLflow:5000", "mlflow-artifacts://mlflow:5000/1"),
        ("http://mlflow:5000", "http://MLFLOW:5000/1"),
        ("http://mlflow:5000", "http://mlflow:5000/api/2.0/mlflow-artifacts/artifacts/1"),
    ],
)
def test_artifacts_on_the_host_of_the_server_or_in_a_bucket(uri: str, location: str) -> None:
    require_artifacts(uri, location)


@pytest.mark.parametrize(
    "location",
    [
        "http://other/1",
        "https://mlflow:5001/1",
        "mlflow-artifacts://other:5000/1",
        "http:///other/1",
        "http://[x",
        "ftp://mlflow:5000/1",
        "hdfs://other/1",
        "sftp://other/1",
        "b2://bucket@other/1",
        "RUNS:/0123456789abcdef/x",  # MLflow would resolve these again
        "models:/m-1",
    ],
)
@pytest.mark.parametrize("uri", ["sqlite:////x/mlflow.db", "http://mlflow:5000", "postgresql://db/mlflow"])
def test_artifacts_on_another_host_are_refused(uri: str, location: str) -> None:
    with pytest.raises(UserError, match="another host"):
        require_artifacts(uri, location)
