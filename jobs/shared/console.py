"""Console output of a job: this project's log lines and progress bars. Output of Ray and MLflow goes to a log file."""

import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from jobs.shared.streams import printable
from pipelines import progress
from pipelines.credentials import redacted
from pipelines.errors import UserError

FORMAT = "%(asctime)s %(levelname)s %(message)s"

log_files: list[Path] = []
"""Where the output of Ray and MLflow went in this process."""


class Formatter(logging.Formatter):
    """Formats log lines without secrets. Those that follow, as of a traceback, are indented: none can pass for one."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record))).replace("\n", "\n  ")


class Console(logging.Handler):
    """Writes log lines to a terminal without disturbing its progress bar."""

    def __init__(self, stream: TextIO, announcement: str = "") -> None:
        """Write `announcement` before the first line: a job that is refused before has nothing to announce."""
        super().__init__()
        self.stream, self._announcement = stream, announcement
        self.setFormatter(Formatter(FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if self._announcement:
                first = logging.makeLogRecord({**vars(record), "msg": self._announcement, "args": None})
                first.levelname, self._announcement = "INFO", ""
                tqdm.write(self.format(first), file=self.stream)
            tqdm.write(self.format(record), file=self.stream)
            self.stream.flush()
        except Exception:  # a terminal that is gone must not end a training
            self.handleError(record)


@contextmanager
def quiet(verbose: bool) -> Iterator[None]:
    """Redirect stdout and stderr to a log file inside the block, except this project's log lines.

    File descriptors are redirected, not only Python's streams: Ray prints from C++ and from threads of its own.

    Args:
        verbose: leave everything on the console.

    Raises:
        UserError: the log file cannot be created.
    """
    if verbose:
        yield
        return
    file = _new_file()
    log_files.append(file)
    _flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("pipelines", "maskformer", "jobs")]
    handlers = root.handlers
    with file.open("ab") as log, open(os.dup(saved[1]), "w", encoding="utf-8", buffering=1) as stderr:
        # In a submitted job this is a node of the cluster.
        host = f"{socket.gethostname()}:" if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else ""
        console = Console(stderr, f"Output of Ray and MLflow goes to {host}{file} (--verbose shows it here).")
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setFormatter(Formatter(f"{FORMAT} [%(name)s]"))
        try:
            root.handlers = [to_file, *(handler for handler in handlers if type(handler) is not logging.StreamHandler)]
            for logger in ours:
                logger.addHandler(console)
            progress.terminal = stderr if os.isatty(saved[1]) else None
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
            yield
        finally:
            _flush()
            for descriptor, original in zip((1, 2), saved, strict=True):
                os.dup2(original, descriptor)
                os.close(original)
            progress.terminal = None
            root.handlers = handlers
            for logger in ours:
                logger.removeHandler(console)
            to_file.close()


def _new_file() -> Path:
    """Create a log file that only this user can read, in the temporary folder."""
    job = Path(sys.argv[0].split(" ")[-1]).stem or "job"
    try:
        descriptor, name = tempfile.mkstemp(".log", f"maskformer-ray-{job}-{time.strftime('%Y%m%d-%H%M%S')}-")
    except OSError as error:
        raise UserError(
            f"The log file cannot be created in {tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder that "
            f"can be written, or use --verbose."
        ) from error
    os.close(descriptor)
    return Path(name)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a full disk or a closed pipe
            stream.flush()
