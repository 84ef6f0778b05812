"""The gate: an alias moves to what is better beyond chance, can be taken back, and no race moves it to a worse one."""

import gzip
import json
import multiprocessing
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from maskformer.taxonomy import Taxonomy
from pipelines.config.promote import PromoteConfig
from pipelines.errors import UserError
from pipelines.tracking import alias, evaluations, gate, history, quality, registry
from pipelines.tracking.alias import locked, move_forward, version_of
from pipelines.tracking.gate import Decision, promote
from pipelines.tracking.quality import Quality
from tests.pipelines.tracking.mlflow_server import UNUSED
from tests.pipelines.tracking.versions import (
    DATA,
    IMAGES,
    OTHER_DATA,
    TAXONOMY,
    counts,
    evaluate,
    evaluated_version,
    new_version,
    pq,
    register_versions,
)

ALIAS = "champion"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alias._backoff, "uniform", lambda low, high: type(alias._backoff)().random() / 20)


@pytest.fixture
def sqlite(database: Path) -> str:
    return f"sqlite:///{database}"


@pytest.fixture
def name() -> str:
    return f"model-{uuid.uuid4().hex[:8]}"


def ask(uri: str, name: str, **settings: Any) -> Decision:
    return promote(uri, PromoteConfig(model=name, **settings))


def champion(uri: str, name: str) -> str:
    return version_of(MlflowClient(uri), name, ALIAS)


def state(uri: str, name: str) -> tuple[Any, ...]:
    """Return all that a promotion could change."""
    client = MlflowClient(uri)
    model = client.get_registered_model(name)
    versions = {version.version: dict(version.tags) for version in client.search_model_versions(f"name='{name}'")}
    return dict(model.aliases), dict(model.tags), versions


def test_the_alias_moves_to_what_is_better_and_back(uri: str, name: str) -> None:
    first, worse, same, better = (evaluated_version(uri, name, good) for good in (10, 9, 10, 40))
    decision = ask(uri, name, version=int(first))
    assert (decision.action, decision.previous, decision.difference) == ("first", "", None)
    assert champion(uri, name) == first

    before = state(uri, name)
    for version in (worse, same):
        assert ask(uri, name, version=int(version)).action == "refused"
    assert ask(uri, name, version=int(first)).action == "unchanged"
    assert ask(uri, name, version=int(better), dry_run=True).action == "better"
    assert state(uri, name) == before

    decision = ask(uri, name, version=int(better), reason="more data")
    assert (decision.action, decision.previous) == ("better", first)
    assert decision.difference is not None
    assert decision.difference.value == pytest.approx(pq(40) - pq(10), abs=1e-12)
    assert 0 < decision.difference.low <= decision.difference.value <= decision.difference.high
    assert decision.difference.images == IMAGES
    assert champion(uri, name) == better
    client = MlflowClient(uri)
    tags = client.get_model_version(name, better).tags
    assert tags["champion.why"] == "better: more data"
    assert tags["champion.by"] == alias.current_user()
    assert tags["champion.pq"] == f"{100 * pq(40):.2f} % on val {DATA.digest}"
    assert (
        f"{100 * decision.difference.low:+.2f} to {100 * decision.difference.high:+.2f}" in tags["champion.difference"]
    )
    newest, oldest = history.read(client, name, ALIAS)
    assert (newest.version, newest.previous, newest.reason) == (better, first, "more data")
    assert newest.pq == pytest.approx(pq(40), abs=1e-6)
    assert (newest.low, newest.high) == pytest.approx((decision.difference.low, decision.difference.high), abs=1e-6)
    assert (oldest.action, oldest.version, oldest.previous) == ("first", first, "")
    assert not [key for key in client.get_registered_model(name).tags if key.startswith("lock.")]

    assert ask(uri, name, rollback=True).version == first
    assert champion(uri, name) == first
    assert history.read(client, name, ALIAS)[0].action == "rollback"
    with pytest.raises(UserError, match=f"named before version {first}"):
        ask(uri, name, rollback=True)


