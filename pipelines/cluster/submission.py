"""Submitting jobs to a Ray cluster: checks the package and the cluster first, where `ray job submit` fails late."""

import asyncio
import fnmatch
import http.client
import itertools
import logging
import os
import re
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from maskformer.untrusted import escaped, open_regular, parse_json
from pipelines.credentials import SECRET_VARIABLES, open_url, redirect, refuse_credentials
from pipelines.errors import RunFailedError, UserError

logger = logging.getLogger(__name__)

ADDRESS = "RAY_API_SERVER_ADDRESS"
MIB = 2**20

STOP_SECONDS = 120
"""How long a stopped job may take to save. By default, Ray kills a job after three seconds."""

_SECRET_FOLDERS = (".aws", ".azure", ".docker", ".gnupg", ".kube", ".oci", ".ssh")
_SECRET_CONFIGS = (".config/gcloud", ".config/gh", ".config/rclone")
_SECRET_NAMES = (
    ".env", ".env~", ".env.*", "*.env", ".envrc", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".pgpass",
    ".my.cnf", ".mylogin.cnf", ".npmrc", ".s3cfg", ".boto", ".htpasswd", ".databrickscfg", ".dockercfg", "auth.json",
    ".vault-token", ".vault_pass*", "kaggle.json", "rclone.conf", "kubeconfig", "*.kubeconfig",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.tfstate", "*.tfstate.*", "*.tfvars",
    "*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.kdbx", "*.gpg",
    "*token", "*token.txt", "*token.json", "*token.y*ml", "*api_key*", "*apikey*", "*password", "*password.*",
    "credentials", "credentials.*", "*_credentials", "*credentials*.json", "*credentials*.y*ml", "*credentials*.csv",
    "*accesskeys*.csv", "client_secret*.json", "*service*account*.json", "secret.*", "secrets.*", "mlflow.db",
)  # fmt: skip
_NOT_SECRET = ("*.example", "*.sample", "*.template", "*.py", "*.md", "*.pub")
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|PRIVATE_KEY|ACCESS_KEY", re.IGNORECASE)
_PRIVATE_KEY = re.compile(rb"\s*-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-")
_START = 4096  # bytes of a file that are looked at
_SHOWN = 10  # names in a message

