"""MLflow's server or database: whether it answers, whether it lets us in, and what its errors mean to a user."""

import contextlib
import os
import sqlite3
import urllib.error
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from maskformer.untrusted import escaped
from pipelines.credentials import open_url, redacted, redirect, refuse_credentials
from pipelines.errors import UserError

_DENIED = (401, 403)
_STORES = ("", "file", "s3", "gs", "wasbs", "abfss")
"""Schemes of places of artifacts whose hosts the environment chooses."""

_found: ContextVar[str] = ContextVar("found", default="")
"""The URI of a database that no one named: it was found beside a checkpoint, and both may be of a stranger."""

# MLflow's client reads it at each request. It would send what it sends to the server to wherever that redirects.
os.environ["MLFLOW_ALLOW_HTTP_REDIRECTS"] = "false"


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 500 characters, without secrets."""
    return escaped(redacted(" ".join(str(error).split()))[:500])


def require_reachable(uri: str, *, create: bool = False) -> None:
    """Check within seconds that MLflow at `uri` can be used; its client would retry for minutes.

    Args:
        create: whether a database may be created. MLflow would create one wherever a mistyped URI leads.

    Raises:
        UserError: the server does not answer, refuses or redirects, the database does not exist or cannot be written,
            or the address has a user name or password in it.
    """
    refuse_credentials(uri, "The address of MLflow")
    if uri.lower().startswith(("http://", "https://")):
        _require_server(uri)
    elif uri.startswith("sqlite:///"):
        _require_database(Path(uri.removeprefix("sqlite:///")), create)
    elif "://" not in uri or uri.startswith("file:"):
        raise UserError(
            f"MLflow no longer keeps runs in a plain folder, got {uri}. "
            f"Use --tracking.uri sqlite:////absolute/path/mlflow.db or http://host:5000."
        )


def connect(uri: str, *, create: bool = False) -> MlflowClient:
    """Return a client of MLflow at `uri`, after a request that shows within seconds that we may use it.

    Args:
        create: as of `require_reachable`.

    Raises:
        UserError: it does not answer, cannot be written, or refuses us.
    """
    require_reachable(uri, create=create)
    client = MlflowClient(uri)
    try:
        client.search_experiments(max_results=1)
    except MlflowException as error:
        raise explained(uri, error) from None
    return client


def explained(uri: str, error: MlflowException) -> UserError:
    """Return what an error of MLflow at `uri` means to a user: access denied, or its own words."""
    if error.get_http_status_code() in _DENIED:
        return _denied(uri, error.get_http_status_code())
    return UserError(
        f"MLflow at {uri} rejected the request: {one_line(error)} Correct this, or choose another --tracking.uri."
    )


def require_artifacts(uri: str, location: str) -> None:
    """Refuse artifacts on another host than the server: MLflow's client would send it user name and password.

    Whoever can write to a database or a registry chooses the location. Buckets are allowed: their keys sign requests to
    the endpoint of the environment only. All else is refused: `runs:` and `models:` lead to another location, and
    stores such as `sftp:` have a host of their own. A database inside of `found` has artifacts only in its own folder.

    Args:
        uri: of the server or database.
        location: of artifacts, as it says.

    Raises:
        UserError: they are on another host, or the location is none that is known.
    """
    if uri == _found.get():
        _require_below(uri, location)
        return
    with contextlib.suppress(ValueError):  # such as http://[x
        server, place = urlsplit(uri), urlsplit(location)
        of_server = place.scheme in ("http", "https") or (place.scheme == "mlflow-artifacts" and bool(place.netloc))
        same_host = bool(server.netloc) and place.netloc.lower() == server.netloc.lower()
        if place.scheme in (*_STORES, "mlflow-artifacts") if not of_server else same_host:
            return
    raise UserError(
        f"MLflow at {uri} names {escaped(redacted(location), 200)} as the place of artifacts, another host. It is not "
        f"contacted: it would get the user name and password of this one. Use a server or database whose "
        f"artifacts are on the same host, in a bucket or in a local folder."
    )


def _require_below(uri: str, location: str) -> None:
    folder = Path(uri.removeprefix("sqlite:///")).parent.resolve()
    with contextlib.suppress(ValueError, OSError):
        scheme = urlsplit(location).scheme
        if not location or (
            scheme in ("", "file") and Path(local_file_uri_to_path(location)).resolve().is_relative_to(folder)
        ):
            return
    raise UserError(
        f"The database {uri}, which lies beside the checkpoint, names {escaped(redacted(location), 200)} as the place "
        f"of artifacts, which is not in its folder. Nothing is written there. If the database is yours, name it by "
        f"--tracking.uri {escaped(uri)}; otherwise name another one."
    )


@contextlib.contextmanager
def found(uri: str) -> Iterator[None]:
    """Trust the database `uri` with nothing outside of its folder inside the block. Empty: no database."""
    token = _found.set(uri)
    try:
        yield
    finally:
        _found.reset(token)


@contextlib.contextmanager
def current(uri: str) -> Iterator[None]:
    """Make `uri` the one that MLflow's functions use inside the block."""
    # MLflow also writes the URI to the environment, where later runs in this process would read it.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType] -- None unsets it, which the annotation omits


def _require_server(uri: str) -> None:
    try:
        with open_url(f"{uri.rstrip('/')}/health", timeout=5):
            return
    except urllib.error.HTTPError as error:
        if target := redirect(error.code, error.headers.get("Location")):
            raise UserError(
                f"The MLflow server {uri} answers with a redirect to {target}, which is not followed: user name and "
                f"password would go there too. If that is your server, give its address by --tracking.uri or "
                f"$MLFLOW_TRACKING_URI."
            ) from None
        if error.code in _DENIED:
            # A proxy may want a password even here. MLflow's client sends it, and `connect` sees whether it is right.
            if _has_credentials():
                return
            raise _denied(uri, error.code) from None
        raise _silent(uri, error) from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise _silent(uri, error) from error


def _has_credentials() -> bool:
    return bool(os.environ.get("MLFLOW_TRACKING_TOKEN") or os.environ.get("MLFLOW_TRACKING_USERNAME"))


def _silent(uri: str, error: Exception) -> UserError:
    reason = redacted(str(getattr(error, "reason", error)))
    return UserError(
        f"The MLflow server {uri} does not answer: {reason}. Start it, correct --tracking.uri or "
        f"$MLFLOW_TRACKING_URI, or unset both to use a SQLite file in the storage folder."
    )


def _denied(uri: str, status: int) -> UserError:
    remedy = (
        "Set $MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD, or $MLFLOW_TRACKING_TOKEN"
        if status == 401
        else "Ask its administrator for the permission, or set the $MLFLOW_TRACKING_USERNAME of a user who has it"
    )
    return UserError(f"The MLflow server {uri} refuses access (HTTP status {status}). {remedy}.")


def _require_database(path: Path, create: bool) -> None:
    if not create and not path.is_file():
        raise UserError(
            f"There is no database of MLflow at {escaped(path)}. Correct --tracking.uri or $MLFLOW_TRACKING_URI. A "
            f"training creates a new one; otherwise create an empty file there first."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(13, "the file is read-only")
        with contextlib.closing(sqlite3.connect(path, timeout=5)) as database:
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        raise UserError(
            f"MLflow's database {escaped(path)} cannot be written: {error}. Choose another file with "
            f"--tracking.uri sqlite:////absolute/path/mlflow.db or another --run.storage."
        ) from error
