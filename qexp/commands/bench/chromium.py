"""Headless Chromium, driven by the DevTools protocol over a pipe."""

import fcntl
import json
import os
import shutil
import time
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from tempfile import TemporaryDirectory
from typing import IO, Any

from qexp.common.errors import UserError

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
    *("--remote-debugging-pipe", "--disable-dev-shm-usage"),
    "--proxy-server=127.0.0.1:9",  # nothing answers there: a page that needs the network fails
)
PATIENCE = 120.0  # seconds until a page has to be ready


def find() -> str | None:
    """The browser: the variable CHROME_BIN, else one on the PATH; None without any."""
    named = os.environ.get("CHROME_BIN")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page of a browser; see `chromium`."""

    def __init__(self, read: IO[bytes], write: IO[bytes]) -> None:
        self.read, self.write = read, write
        self.count, self.rest, self.session = 0, b"", ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Performance"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a DevTools method; events that come before it are dropped."""
        self.count += 1
        message: dict[str, Any] = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.count:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"].get("exception")))
        return done["result"].get("value")

    def show(self, path: Path, width: int = 1400, height: int = 900, dark: bool = False) -> float:
        """Opens a report page. Returns seconds from the request until its first picture."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        ready = "document.readyState === 'complete' && 'ready' in document.documentElement.dataset"
        while not self.evaluate(ready):
            if time.monotonic() > end:
                raise UserError(f"{path}: was not ready in a browser after {PATIENCE:g} s")
            time.sleep(0.02)
        drawn = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
        self.evaluate(drawn)
        paint = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? 0"
        loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
        return float(self.evaluate(f"Math.max({paint}, {loaded})")) / 1000

    def metrics(self) -> dict[str, float]:
        """The browser's counters, such as Nodes, and ThreadTime and ScriptDuration in seconds."""
        self.call("HeapProfiler.collectGarbage")  # nodes of pages before this one
        listed = self.call("Performance.getMetrics")["metrics"]
        return {each["name"]: each["value"] for each in listed}

    def press(self, key: str, text: str = "") -> None:
        """A key goes down and up, for example `ArrowDown`; `text` is what it types."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowDown": 40, "ArrowRight": 39, " ": 32}
        code = codes.get(key, ord(key[0].upper()))
        typed = text or ("\r" if key == "Enter" else "")
        common = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=typed, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def picture(self, path: Path) -> None:
        """Writes what the window shows as a PNG file."""
        path.write_bytes(b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            piece = self.read.read(1 << 20)
            if not piece:
                raise UserError("the browser ended; CHROME_BIN may name another one")
            self.rest += piece
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def chromium(browser: str) -> Iterator[Chromium]:
    """A running browser with an empty profile, which ends with the block."""
    to_browser, from_us = map(_high, os.pipe())
    to_us, from_browser = map(_high, os.pipe())
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        actions = [
            (os.POSIX_SPAWN_DUP2, to_browser, 3),
            (os.POSIX_SPAWN_DUP2, from_browser, 4),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        words = [browser, *OPTIONS, f"--user-data-dir={profile}"]
        process = os.posix_spawn(browser, words, os.environ, file_actions=actions, setpgroup=0)
        os.close(to_browser)
        os.close(from_browser)
        try:
            with os.fdopen(to_us, "rb", 0) as read, os.fdopen(from_us, "wb", 0) as write:
                yield Chromium(read, write)
        finally:
            os.killpg(process, SIGKILL)
            os.waitpid(process, 0)


def _high(descriptor: int) -> int:
    """The same pipe under a number above those that the browser expects."""
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return high
