"""One MLflow server and one database for all tests of tracking: each takes seconds to start or create."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.pipelines.tracking.mlflow_server import mlflow_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """Run an MLflow server; return its URI and process."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


@pytest.fixture(scope="package")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a SQLite database, whose tables are created on first use."""
    file = tmp_path_factory.mktemp("sqlite") / "mlflow.db"
    file.touch()
    return file


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, database: Path) -> str:
    return f"sqlite:///{database}" if request.param == "sqlite" else request.getfixturevalue("server")[0]