# Ray logs every ignore file that it reads, every folder that it skips, and the end of each connection.
for _name in (
    "_private.runtime_env.packaging",
    "_private.runtime_env.working_dir",
    "dashboard.modules.dashboard_sdk",
    "dashboard.modules.job.sdk",
):
    logging.getLogger(f"ray.{_name}").setLevel(logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    status: str
    """SUCCEEDED, FAILED or STOPPED."""
    exit_code: int
    """Exit status of the job; 1 if it never ran, 130 if it was stopped."""
    cause: str
    """The line of the log that gives the reason of a failure."""


def sent_files(root: Path) -> dict[str, int]:
    """Return the files of the working directory `root` that Ray will send, with their sizes in bytes.

    Raises:
        UserError: a link leads out of `root`, or to a folder that it lies in. Ray would send what it leads to.
    """
    found: dict[str, int] = {}
    links: list[Path] = []
    inside = root.resolve()

    def add(path: Path) -> None:
        if path.is_symlink():
            try:
                target = path.resolve()
            except (RuntimeError, OSError):  # it leads to itself
                target = Path("/")
            if not target.is_relative_to(inside) or path.parent.resolve().is_relative_to(target):
                links.append(path)
                return
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    excludes = [
        packaging._get_excludes(root, get_runtime_env_default_excludes()),
        lambda path: path.parent in links,  # such a folder is not even looked into
    ]
    packaging._dir_travel(root, excludes, add, include_gitignore=True)
    if links:
        listed = (f"{link.relative_to(root).as_posix()} -> {os.readlink(link)}" for link in sorted(links))
        raise UserError(
            f"These links of {root} lead out of it, or to a folder that they lie in, and Ray would send what they lead "
            f"to: {_listed(listed, len(links))}. List them in .rayignore (same syntax as .gitignore), or remove them."
        )
    return found


def check_package(root: Path, entrypoint: Sequence[str], limit: int) -> None:
    """Check that `entrypoint` can run on a cluster in a copy of the folder `root` of at most `limit` MiB.

    Raises:
        UserError: `root` is not the root of the project, the script will not be sent, a file looks like a credential, a
            link leads out of `root`, or `root` is too large.
    """
    if not (root / "jobs").is_dir() or not (root / "maskformer").is_dir():
        raise UserError(
            f"{root} is not the root of the project: jobs/ and maskformer/ are not in it. The current folder is "
            f"sent to the cluster; change to the root of your checkout first."
        )
    script = next((word for word in entrypoint if word.endswith(".py")), None)
    if script is None:
        got = f"got: {' '.join(entrypoint)}" if entrypoint else "got nothing"
        raise UserError(
            f"A command with a script of the project is needed after `--`, {got}. "
            f"For example: python jobs/submit.py -- python jobs/train_r50.py --run.name first"
        )
    files = sent_files(root)
    if os.path.normpath(script) not in files:
        reason = "is excluded by .gitignore or .rayignore" if (root / script).is_file() else f"is not in {root}"
        raise UserError(
            f"The script {script} will not be on the cluster: it {reason}. Use the path of a script relative to the "
            f"root of the project, such as jobs/train_r50.py."
        )
    secret = sorted(name for name in files if may_be_secret(root, name))
    if secret:
        raise UserError(
            f"Nothing was sent: these files look like credentials, and everyone who can use the cluster could read "
            f"them: {_listed(secret, len(secret))}. List them in .rayignore (same syntax as .gitignore), or move them "
            f"out of {root}. Jobs take credentials from the environment of the cluster."
        )
    total = sum(files.values())
    if total > limit * MIB:
        raise UserError(
            f"The working directory {root} is too large to send: {total / MIB:.1f} MiB in {len(files)} files, and "
            f"the limit is {limit} MiB. The largest: {_largest(files)}. List what the job does not need in .rayignore "
            f"(same syntax as .gitignore); data and weights belong on s3:// or a shared file system."
        )
    logger.info("To send: %d files, %.1f MiB.", len(files), total / MIB)


def _listed(names: Iterable[str], count: int) -> str:
    shown = ", ".join(escaped(name, 200) for name in itertools.islice(names, _SHOWN))
    return shown if count <= _SHOWN else f"{shown} and {count - _SHOWN} more"


def may_be_secret(root: Path, name: str) -> bool:
    """Return whether a file looks like a credential, by its name, the folder it is in, or its first bytes.

    Args:
        name: path below `root`, with slashes.
    """
    *folders, last = name.lower().split("/")
    if any(folder in _SECRET_FOLDERS for folder in folders) or "/".join(folders[-2:]) in _SECRET_CONFIGS:
        return True
    named, public = (any(fnmatch.fnmatchcase(last, each) for each in names) for names in (_SECRET_NAMES, _NOT_SECRET))
    if named and not public:
        return True
    try:
        with open_regular(root / name) as file:
            start = file.read(_START)
    except OSError:
        return False  # Ray cannot read it either
    return bool(_PRIVATE_KEY.match(start)) or (last.endswith(".json") and b'"private_key"' in start)


def _largest(files: dict[str, int]) -> str:
    """Describe the five largest files and folders in the root."""
    sizes: dict[str, int] = {}
    for path, size in files.items():
        first, slash, _ = path.partition("/")
        sizes[first + slash] = sizes.get(first + slash, 0) + size
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    return ", ".join(f"{name} {sizes[name] / MIB:.1f} MiB" for name in largest)


def environment(settings: Sequence[str]) -> dict[str, str]:
    """Parse variables given as KEY=VALUE, or as NAME for its value in this process.

    Raises:
        UserError: a name is malformed or is not set in this process.
    """
    variables: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):  # the value may be a secret
            raise UserError(f"--env takes KEY=VALUE or the NAME of a variable that is set here, got {name!r}.")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name}: the variable is not set here. Set it, or use --env {name}=VALUE.")
        variables[name] = value if equals else os.environ[name]
    if secret := [name for name in variables if name in SECRET_VARIABLES or _SECRET_VARIABLE.search(name)]:
        logger.warning(
            "Everyone who can open the cluster's dashboard or list its jobs can read the value of %s. Set it where the "
            "cluster is started instead of by --env.",
            ", ".join(secret),
        )
    return variables


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the cluster at `address`, by default $RAY_API_SERVER_ADDRESS or an http:// $RAY_ADDRESS.

    Raises:
        UserError: no address is set, or the cluster does not answer, refuses the token or runs another version of Ray.
    """
    address = address or os.environ.get(ADDRESS, "") or os.environ.get("RAY_ADDRESS", "")
    refuse_credentials(address, "The cluster's address")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UserError(
            f"{f'Jobs cannot be submitted to {address}' if address else 'No address to submit jobs to is set'}. "
            f"Set that of the cluster's dashboard by --address or ${ADDRESS}, such as http://127.0.0.1:8265; "
            f"`ray start --head` starts a cluster on this machine."
        )
    address = address.rstrip("/")
    running = _running_version(address)
    if running != ray.__version__:
        raise UserError(
            f"The cluster at {address} runs Ray {running}, this program Ray {ray.__version__}. Both must be the same: "
            f"pip install 'ray[default]=={running}' here, or start the cluster with Ray {ray.__version__}."
        )
    os.environ[ADDRESS] = address  # Ray prefers the variable to the argument
    return _Client(address)


class _Client(JobSubmissionClient):
    """Ray's client, which does not follow redirects: it would send the token to another host too."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        answer = super()._do_request(method, endpoint, **{**options, "allow_redirects": False})
        _refuse_redirect(self.get_address(), answer.status_code, answer.headers.get("Location"))
        return answer


