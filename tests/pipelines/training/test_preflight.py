"""What cannot work is refused before a run starts."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.recipes import DEMO
from pipelines.errors import UserError
from pipelines.training.preflight import prepare_run


def test_compiling_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = str(tmp_path / "nowhere")
    config = replace(
        DEMO,
        data=replace(DEMO.data, train=nowhere),
        run=replace(DEMO.run, storage=str(tmp_path)),
        scaling=replace(DEMO.scaling, compile=True),
    )
    monkeypatch.setattr("pipelines.training.preflight._elsewhere", lambda: False)  # whatever other tests started
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"--scaling\.compile needs a C\+\+ compiler, .* has no no-such-compiler\."):
        prepare_run(config)
    with pytest.raises(UserError, match="nowhere"):
        prepare_run(replace(config, scaling=DEMO.scaling))
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    with pytest.raises(UserError, match="nowhere"):
        prepare_run(config)