def test_a_difference_within_chance_is_refused_and_can_be_forced(sqlite: str, name: str) -> None:
    first, little, nothing = (evaluated_version(sqlite, name, good) for good in (10, 11, 0))
    ask(sqlite, name, version=int(first))
    decision = ask(sqlite, name, version=int(little))
    assert decision.action == "refused"
    assert decision.difference is not None
    assert decision.difference.value > 0
    assert decision.difference.low <= 0
    # One image of 40 is in a draw with a probability of 1 - (39/40)^40 = 64 %, so 20 % of the draws are below 0.
    assert ask(sqlite, name, version=int(little), confidence=0.2, dry_run=True).action == "better"
    decision = ask(sqlite, name, version=int(nothing), force=True, reason="it is smaller")
    assert decision.action == "forced"
    assert decision.difference is not None
    assert decision.difference.value < 0
    assert champion(sqlite, name) == nothing
    assert history.read(MlflowClient(sqlite), name, ALIAS)[0].reason == "it is smaller"


def test_repeated_rollbacks_go_further_back(sqlite: str, name: str) -> None:
    versions = [evaluated_version(sqlite, name, good) for good in (0, 20, 40)]
    for version in versions:
        ask(sqlite, name, version=int(version))
    assert ask(sqlite, name, rollback=True, dry_run=True).version == versions[1]
    assert champion(sqlite, name) == versions[2]
    found = [ask(sqlite, name, rollback=True).version for _ in range(2)]
    assert found == [versions[1], versions[0]]
    # A promotion after that is taken back to what it replaced.
    ask(sqlite, name, version=int(versions[2]))
    assert ask(sqlite, name, rollback=True).version == versions[0]


