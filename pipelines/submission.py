"""A job for a Ray cluster elsewhere: what `ray job submit` would only fail on later is found before it is sent."""

import asyncio
import http.client
import json
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import ray
import requests
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env import packaging
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

ADDRESS = "RAY_API_SERVER_ADDRESS"
MIB = 2**20

STOP_SECONDS = 120
"""How long a stopped job may take to save; Ray itself kills after three seconds."""

# Ray reports every ignore file that it reads, every folder that it leaves out, and the end of each connection.
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
    """The job's own; 1 if it never ran, 130 if it was stopped."""
    cause: str
    """The line of the log that says why it failed."""


def sent_files(root: Path) -> dict[str, int]:
    """List the files that Ray will send of the working directory `root`, with their sizes in bytes."""
    found: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            found[path.relative_to(root).as_posix()] = path.stat().st_size

    excludes = [packaging._get_excludes(root, get_runtime_env_default_excludes())]
    packaging._dir_travel(root, excludes, add, include_gitignore=True)
    return found


def check_package(root: Path, entrypoint: Sequence[str], limit: int) -> None:
    """Find out whether `entrypoint` can run on a cluster in a copy of the folder `root` of at most `limit` MiB.

    Raises:
        UserError: `root` is not the project's, the script will not be there, or there is too much to send.
    """
    if not (root / "jobs").is_dir() or not (root / "maskformer").is_dir():
        raise UserError(
            f"{root} is not the root of the project: jobs/ and maskformer/ are not in it. The folder in which this "
            f"program is called is what the cluster gets; change to the root of your checkout first."
        )
    script = next((word for word in entrypoint if word.endswith(".py")), None)
    if script is None:
        got = f"got: {' '.join(entrypoint)}" if entrypoint else "nothing comes after it"
        raise UserError(
            f"A command with a script of the project is needed after `--`, {got}. "
            f"Such as: python jobs/submit.py -- python jobs/train_r50.py --run.name first"
        )
    files = sent_files(root)
    if os.path.normpath(script) not in files:
        there = "is left out by .gitignore or .rayignore" if (root / script).is_file() else f"is not in {root}"
        raise UserError(
            f"The script {script} will not be on the cluster: it {there}. Give the path of a file of the project, "
            f"as seen from its root, such as jobs/train_r50.py."
        )
    total = sum(files.values())
    if total > limit * MIB:
        raise UserError(
            f"The working directory {root} is too large to send: {total / MIB:.1f} MiB in {len(files)} files, and "
            f"the limit is {limit} MiB. The largest: {_largest(files)}. Put what the job does not need into .rayignore "
            f"(written like .gitignore) or elsewhere; data and weights belong on s3:// or a shared file system."
        )
    logger.info("To send: %d files, %.1f MiB.", len(files), total / MIB)


def _largest(files: dict[str, int]) -> str:
    """Name the five largest of the files and folders that stand in the root."""
    sizes: dict[str, int] = {}
    for path, size in files.items():
        first, slash, _ = path.partition("/")
        sizes[first + slash] = sizes.get(first + slash, 0) + size
    largest = sorted(sizes, key=lambda name: -sizes[name])[:5]
    return ", ".join(f"{name} {sizes[name] / MIB:.1f} MiB" for name in largest)


def environment(settings: Sequence[str]) -> dict[str, str]:
    """Read variables given as KEY=VALUE, or as NAME for the value that it has here.

    Raises:
        UserError: a name is malformed or has no value here.
    """
    variables: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"--env takes KEY=VALUE or the NAME of a variable that is set here, got {setting!r}.")
        if not equals and name not in os.environ:
            raise UserError(f"--env {name} has no value: it is not set here. Set it, or write --env {name}=VALUE.")
        variables[name] = value if equals else os.environ[name]
    return variables


def connect(address: str | None) -> JobSubmissionClient:
    """Reach the cluster at `address`, by default $RAY_API_SERVER_ADDRESS or an http:// $RAY_ADDRESS.

    Raises:
        UserError: no cluster is named, it does not answer, refuses the token, or runs another version of Ray.
    """
    address = address or os.environ.get(ADDRESS, "") or os.environ.get("RAY_ADDRESS", "")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise UserError(
            f"{f'{address} is no address' if address else 'No address is given'} that jobs can be submitted to. "
            f"Give the cluster's dashboard with --address or ${ADDRESS}, such as http://127.0.0.1:8265; "
            f"`ray start --head` starts a cluster on this machine."
        )
    address = address.rstrip("/")
    running = _running_version(address)
    if running != ray.__version__:
        raise UserError(
            f"The cluster at {address} runs Ray {running}, this program Ray {ray.__version__}. Both must be the same: "
            f"pip install 'ray[default]=={running}' here, or start the cluster with Ray {ray.__version__}."
        )
    os.environ[ADDRESS] = address  # Ray prefers the variable to an address that is given
    return JobSubmissionClient(address)


