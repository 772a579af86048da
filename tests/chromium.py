"""A real headless Chromium for tests, spoken to through its own pipe (Chrome DevTools Protocol): no driver, no network."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")


class Page:
    """One open page."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []

    def attach(self) -> Self:
        """To a new tab, with its console, its network and its errors told."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; what comes before its answer is kept in `events`."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._out, 65536)
            if not more:
                raise RuntimeError("Chromium ended")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, path: Path, *, width: int = 1280) -> None:
        """A file, in a window of this many CSS pixels; returns when it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 800)
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def js(self, expression: str) -> Any:
        """The value of an expression, after what the page has scheduled."""
        code = f"new Promise((done) => setTimeout(() => done({expression}), 30))"
        found = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(json.dumps(found["exceptionDetails"]))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """A key that writes this character."""
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def complaints(self) -> list[str]:
        """What the console said: errors, exceptions, violations of the content security policy."""
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in told]

    def addresses(self) -> list[str]:
        """Whatever was loaded."""
        asked = (event for event in self.events if event["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in asked]

    def screenshot(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


def _above(end: int) -> int:
    """The same end of a pipe under a number that is not one of those that Chromium reads and writes, 3 and 4."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


@contextmanager
def chromium(profile: Path) -> Generator[Page]:
    """A page of a browser that ends with the block. profile: a folder of its own."""
    assert BINARY is not None, "look at BINARY first"
    theirs_in, ours_out, ours_in, theirs_out = (_above(end) for pair in (os.pipe(), os.pipe()) for end in pair)

    def place() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    command = [BINARY, *_FLAGS, f"--user-data-dir={profile}", "--remote-debugging-pipe"]
    with subprocess.Popen(
        command,
        preexec_fn=place,
        close_fds=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        for end in (theirs_in, theirs_out):
            os.close(end)
        try:
            yield Page(ours_out, ours_in).attach()
        finally:
            process.terminate()
            process.wait(20)
            for end in (ours_in, ours_out):
                os.close(end)
