"""Standard output and error of a job: whatever is written, a terminal acts on line ends, tabs and colors only.

Text from outside is escaped where it is put into a line, too: only there is it known which line ends are its own.
"""

import re
import sys
from typing import Any, TextIO, cast

from maskformer.untrusted import escaped

# Colors as tyro and Ray use them. A background, or hidden text, is not among them.
_COLOR = r"\x1b\[(?:(?:0|1|2|22|3[0-7]|39|9[0-7])(?:;(?=\d)|(?=m)))*m"
_KEPT = re.compile(rf"(\n|\t|{_COLOR})")


def printable(text: str, terminal: bool = False) -> str:
    """Return text of several lines as it may be written; `terminal` keeps colors, which are removed otherwise."""
    parts = _KEPT.split(text)
    parts[::2] = map(escaped, parts[::2])
    if not terminal:
        parts[1::2] = ["" if part.startswith("\x1b") else part for part in parts[1::2]]
    return "".join(parts)


def print_line(text: str) -> None:
    """Print one line, whatever the texts from outside in it."""
    print(escaped(text), flush=True)


class Printable:
    """A text stream that writes to another one what `printable` returns."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")  # for what the encoding of the terminal lacks

    def write(self, text: str) -> int:
        if text.isprintable():
            self._stream.write(text)
            return len(text)
        terminal = "\x1b" in text or text.startswith("\r")
        terminal = terminal and self._stream.isatty()  # anew each time: the descriptor may be redirected meanwhile
        # The bars of tqdm begin with a carriage return.
        start = "\r" if terminal and text.startswith("\r") else ""
        self._stream.write(start + printable(text.removeprefix(start), terminal))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard() -> None:
    """Make standard output and error `Printable` from now on, which includes the traceback of a bug."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Printable):
            setattr(sys, name, cast(TextIO, Printable(stream)))
