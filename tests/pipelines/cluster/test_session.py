"""Joining Ray: the address decides, a nested session is the outer one, and a wrong address is refused at once."""

import logging
import time
from types import SimpleNamespace

import pytest
import ray

from pipelines.cluster import session
from pipelines.errors import UserError
from tests import ray_nodes


@pytest.mark.parametrize(
    ("address", "remote"), [(None, False), ("", False), ("local", False), ("auto", True), ("10.0.0.1:6379", True)]
)
def test_the_address_decides_whether_a_cluster_is_used(
    address: str | None, remote: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert session.is_remote() == remote


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_in_seconds(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray was started"))
    [port] = ray_nodes.free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"{prefix}127.0.0.1:{port}")
    start = time.monotonic()
    with (
        pytest.raises(
            UserError, match=rf"RAY_ADDRESS={prefix}127\.0\.0\.1:{port}: .*Connection refused.*unset RAY_ADDR"
        ),
        session.session(),
    ):
        pass
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("url", ["127.0.0.1:8265", "", None])
def test_the_address_of_the_dashboard_is_told_if_there_is_one(
    url: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: SimpleNamespace(dashboard_url=url))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    caplog.set_level(logging.INFO)
    with session.session():
        assert caplog.messages[1:] == (["Ray's dashboard: http://127.0.0.1:8265"] if url else [])


@pytest.mark.ray
def test_a_nested_session_is_the_outer_one(ray_session: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:1")  # not used inside a session
    with session.session():
        assert ray.get_runtime_context().gcs_address == ray_session
    assert ray.is_initialized()
