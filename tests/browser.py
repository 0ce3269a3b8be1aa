"""A page in a headless Chromium, spoken to through its pipe (the DevTools protocol): what it asked for, said and shows."""

from __future__ import annotations

import base64
import fcntl
import io
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
OPTIONS += ["--no-first-run", "--disable-extensions", "--remote-debugging-pipe"]
SPEAKS = {"Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"}


class Page:
    """requests: addresses asked for, beside the page and what is inside it; said: what came to the console."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._rest, self._ids = into, out, b"", itertools.count(1)
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + 60
        while b"\0" not in self._rest:
            assert select.select([self._out], [], [], max(until - time.monotonic(), 0))[0], "Chromium is silent"
            piece = os.read(self._out, 1 << 20)
            assert piece, "Chromium is gone"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        message = json.dumps({"id": number, "method": method, "params": params, **self._session}).encode() + b"\0"
        while message:
            message = message[os.write(self._into, message) :]
        while (found := self._next()).get("id") != number:
            self.events.append(found)
        assert "error" not in found, found
        return found["result"]

    def open(self, file: Path, width: int) -> None:
        """Load a file as a window of this width shows it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        self.events.clear()
        self._address = file.absolute().as_uri()
        self.ask("Page.navigate", url=self._address)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of an expression of JavaScript, awaited."""
        found = self.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def requests(self) -> list[str]:
        asked = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [url for url in asked if url != self._address and not url.startswith("data:")]

    @property
    def said(self) -> list[Any]:
        return [e["params"] for e in self.events if e.get("method") in SPEAKS]

    def picture(self, x: float, y: float, width: float, height: float) -> np.ndarray:
        """What is seen of a rectangle of the page, (height, width, 3) bytes."""
        from PIL import Image

        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB"))


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """A page of a fresh Chromium, whose profile is in the folder; ended with the block."""
    ends = [*os.pipe(), *os.pipe()]
    theirs_in, into, out, theirs_out = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 30) for fd in ends]  # not 3 or 4
    for fd in ends:
        os.close(fd)
    command = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", str(PROGRAM), *OPTIONS]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={folder}"],
        pass_fds=(theirs_in, theirs_out),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        found = Page(into, out)
        yield found
        found._session = {}
        found.ask("Browser.close")
        process.wait(20)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
        os.close(into)
        os.close(out)
