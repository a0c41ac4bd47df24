"""Drives a headless Chromium through its debugging pipe: no driver, no package, no open port."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WANTED = "VQF_BROWSER"
PATIENCE = 60.0  # seconds that an answer may take
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """Return the browser that VQF_BROWSER names, else the first that is installed, else None.

    Raises:
        FileNotFoundError: If VQF_BROWSER names one that is not there: whoever sets it wants pages to be seen.
    """
    if wanted := os.environ.get(WANTED):
        if (found := shutil.which(wanted)) is None:
            raise FileNotFoundError(f"{WANTED}={wanted}: no such program; on Debian: apt-get install chromium")
        return found
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a browser, and everything that it asked for or complained of."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        self.buffer, self.answers, self.sent = b"", dict[int, Mapping[str, Any]](), 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, width: int, *, mobile: bool = False, dark: bool = False, paper: bool = False) -> None:
        """Show a file in a window of so many pixels, or as a printer would lay it out on paper of that width."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        window = {"width": width, "height": 900, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
        self.call("Emulation.setDeviceMetricsOverride", **window)
        self.requests, self.complaints, self.loaded = [], [], False
        self.call("Page.navigate", url=path.absolute().as_uri())
        self._wait(lambda: self.loaded)

    def run(self, script: str) -> Any:
        """Evaluate an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write an image of the whole page, not of the window alone."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """Print the page on A4, as browsers do when nobody ticks a box: without backgrounds."""
        answer = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **parameters: Any) -> Mapping[str, Any]:
        """Send a command and wait for its answer."""
        self.sent += 1
        number = self.sent
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        self._wait(lambda: number in self.answers)
        return self.answers.pop(number)

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not done():
            message = self._receive(deadline)
            assert "error" not in message, message["error"]
            if "id" in message:
                self.answers[message["id"]] = message["result"]
            else:
                self._notice(message["method"], message["params"])

    def _receive(self, deadline: float) -> Mapping[str, Any]:
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.reading], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            piece = os.read(self.reading, 1 << 20)
            assert piece, "the browser has ended"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def _notice(self, event: str, facts: Mapping[str, Any]) -> None:
        if event == "Page.loadEventFired":
            self.loaded = True
        elif event == "Network.requestWillBeSent":
            self.requests.append(facts["request"]["url"])
        elif event in ("Network.loadingFailed", "Runtime.exceptionThrown"):
            self.complaints.append(json.dumps(facts))
        elif event == "Log.entryAdded":
            self.complaints.append(facts["entry"]["text"])


@contextmanager
def open_browser(program: str, profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile of its own, and end it."""
    to_browser, from_browser = os.pipe(), os.pipe()

    def connect() -> None:  # it reads commands from descriptor 3 and writes to 4
        reading, writing = os.dup(to_browser[0]), os.dup(from_browser[1])
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    process = subprocess.Popen(
        [program, *FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=connect,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (to_browser[0], from_browser[1]):
        os.close(end)
    try:
        yield Browser(from_browser[0], to_browser[1])
    finally:
        process.terminate()
        process.wait(PATIENCE)
        for end in (from_browser[0], to_browser[1]):
            os.close(end)
