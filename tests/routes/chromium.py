"""Control a headless Chromium through pipes with the DevTools protocol, without extra packages or network access."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# The sandbox does not work for root, /dev/shm may be small, and the browser must not access the network or the desktop.
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--force-color-profile=srgb", "--proxy-server=http://127.0.0.1:9"),
)


class Tab:
    """A browser tab. `problems` collects its console messages and exceptions, including violations of the security policy."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive, self._rest, self._number = send, receive, b"", 0
        self._session: str | None = None
        self.problems: list[str] = []
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {} if self._session is None else {"sessionId": self._session}
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self._notice(answer)
        assert "error" not in answer, (method, answer)
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._receive, 2**16)
            assert part, "the browser has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(text))

    def _notice(self, event: dict[str, Any]) -> None:
        given = event.get("params", {})
        if event.get("method") == "Log.entryAdded":
            self.problems.append(given["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(given["exceptionDetails"]["text"])
        self._loaded |= event.get("method") == "Page.loadEventFired"

    def open(self, path: Path, width: int, height: int = 900, *, scripts: bool = True, **media: str) -> None:
        """Load a file in a window of a width in pixels. `media` sets CSS media features, with `_` for `-`."""
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.media("", **media)
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not self._loaded:
            self._notice(self._read())

    def media(self, kind: str, **features: str) -> None:
        """Emulate a CSS media type, such as "print", and media features; "" is the screen."""
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=given)

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression in the page and return its value."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save the visible part, or the whole page, as PNG."""
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))

    def pdf(self) -> bytes:
        """Print the page to PDF; return the contents of the file."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False)["data"])


def _moved(descriptor: int) -> int:
    """Move a file descriptor to a number of at least 10; return the number."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


@contextmanager
def tab(profile: Path) -> Iterator[Tab]:
    """Run a browser with its profile in a folder, and end it on exit.

    Raises:
        RuntimeError: Chromium is not installed.
    """
    if PROGRAM is None:
        raise RuntimeError("no chromium: apt-get install chromium")
    # The browser reads from descriptor 3 and writes to descriptor 4.
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # The shell duplicates the pipes to 3 and 4, so they must not have these numbers before.
    theirs_in, theirs_out = (_moved(descriptor) for descriptor in (theirs_in, theirs_out))
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", PROGRAM, *FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for descriptor in (theirs_in, theirs_out):
        os.close(descriptor)
    try:
        yield Tab(ours_out, ours_in)
    finally:
        for descriptor in (ours_out, ours_in):
            os.close(descriptor)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
