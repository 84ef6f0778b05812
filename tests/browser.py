"""A real browser for tests: Debian's Chromium without a window, driven by its DevTools protocol over two pipes."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_DEADLINE = 60.0  # seconds for an answer
# Chromium reads commands from the file descriptor 3 and writes answers to 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)


class Browser:
    """A running Chromium; each opened page is a window of its own."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._received = b""
        self._number = 0
        self._events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._commands, content) :]
        answer = self._wait(lambda found: found.get("id") == self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def event(self, session: str, method: str) -> None:
        """Wait for an event of a page that was not waited for before."""
        event = self._wait(lambda found: found.get("method") == method and found.get("sessionId") == session)
        self._events = [other for other in self._events if other is not event]

    def events(self, session: str) -> list[dict[str, Any]]:
        """Return the events of a page that came so far."""
        return [event for event in self._events if event.get("sessionId") == session]

    def open(
        self,
        file: Path,
        *,
        width: int = 1280,
        height: int = 900,
        dark: bool = False,
        javascript: bool = True,
        phone: bool = False,
    ) -> "Page":
        """Open a file in a new window and return when it is loaded."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Emulation.setScriptExecutionDisabled", value=not javascript)
        page.call("Page.navigate", url=file.as_uri())
        self.event(session, "Page.loadEventFired")
        return page

    def _wait(self, wanted: Any) -> dict[str, Any]:
        deadline = time.monotonic() + _DEADLINE
        while True:
            for event in self._events:
                if wanted(event):
                    return event
            while b"\0" not in self._received:
                if not select.select([self._answers], [], [], max(0, deadline - time.monotonic()))[0]:
                    raise TimeoutError(f"Chromium did not answer in {_DEADLINE:g} seconds.")
                part = os.read(self._answers, 1 << 20)
                if not part:
                    raise RuntimeError("Chromium ended.")
                self._received += part
            line, _, self._received = self._received.partition(b"\0")
            message = json.loads(line)
            if "id" in message and wanted(message):
                return message
            if "method" in message:
                self._events.append(message)


class Page:
    """A window with a page."""

    def __init__(self, browser: Browser, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression; of a promise, when it is kept."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key, by its JavaScript name."""
        codes = {"Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, "Tab": 9}
        code = codes.get(key) or ord(key.upper())
        typed = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **typed)

    def type(self, words: str) -> None:
        """Put text into the element that has the focus, as from a keyboard."""
        self.call("Input.insertText", text=words)

    def complaints(self) -> list[str]:
        """Return what the page wrote to the console, its uncaught errors and its violations of the policy."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        self.evaluate("0")  # what came before is delivered
        return [json.dumps(each["params"]) for each in self._browser.events(self._session) if each["method"] in kinds]

    def screenshot(self, file: Path, *, whole: bool = False) -> None:
        """Write what is seen, or the whole page, as a PNG."""
        taken = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with an empty profile folder; skip the test if it is not installed."""
    program = shutil.which("chromium")
    if not program:
        pytest.skip("Chromium is not installed (Debian's package chromium)")
    read_commands, write_commands = map(_high, os.pipe())
    read_answers, write_answers = map(_high, os.pipe())
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", _LAUNCH, str(read_commands), str(write_answers)),
            *(program, *options, f"--user-data-dir={profile}"),
        ],
        pass_fds=(read_commands, write_answers),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        browser = Browser(write_commands, read_answers)
        yield browser
        browser.call("Browser.close")
        process.wait(timeout=_DEADLINE)
    finally:
        process.kill()
        process.wait()
        os.close(write_commands)
        os.close(read_answers)


def _high(descriptor: int) -> int:
    """Give a file descriptor a number that is neither 3 nor 4."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high