def test_an_overtaken_promotion_is_compared_anew(sqlite: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both compare with the first version; the worse one is held before it changes anything, until the other is in."""
    first, good, best = (evaluated_version(sqlite, name, good) for good in (0, 20, 40))
    ask(sqlite, name, version=int(first))
    compared, overtaken = threading.Event(), threading.Event()

    @contextmanager
    def held(*arguments: Any) -> Iterator[Any]:
        if threading.current_thread().name.startswith("slow"):
            compared.set()
            assert overtaken.wait(60)
        with locked(*arguments) as require_lock:
            yield require_lock

    monkeypatch.setattr(gate, "locked", held)
    with ThreadPoolExecutor(1, "slow") as pool:
        slow = pool.submit(ask, sqlite, name, version=int(good))
        assert compared.wait(60)
        try:
            assert ask(sqlite, name, version=int(best)).action == "better"
        finally:
            overtaken.set()
        decision = slow.result()
    assert (decision.action, decision.previous) == ("refused", best)
    assert champion(sqlite, name) == best
    assert [entry.version for entry in history.read(MlflowClient(sqlite), name, ALIAS)] == [best, first]


def test_jobs_hold_the_lock_one_at_a_time(uri: str, name: str) -> None:
    client = MlflowClient(uri)
    client.create_registered_model(name, tags={"number": "0"})

    def count() -> None:
        for _ in range(2):
            with locked(client, name, ALIAS):
                number = client.get_registered_model(name).tags["number"]
                client.set_registered_model_tag(name, "number", str(int(number) + 1))

    with ThreadPoolExecutor(3) as pool:
        for job in [pool.submit(count) for _ in range(3)]:
            job.result()
    assert client.get_registered_model(name).tags == {"number": "6"}


def test_an_abandoned_lock_is_removed_and_a_held_one_is_waited_for(
    sqlite: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(sqlite)
    client.create_registered_model(name)
    for value in ("what is this?", '{"by": "somebody", "time": 1000.0}'):
        client.set_registered_model_tag(name, f"lock.{ALIAS}.0", value)
        with locked(client, name, ALIAS):
            assert f"lock.{ALIAS}.0" not in client.get_registered_model(name).tags
    monkeypatch.setattr(alias, "_LONGEST_WAIT", 0.1)
    with (
        locked(client, name, ALIAS),
        pytest.raises(UserError, match="Another job changes the alias"),
        locked(client, name, ALIAS),
    ):
        pass
    assert client.get_registered_model(name).tags == {}
    monkeypatch.setattr(alias, "_LONGEST_HOLD", -1.0)
    with locked(client, name, ALIAS) as require_lock, pytest.raises(UserError, match="was not changed"):
        require_lock()


def test_a_registration_never_moves_an_alias_backwards(sqlite: str, name: str) -> None:
    client = MlflowClient(sqlite)
    versions = [new_version(sqlite, name)[0] for _ in range(11)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda version: move_forward(client, name, "candidate", version), [*versions[::-1]]))
    assert version_of(client, name, "candidate") == versions[-1]
    assert int(versions[-1]) == 11  # so that 9 is not above 12
    assert all(int(now) >= int(version) for now, version in zip(found, versions[::-1], strict=True))


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_the_newest_of_many_registrations_has_the_alias(uri: str, name: str, kind: str) -> None:
    """None of them finds an alias at first, and all register at the same time."""
    programs, each = (4, 3) if kind == "threads" else (3, 2)
    client = MlflowClient(uri)
    client.create_registered_model(name)
    if kind == "threads":
        task = (uri, name, "candidate", each, threading.Lock(), threading.Barrier(programs))
        with ThreadPoolExecutor(programs) as pool:
            jobs = [pool.submit(register_versions, *task) for _ in range(programs)]
            for job in jobs:
                job.result()
    else:
        context = multiprocessing.get_context("forkserver")
        task = (uri, name, "candidate", each, context.Lock(), context.Barrier(programs))
        processes = [context.Process(target=register_versions, args=task) for _ in range(programs)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(180)
        assert [process.exitcode for process in processes] == [0] * programs
    versions = [int(version.version) for version in client.search_model_versions(f"name='{name}'")]
    assert sorted(versions) == list(range(1, programs * each + 1))
    assert version_of(client, name, "candidate") == str(max(versions))
    assert client.get_registered_model(name).tags == {}


def test_a_registration_leaves_an_alias_that_was_promoted_meanwhile(sqlite: str, name: str) -> None:
    """The first promotion comes after the registration has looked for one, while its model is evaluated."""
    first, second = evaluated_version(sqlite, name, 0), new_version(sqlite, name)[0]
    client = MlflowClient(sqlite)
    registry.require_names(client, name, ALIAS)
    ask(sqlite, name, version=int(first))
    assert move_forward(client, name, ALIAS, second) == first
    assert champion(sqlite, name) == first


@pytest.mark.parametrize("path", ["missing.db", "missing/mlflow.db", "."])
def test_a_mistyped_database_is_refused_and_not_created(tmp_path: Path, name: str, path: str) -> None:
    with pytest.raises(UserError, match="There is no database of MLflow at"):
        ask(f"sqlite:///{tmp_path}/{path}", name, version=1)
    assert not list(tmp_path.iterdir())


def test_the_history_stays_within_what_databases_keep(sqlite: str, name: str) -> None:
    client = MlflowClient(sqlite)
    version, _ = new_version(sqlite, name)
    for number in range(history.MOST + 5):
        history.record(client, name, ALIAS, history.entry("forced", version, "", f"{number} {'x' * 290}"))
    text = client.get_registered_model(name).tags[f"history.{ALIAS}"]
    assert len(text) <= 5000
    found = history.read(client, name, ALIAS)
    assert len(found) > 5
    assert [int(entry.reason.split()[0]) for entry in found] == [
        history.MOST + 4 - number for number in range(len(found))
    ]


def assert_refused(uri: str, name: str, match: str, **settings: Any) -> None:
    before = state(uri, name)
    with pytest.raises(UserError, match=match) as refusal:
        ask(uri, name, **settings)
    assert "\n" not in str(refusal.value)
    assert state(uri, name) == before


def test_what_does_not_exist_is_named(uri: str, name: str) -> None:
    with pytest.raises(UserError, match=rf"no registered model '{name}'.*--register"):
        ask(uri, name, version=1)
    for bad in ("a/b", "a:b", " "):
        with pytest.raises(UserError, match=r"rejected the request"):
            ask(uri, bad, version=1)
    first = evaluated_version(uri, name, 10)
    assert_refused(uri, name, r"has no version 7\. Its versions are 1\.", version=7)
    assert_refused(uri, name, "has no alias champion", rollback=True)
    for reserved in ("latest", "V3", "a b", "", "x" * 300):
        assert_refused(uri, name, "does not allow the alias", version=int(first), alias=reserved)
    MlflowClient(uri).set_registered_model_alias(name, ALIAS, first)
    assert_refused(uri, name, "It is not known what", rollback=True)


def test_versions_that_cannot_be_compared_are_refused(sqlite: str, name: str) -> None:
    first, first_model = new_version(sqlite, name)
    assert_refused(sqlite, name, f"Version {first} of {name} has no evaluation", version=int(first))
    evaluate(sqlite, first_model, 10)
    ask(sqlite, name, version=int(first))

    second, model = new_version(sqlite, name)
    assert_refused(sqlite, name, f"Version {second} of {name} has no evaluation", version=int(second))
    evaluate(sqlite, model, 40, OTHER_DATA)
    assert_refused(sqlite, name, r"not evaluated on the same data: .* test \(b2b2.*val \(a1a1", version=int(second))
    evaluate(sqlite, first_model, 10, OTHER_DATA)
    assert ask(sqlite, name, version=int(second), dry_run=True).action == "better"
    evaluate(sqlite, model, 40)
    assert_refused(sqlite, name, r"several data sets: .*--data", version=int(second))
    assert_refused(sqlite, name, "no data set 'nothing'", version=int(second), data="nothing")
    for data in ("val", "a1a1a1", DATA.hash):
        decision = ask(sqlite, name, version=int(second), data=data, dry_run=True)
        assert decision.evaluation is not None
        assert decision.evaluation.data_name == "val"

    third, model = new_version(sqlite, name)
    taxonomy = Taxonomy.from_coco([{**entry, "name": f"{entry['name']}s"} for entry in TAXONOMY.to_coco()])
    run = evaluate(sqlite, model, 40, taxonomy=taxonomy)
    assert_refused(sqlite, name, "different categories", version=int(third))
    MlflowClient(sqlite).delete_run(run.run_id)
    assert_refused(sqlite, name, "no evaluation", version=int(third))
    # What cannot be compared can still be forced, and the obstacle is told.
    decision = ask(sqlite, name, version=int(third), force=True, reason="another set of classes")
    assert "no evaluation" in decision.obstacle
    assert champion(sqlite, name) == third


def damaged() -> dict[str, bytes]:
    whole = Quality(data_hash=DATA.hash, taxonomy=TAXONOMY, images=counts(10)).to_bytes()
    values = json.loads(gzip.decompress(whole))
    other_images = {**values, "images": {"5": values["images"]["5"]}}
    negative = {**values, "images": {**values["images"], "5": {"1": [0.5, 1, -3, 0]}}}
    other_hash = {**values, "data_hash": DATA.hash[:16] + "c" * 48}
    return {
        "not gzip": b"{}",
        "cut": whole[: len(whole) // 2],
        "no JSON": gzip.compress(b"{"),
        "another structure": gzip.compress(b'{"images": [3]}'),
        "no object": gzip.compress(b"[]"),
        "other images": gzip.compress(json.dumps(other_images).encode()),
        "negative counts": gzip.compress(json.dumps(negative).encode()),
        "other data": gzip.compress(json.dumps(other_hash).encode()),
    }


def test_a_damaged_file_of_counts_is_refused(sqlite: str, name: str) -> None:
    ask(sqlite, name, version=int(evaluated_version(sqlite, name, 10)))
    for content in damaged().values():
        version, model = new_version(sqlite, name)
        evaluate(sqlite, model, 40, files={quality.FILE: content})
        assert_refused(sqlite, name, "no usable evaluation|cannot be compared|different data", version=int(version))
    version, model = new_version(sqlite, name)
    evaluate(sqlite, model, 40, files={})
    assert_refused(sqlite, name, r"no usable evaluation/quality\.json\.gz.*jobs/evaluate\.py", version=int(version))


def test_counts_survive_the_file_exactly() -> None:
    original = Quality(data_hash=DATA.hash, taxonomy=TAXONOMY, images=counts(7))
    content = original.to_bytes()
    assert Quality.from_bytes(content) == original
    assert original.to_bytes() == content


def test_the_newest_evaluation_on_a_data_set_counts(uri: str, name: str) -> None:
    _, model = new_version(uri, name)
    for good in (5, 30):
        newest = evaluate(uri, model, good)
    other = evaluate(uri, model, 1, OTHER_DATA)
    found = evaluations.evaluations_of(MlflowClient(uri), model)
    assert {digest: (one.run_id, one.pq) for digest, one in found.items()} == {
        DATA.digest: (newest.run_id, pq(30)),
        OTHER_DATA.digest: (other.run_id, pq(1)),
    }


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("health", [True, False])
def test_a_server_that_refuses_access_says_what_to_set(status: int, health: bool) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if health and self.path == "/health" else status)
            self.end_headers()
            self.wfile.write(b"You are not authenticated.")

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(UserError, match=rf"refuses access \(HTTP status {status}\).*MLFLOW_TRACKING_USERNAME"):
            ask(f"http://127.0.0.1:{server.server_port}", "model", version=1)
        server.shutdown()


def test_an_address_with_a_password_is_refused_without_printing_it() -> None:
    for uri in ("http://me:secret@127.0.0.1:9", "https://secret@127.0.0.1:9"):
        with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refusal:
            ask(uri, "model", version=1)
        assert "secret" not in str(refusal.value)
    with pytest.raises(UserError, match=f"{UNUSED} does not answer"):
        ask(UNUSED, "model", version=1)