def _refuse_redirect(address: str, status: int, location: str | None) -> None:
    if target := redirect(status, location):
        raise UserError(
            f"The server at {address} answers with a redirect to {target}, which is not followed: the token would be "
            f"sent there. If that is your cluster, give its address by --address or ${ADDRESS}."
        )


def _running_version(address: str) -> str:
    """Ask a cluster for its Ray version. Ray's client would wait forever for a server that does not answer."""
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=get_auth_headers_if_auth_enabled({}))
        with open_url(request, timeout=10) as answer:
            return parse_json(answer.read(2**16))["ray_version"]
    except (AuthenticationError, urllib.error.HTTPError) as error:
        if isinstance(error, urllib.error.HTTPError):
            _refuse_redirect(address, error.code, error.headers.get("Location"))
        if isinstance(error, urllib.error.HTTPError) and error.code not in (401, 403):
            raise _not_ray(address, f"HTTP status {error.code}") from error
        reasons = {401: "no token was sent (401)", 403: "the token that was sent is wrong (403)"}
        found = reasons[error.code] if isinstance(error, urllib.error.HTTPError) else "this machine has no token"
        raise UserError(
            f"The cluster at {address} requires a token, and {found}. Set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to a file with it (by default "
            f"~/.ray/auth_token)."
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"Nothing answers at {address}: {reason}. Start the cluster, or its port-forward or ssh tunnel, or correct "
            f"--address or ${ADDRESS}. Use the port of the dashboard, 8265 by default."
        ) from error
    except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise _not_ray(address, f"{type(error).__name__}: {error}") from error


def _not_ray(address: str, got: str) -> UserError:
    return UserError(
        f"The server at {address} is not Ray's dashboard ({' '.join(got.split())}). Correct --address or ${ADDRESS}; "
        f"the port of the dashboard is 8265 by default."
    )


def submit(
    client: JobSubmissionClient, root: Path, entrypoint: str, name: str | None, variables: dict[str, str]
) -> str:
    """Send `root` and start the shell command `entrypoint` in it; return the job's name on the cluster.

    Raises:
        UserError: the cluster refuses the job, for example because its name is taken.
    """
    try:
        return client.submit_job(
            entrypoint=entrypoint,
            submission_id=name,
            runtime_env={
                "working_dir": str(root),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), **variables},
            },
        )
    except (RuntimeError, ValueError) as error:
        text = str(error)
        remedy = "`ray job list` shows its jobs."
        if "already exists" in text:
            remedy = "Leave --name out or choose another. To resume a run, only --run.name must be the same."
        if "No available agent" in text:
            remedy = (
                "The cluster is still starting, or another one on the same machine uses the port of its agent. Choose "
                "another port by `ray start --dashboard-agent-listen-port`."
            )
        raise UserError(f"The cluster refuses the job: {cause(text)} {remedy}") from error


def follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> Outcome:
    """Show a job's log until the job ends, and return how it ended.

    Raises:
        RunFailedError: the connection was lost; the job continues.
    """
    try:
        asyncio.run(_tail(client, name, show))
        info = client.get_job_info(name)
    except (aiohttp.ClientError, requests.RequestException, RuntimeError, OSError) as error:
        raise RunFailedError(
            f"The connection to the cluster was lost ({error}); job {name} continues. {hints(name)}"
        ) from error
    if not info.status.is_terminal():
        raise RunFailedError(f"The cluster closed the log of job {name}; the job continues. {hints(name)}")
    if info.status == JobStatus.STOPPED:
        return Outcome(status=info.status, exit_code=130, cause="")
    code = info.driver_exit_code
    return Outcome(status=info.status, exit_code=1 if code is None else code, cause=cause(info.message or ""))


async def _tail(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(name):
        show(lines)


def hints(name: str) -> str:
    """Return the commands that follow and stop a job."""
    ray_job, quoted = f"{ADDRESS}={shlex.quote(os.environ[ADDRESS])} ray job", shlex.quote(name)
    return f"To follow it: {ray_job} logs --follow {quoted}; to save and stop it: {ray_job} stop {quoted}"


def cause(log: str) -> str:
    """Return the line of a failed job's log that gives the reason: `error: ...` for our jobs, else an exception."""
    lines = [line.strip() for line in log.splitlines()]
    for pattern in (r"error: .", r"[\w.]+(Error|Exception|Interrupt|Exit|Failed)\b", r"."):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[-1]
    return "its log is empty"
