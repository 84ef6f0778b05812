"""What reaches a terminal, and what reaches a file or a pipe."""

import io
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from jobs.shared.streams import Printable, printable

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "on_terminal", "in_file"),
    [
        ("plain é 猫\n\tnext", "plain é 猫\n\tnext", "plain é 猫\n\tnext"),
        ("\x1b[1;31mred\x1b[0m", "\x1b[1;31mred\x1b[0m", "red"),
        ("\x1b[2J\x1b]0;t\x07\x1bc\x9b2J", r"\x1b[2J\x1b]0;t\x07\x1bc\x9b2J", r"\x1b[2J\x1b]0;t\x07\x1bc\x9b2J"),
        ("\x1b[8mhidden\x1b[41;31m", r"\x1b[8mhidden\x1b[41;31m", r"\x1b[8mhidden\x1b[41;31m"),
        ("a\rb\b\x85\u2028\u202e\udcff", r"a\rb\x08\x85\u2028\u202e\udcff", r"a\rb\x08\x85\u2028\u202e\udcff"),
    ],
)
def test_only_colors_reach_a_terminal(text: str, on_terminal: str, in_file: str) -> None:
    assert printable(text, terminal=True) == on_terminal
    assert printable(text) == in_file


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_of_tqdm_move_on_a_terminal_only() -> None:
    for stream, start in ((Terminal(), "\r"), (io.StringIO(), r"\r")):
        Printable(stream).write("\r50% a\rb")
        assert stream.getvalue() == rf"{start}50% a\rb"


def test_lines_are_written_as_text_is() -> None:
    stream = io.StringIO()
    Printable(stream).writelines(["a\n", "\x1b[2J\n"])
    assert stream.getvalue() == "a\n\\x1b[2J\n"


JOB = r"""
import logging, sys, warnings
from tqdm import tqdm
from jobs.shared.cli import run
from jobs.shared.console import quiet
HOSTILE = "\x1b[2J\nFORGED \x1b[31m\r\udcff"
def main():
    for verbose in (False, True):
        with quiet(verbose):
            logging.getLogger("pipelines.test").warning("logged %s", HOSTILE)
            for _ in tqdm(range(2), file=sys.stderr, ncols=60):
                pass
    sys.stdout.write("\x1b[32mgreen\x1b[0m\n")
    sys.stderr.writelines([HOSTILE.replace("\n", "")])
    warnings.warn(HOSTILE.replace("\n", ""))
    raise RuntimeError("a bug " + HOSTILE.replace("\n", ""))
run(main)
"""


def test_logs_warnings_bars_and_a_traceback_in_a_pipe(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", JOB], cwd=ROOT, env=environment, capture_output=True, timeout=60)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert (done.returncode, out) == (1, "green\n")
    assert {char for char in err if not char.isprintable()} == {"\n"}
    assert not [line for line in err.splitlines() if line.startswith("FORGED")]
    assert err.count("\n  FORGED") == 2  # the log lines, whose continuation is indented
    assert r"RuntimeError: a bug \x1b[2JFORGED" in err
    (log,) = tmp_path.glob("*.log")
    assert r"logged \x1b[2J" in log.read_text()


def test_a_terminal_keeps_its_bars_and_colors(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", JOB], cwd=ROOT, env=environment, stdout=follower, stderr=follower
    ) as job:
        os.close(follower)
        shown = b""
        try:
            while part := os.read(leader, 65536):
                shown += part
        except OSError:  # the job has ended
            pass
        assert job.wait(60) == 1
    os.close(leader)
    text = shown.decode().replace("\r\n", "\n")
    assert "\x1b[32mgreen\x1b[0m\n" in text
    assert "\r100%" in text
    assert "\x1b[2J" not in text
    assert r"a bug \x1b[2JFORGED" in text
