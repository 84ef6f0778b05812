"""The gate of the registry: an alias moves to a version only if its PQ on the same data is better, beyond chance."""

import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, ErrorCode
from mlflow.tracking import MlflowClient

from maskformer.analysis.bootstrap import Difference, pq_difference
from maskformer.untrusted import escaped
from pipelines.config.promote import PromoteConfig
from pipelines.errors import UserError
from pipelines.tracking import history, quality
from pipelines.tracking.alias import locked, require_alias_name, version_of
from pipelines.tracking.evaluations import FOLDER, Evaluation, evaluations_of
from pipelines.tracking.quality import Quality
from pipelines.tracking.server import connect, explained, one_line, require_artifacts

_ABSENT = ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the gate decided, and on which numbers."""

    version: str
    previous: str
    """The version that the alias named; empty if there was none."""
    action: str
    """`better`, `first`, `forced` or `rollback`; `unchanged` if the alias names the version already; `refused`."""
    evaluation: Evaluation | None = None
    """Of the version, on the data of the comparison."""
    before: Evaluation | None = None
    """Of the previous version."""
    difference: Difference | None = None
    """PQ of the version minus that of the previous one."""
    obstacle: str = ""
    """Why the versions could not be compared, if the promotion was forced."""


def promote(uri: str, config: PromoteConfig) -> Decision:
    """Decide whether a version of a registered model gets an alias, and set it unless `config.dry_run`.

    If another job moves the alias meanwhile, the version is compared anew, with the one that the alias names then.

    Args:
        uri: tracking URI of the server or database.

    Raises:
        UserError: MLflow does not answer or refuses; the model, the version or the version to return to does not exist;
            the versions cannot be compared. Nothing was changed.
    """
    require_alias_name(config.alias)
    client = connect(uri)
    try:
        while (decision := _promote_once(client, config)) is None:
            pass
        return decision
    except MlflowException as error:
        raise explained(uri, error) from error


def _promote_once(client: MlflowClient, config: PromoteConfig) -> Decision | None:
    """Decide, and set the alias; return None if it moved meanwhile."""
    _require_model(client, config.model)
    previous = version_of(client, config.model, config.alias)
    decision = _rolled_back(client, config, previous) if config.rollback else _decided(client, config, previous)
    if config.dry_run or decision.action in ("unchanged", "refused"):
        return decision
    with locked(client, config.model, config.alias) as require_lock:
        if version_of(client, config.model, config.alias) != previous:
            return None
        reason = config.reason or _reason(decision)
        new = history.entry(
            decision.action, decision.version, previous, reason, decision.evaluation, decision.difference
        )
        # The alias comes last: without an entry, a promotion could not be taken back.
        history.record(client, config.model, config.alias, new)
        require_lock()
        client.set_registered_model_alias(config.model, config.alias, decision.version)
    return decision


def _decided(client: MlflowClient, config: PromoteConfig, previous: str) -> Decision:
    version = str(config.version)
    candidate = _version(client, config.model, version)
    if version == previous:
        return Decision(version=version, previous=previous, action="unchanged")
    try:
        compared = _compared(client, config, candidate, previous)
    except UserError as error:
        if not config.force:
            raise
        compared = Decision(version=version, previous=previous, action="forced", obstacle=str(error))
    return compared


def _compared(client: MlflowClient, config: PromoteConfig, candidate: ModelVersion, previous: str) -> Decision:
    found = _evaluations(client, candidate)
    version = str(candidate.version)
    if not previous:
        evaluation = _chosen(found, config.data, f"Version {version}")
        return Decision(
            version=version,
            previous="",
            action="forced" if config.force else "first",
            evaluation=evaluation,
        )
    champion = _evaluations(client, _version(client, config.model, previous))
    common = {digest: evaluation for digest, evaluation in found.items() if digest in champion}
    if not common:
        raise UserError(
            f"Versions {version} and {previous} of {config.model} were not evaluated on the same data: version "
            f"{version} on {_named(found)}; version {previous}, the {config.alias}, on {_named(champion)}. Evaluate "
            f"both on one pack with jobs/evaluate.py."
        )
    evaluation = _chosen(common, config.data, f"Versions {version} and {previous} together")
    before = champion[evaluation.digest]
    difference = _difference(client, before, evaluation, config.confidence)
    accepted = "better" if difference.low > 0 else "refused"
    return Decision(
        version=version,
        previous=previous,
        action="forced" if config.force else accepted,
        evaluation=evaluation,
        before=before,
        difference=difference,
    )


def _rolled_back(client: MlflowClient, config: PromoteConfig, present: str) -> Decision:
    if not present:
        raise UserError(f"The registered model {config.model} has no alias {config.alias}, so nothing can be undone.")
    target = history.before(history.read(client, config.model, config.alias), present)
    if not target:
        raise UserError(
            f"It is not known what {config.model}@{config.alias} named before version {present}: no promotion by "
            f"promote.py is in its history, or it was the first. Name a version with --version V --force --reason WHY."
        )
    _version(client, config.model, target)
    return Decision(version=target, previous=present, action="rollback")


def _difference(client: MlflowClient, first: Evaluation, second: Evaluation, confidence: float) -> Difference:
    before, after = _quality(client, first), _quality(client, second)
    if before.data_hash != after.data_hash:
        raise UserError(f"The MLflow runs {first.run_id} and {second.run_id} evaluated different data.")
    if before.taxonomy != after.taxonomy:
        raise UserError(
            f"The versions have different categories: {before.taxonomy.num_classes} in the evaluation "
            f"{first.run_id}, {after.taxonomy.num_classes} in {second.run_id}. Their PQ cannot be compared."
        )
    try:
        return pq_difference(before.images, after.images, after.taxonomy, confidence=confidence)
    except ValueError as error:
        raise UserError(f"The MLflow runs {first.run_id} and {second.run_id} cannot be compared: {error}") from error


def _quality(client: MlflowClient, evaluation: Evaluation) -> Quality:
    path = f"{FOLDER}/{quality.FILE}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            require_artifacts(client.tracking_uri, client.get_run(evaluation.run_id).info.artifact_uri or "")
            return Quality.from_bytes(Path(client.download_artifacts(evaluation.run_id, path, scratch)).read_bytes())
    except UserError:
        raise
    except (MlflowException, ValueError, OSError, zlib.error) as error:
        raise UserError(
            f"The MLflow run {evaluation.run_id} has no usable {path}: {escaped(one_line(error))}. Evaluate the "
            f"version's checkpoint once more on {escaped(evaluation.data_name)} with jobs/evaluate.py."
        ) from error


def _evaluations(client: MlflowClient, version: ModelVersion) -> dict[str, Evaluation]:
    model_id = version.model_id or _model_id(version.source or "")
    found = evaluations_of(client, model_id) if model_id else {}
    if not found:
        raise UserError(
            f"Version {version.version} of {version.name} has no evaluation in MLflow. Evaluate its checkpoint with "
            f"jobs/evaluate.py, on the data of the version that it should replace."
        )
    return found


def _model_id(source: str) -> str:
    name = source.removeprefix("models:/")
    return name if name.startswith("m-") and name != source else ""


def _chosen(evaluations: Mapping[str, Evaluation], data: str, who: str) -> Evaluation:
    """Return the evaluation on the data set that is meant, by the beginning of its hash or its name."""
    meant = [
        found
        for digest, found in evaluations.items()
        if not data
        or found.data_name == data
        or data.startswith(digest)
        or (len(data) >= 6 and digest.startswith(data))
    ]
    if len(meant) == 1:
        return meant[0]
    which = "several data sets" if len(meant) > 1 else f"no data set {escaped(data)!r}, but on"
    raise UserError(f"{who} were evaluated on {which}: {_named(evaluations)}. Choose one with --data HASH.")


def _named(evaluations: Mapping[str, Evaluation]) -> str:
    return ", ".join(f"{escaped(found.data_name)} ({escaped(digest)})" for digest, found in evaluations.items())


def _require_model(client: MlflowClient, name: str) -> None:
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != _ABSENT:
            raise
        raise UserError(
            f"MLflow has no registered model {escaped(name)!r}. jobs/evaluate.py --register NAME makes one; check "
            f"--model, and --tracking.uri or $MLFLOW_TRACKING_URI."
        ) from None


def _version(client: MlflowClient, name: str, number: str) -> ModelVersion:
    try:
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code != _ABSENT:
            raise
        quoted = name.replace("'", "''")
        found = sorted(int(version.version) for version in client.search_model_versions(f"name='{quoted}'"))
        raise UserError(
            f"The registered model {name} has no version {number}. Its versions are "
            f"{', '.join(map(str, found[-10:])) or 'none'}."
        ) from None


def _reason(decision: Decision) -> str:
    if decision.action == "first":
        return "the first version with this alias, compared with nothing"
    if decision.action == "rollback":
        return f"back from version {decision.previous}"
    return f"better than version {decision.previous}"
