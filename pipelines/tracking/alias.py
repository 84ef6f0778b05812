"""Aliases of a registered model: read, and changed by one program at a time.

MLflow changes an alias without a condition, so two programs that compare first could both succeed. Each therefore puts
a tag of its own on the registered model, looks for tags of others, and takes its own away again if there are any. Of
two programs, the one that looks later sees the tag of the other, so no two are ever inside `locked` at the same time.

This holds among the jobs of this repository, if their clocks differ by less than a minute. Nothing holds back the UI of
MLflow or other scripts. A tag of a program that was killed is ignored and removed after two minutes.
"""

import contextlib
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator

from mlflow.tracking import MlflowClient
from mlflow.tracking.context.default_context import DefaultRunContext
from mlflow.utils.mlflow_tags import MLFLOW_USER

from maskformer.untrusted import escaped, parse_json
from pipelines.errors import UserError

_NAME, _RESERVED = re.compile(r"[\w-]{1,200}"), re.compile(r"latest|v\d+", re.IGNORECASE)
_ABANDONED, _LONGEST_HOLD, _LONGEST_WAIT = 120.0, 60.0, 60.0  # seconds
_backoff = random.SystemRandom()


def require_alias_name(alias: str) -> None:
    """Refuse what MLflow would refuse, before anything is computed for it.

    Raises:
        UserError: the name has other characters than letters, digits, `_` and `-`, or MLflow keeps it for itself.
    """
    if not _NAME.fullmatch(alias) or _RESERVED.fullmatch(alias):
        raise UserError(
            f"MLflow does not allow the alias {escaped(alias)[:200]!r}. Use at most 200 letters, digits, _ and - for "
            f"--alias, and neither `latest` nor a version such as `v3`."
        )


def current_user() -> str:
    """Return the name that MLflow records as the user of a run."""
    return DefaultRunContext().tags().get(MLFLOW_USER, "unknown")


def history_tag(alias: str) -> str:
    """Return the name of the tag with the history of an alias that promote.py decides on."""
    return f"history.{alias}"


def version_of(client: MlflowClient, name: str, alias: str) -> str:
    """Return the version that an alias names; empty if there is no such alias."""
    return str(client.get_registered_model(name).aliases.get(alias, ""))


def move_forward(client: MlflowClient, name: str, alias: str, version: str) -> str:
    """Set an alias unless it names a newer version or promote.py decides on it; return the version that it names then.

    promote.py may have set it for the first time since the caller looked.
    """
    with locked(client, name, alias) as require_lock:
        model = client.get_registered_model(name)
        present = str(model.aliases.get(alias, ""))
        if history_tag(alias) in model.tags or (present and int(present) >= int(version)):
            return present
        require_lock()
        client.set_registered_model_alias(name, alias, version)
        return version


@contextlib.contextmanager
def locked(client: MlflowClient, name: str, alias: str) -> Iterator[Callable[[], None]]:
    """Keep other jobs from changing an alias inside the block.

    Yields:
        A function to call before each change, which raises a UserError if the block took too long.

    Raises:
        UserError: another job holds the lock for longer than a minute.
    """
    mine, deadline = f"lock.{alias}.{uuid.uuid4().hex[:12]}", time.monotonic() + _LONGEST_WAIT
    client.get_registered_model(name)  # without a model, there is no tag to take away below
    try:
        while True:
            began = time.monotonic()
            client.set_registered_model_tag(name, mine, json.dumps({"by": current_user(), "time": time.time()}))
            others = _others(client, name, alias, mine)
            if not others:
                break
            client.delete_registered_model_tag(name, mine)
            if time.monotonic() > deadline:
                raise UserError(
                    f"Another job changes the alias {alias} of {name} for over a minute: {escaped(others[0])[:200]}. "
                    f"Try again later; nothing was changed."
                )
            time.sleep(_backoff.uniform(0.05, 0.5))

        def require_lock() -> None:
            if time.monotonic() - began > _LONGEST_HOLD:
                raise UserError(
                    f"MLflow took over a minute to answer, so that another job may change the alias {alias} of {name} "
                    f"now. It was not changed; try again."
                )

        yield require_lock
    finally:
        client.delete_registered_model_tag(name, mine)


def _others(client: MlflowClient, name: str, alias: str, mine: str) -> list[str]:
    """Return the values of the other jobs' tags; remove abandoned ones."""
    held: list[str] = []
    for key, value in client.get_registered_model(name).tags.items():
        if key.startswith(f"lock.{alias}.") and key != mine:
            if time.time() - _written(value) > _ABANDONED:
                client.delete_registered_model_tag(name, key)
            else:
                held.append(value)
    return held


def _written(value: str) -> float:
    try:
        return float(parse_json(value)["time"])
    except (ValueError, TypeError, KeyError):
        return 0.0