def _running_version(address: str) -> str:
    """Ask a cluster for its Ray version. Ray's own client would wait for ever for a server that does not answer."""
    try:
        request = urllib.request.Request(f"{address}/api/version", headers=get_auth_headers_if_auth_enabled({}))
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)["ray_version"]
    except (AuthenticationError, urllib.error.HTTPError) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code not in (401, 403):
            raise _not_ray(address, f"HTTP status {error.code}") from error
        said = {401: "no token was sent (401)", 403: "the token is another (403)"}
        found = said[error.code] if isinstance(error, urllib.error.HTTPError) else "there is no token on this machine"
        raise UserError(
            f"The cluster at {address} is open to those with its token only, and {found}. Set RAY_AUTH_MODE=token, and "
            f"RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to a file with it (by default "
            f"~/.ray/auth_token)."
        ) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"Nobody answers at {address}: {reason}. Start the cluster, or its port-forward or ssh tunnel, and mend "
            f"--address or ${ADDRESS}; it is the dashboard's port that is needed, 8265 unless set otherwise."
        ) from error
    except (http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise _not_ray(address, f"{type(error).__name__}: {error}") from error


def _not_ray(address: str, got: str) -> UserError:
    return UserError(
        f"What answers at {address} is not Ray's dashboard ({' '.join(got.split())}). Mend --address or ${ADDRESS}; "
        f"the dashboard's port is 8265 unless set otherwise."
    )


def submit(
    client: JobSubmissionClient, root: Path, entrypoint: str, name: str | None, variables: dict[str, str]
) -> str:
    """Send `root` and start the shell command `entrypoint` in it; return the job's name on the cluster.

    Raises:
        UserError: the cluster refuses the job, such as for a name that is taken.
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
        remedy = "`ray job list` shows what it has."
        if "already exists" in text:
            remedy = "Leave --name out or choose another; it is --run.name that makes a run go on."
        if "No available agent" in text:
            remedy = (
                "The cluster is still starting, or another one on its head's machine has taken the port of its agent: "
                "`ray start` takes another with --dashboard-agent-listen-port."
            )
        raise UserError(f"The cluster refuses the job: {cause(text)} {remedy}") from error


def follow(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> Outcome:
    """Show a job's log until the job ends, and return how it ended.

    Raises:
        RunFailed: the connection was lost; the job goes on.
    """
    try:
        asyncio.run(_tail(client, name, show))
        info = client.get_job_info(name)
    except (aiohttp.ClientError, requests.RequestException, RuntimeError, OSError) as error:
        raise RunFailed(
            f"The connection to the cluster was lost ({error}); job {name} goes on. {hints(name)}"
        ) from error
    if not info.status.is_terminal():
        raise RunFailed(f"The cluster closed the log of job {name}, which goes on. {hints(name)}")
    if info.status == JobStatus.STOPPED:
        return Outcome(status=info.status, exit_code=130, cause="")
    code = info.driver_exit_code
    return Outcome(status=info.status, exit_code=1 if code is None else code, cause=cause(info.message or ""))


async def _tail(client: JobSubmissionClient, name: str, show: Callable[[str], None]) -> None:
    async for lines in client.tail_job_logs(name):
        show(lines)


def hints(name: str) -> str:
    """Return the commands that follow and stop a job."""
    ray_job = f"{ADDRESS}={os.environ[ADDRESS]} ray job"
    return f"To follow it: {ray_job} logs --follow {name}; to stop it, its state saved: {ray_job} stop {name}"


def cause(log: str) -> str:
    """Return the line of a failed job's log that says why: our jobs end with `error: ...`, others with an exception."""
    lines = [line.strip() for line in log.splitlines()]
    for pattern in (r"error: .", r"[\w.]+(Error|Exception|Interrupt|Exit|Failed)\b", r"."):
        if found := [line for line in lines if re.match(pattern, line)]:
            return found[-1]
    return "its log is empty"
