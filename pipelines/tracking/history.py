"""The history of an alias: one tag of the registered model, and tags of the version that got the alias."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow.tracking import MlflowClient

from maskformer.analysis.bootstrap import Difference
from maskformer.untrusted import escaped, parse_json
from pipelines.errors import UserError
from pipelines.tracking.alias import current_user, history_tag
from pipelines.tracking.evaluations import Evaluation

MOST = 20
"""Entries that are kept."""

_LONGEST = 5000  # characters that databases keep of a registered model's tag


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A change of an alias."""

    action: str
    """`first`, `better`, `forced` or `rollback`."""
    version: str
    previous: str
    """The version that the alias named before; empty if there was none."""
    by: str
    at: str
    """UTC."""
    reason: str
    data: str = ""
    """Name of the data set and the beginning of its hash, if PQ is known."""
    pq: float | None = None
    """PQ of the version, a fraction."""
    difference: float | None = None
    """Its PQ minus that of the previous version; `low` and `high` are the interval."""
    low: float | None = None
    high: float | None = None
    confidence: float | None = None


def entry(
    action: str,
    version: str,
    previous: str,
    reason: str,
    evaluation: Evaluation | None = None,
    difference: Difference | None = None,
) -> Entry:
    """Return an entry for a change that the current user makes now."""
    about: dict[str, Any] = {}
    if evaluation:
        about |= {"data": f"{evaluation.data_name} {evaluation.digest}", "pq": round(evaluation.pq, 6)}
    if difference:
        about |= {
            "difference": round(difference.value, 6),
            "low": round(difference.low, 6),
            "high": round(difference.high, 6),
            "confidence": difference.confidence,
        }
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    return Entry(action=action, version=version, previous=previous, by=current_user(), at=now, reason=reason, **about)


def read(client: MlflowClient, name: str, alias: str) -> list[Entry]:
    """Return the entries of an alias, newest first; empty if promote.py never set it.

    Raises:
        UserError: something else is in the tag.
    """
    text = client.get_registered_model(name).tags.get(history_tag(alias))
    try:
        return [Entry(**values) for values in parse_json(text)] if text else []
    except (ValueError, TypeError) as error:
        raise UserError(
            f"The tag {history_tag(alias)} of the registered model {name} does not hold the history of an alias "
            f"({escaped(error)}). Correct or delete it."
        ) from error


def record(client: MlflowClient, name: str, alias: str, new: Entry) -> None:
    """Add an entry to the history, and its facts to the tags of the version. Only for the holder of the alias's lock.

    The oldest entries are dropped if there are more than `MOST`, or if the tag would become too long.
    """
    entries = [new, *read(client, name, alias)][:MOST]
    while len(text := json.dumps([_known(old) for old in entries])) > _LONGEST and len(entries) > 1:
        entries.pop()
    for key, value in _facts(new).items():
        client.set_model_version_tag(name, new.version, f"{alias}.{key}", value)
    client.set_registered_model_tag(name, history_tag(alias), text)


def before(entries: list[Entry], version: str) -> str:
    """Return the version that the alias named before `version` was promoted; empty if that is not known."""
    promotions = (old for old in entries if old.action != "rollback" and old.version == version)
    return next((old.previous for old in promotions), "")


def _facts(new: Entry) -> dict[str, str]:
    """Return who, when, why and on which numbers, for people."""
    facts = {"by": new.by, "at": f"{new.at} UTC", "why": f"{new.action}: {new.reason}"}
    if new.pq is not None:
        facts |= {"pq": f"{100 * new.pq:.2f} % on {new.data}"}
    if new.difference is not None and new.low is not None and new.high is not None and new.confidence is not None:
        facts["difference"] = (
            f"{100 * new.difference:+.2f} points, {100 * new.confidence:g} % interval {100 * new.low:+.2f} to "
            f"{100 * new.high:+.2f}, to version {new.previous}"
        )
    return facts


def _known(values: Entry) -> dict[str, Any]:
    return {key: value for key, value in asdict(values).items() if value not in (None, "")} | {
        "previous": values.previous
    }
