"""A real headless Chromium for tests, driven over a pipe by its DevTools protocol."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--mute-audio", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe"),
)
WAIT_SECONDS = 60.0


def find_browser() -> str | None:
    """Path of an installed Chromium; None where there is none."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page of a headless Chromium, closed at the end of a `with` block."""

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        program = find_browser()
        assert program is not None
        down_read, self._down = os.pipe()
        self._up, up_write = os.pipe()

        def connect() -> None:
            # The protocol is read from 3 and written to 4; copies first, lest one cover the other.
            spare_read, spare_write = os.dup(down_read), os.dup(up_write)
            os.dup2(spare_read, 3)
            os.dup2(spare_write, 4)

        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(down_read)
        os.close(up_write)
        self._rest = b""
        self._last = 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._down)
        self._process.kill()
        self._process.wait()
        os.close(self._up)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; events that come before its answer are kept."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._down, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self._keep(answer)

    def open(self, url: str) -> None:
        """Go to a page and wait until its own script has run."""
        self.call("Page.navigate", url=url)
        self.wait("document.documentElement?.dataset.ready === 'yes'")

    def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript condition holds."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, f"did not happen: {condition}"
            time.sleep(0.05)

    def click(self, selector: str, across: float = 0.5, row: int = 0) -> None:
        """Press the left button on an element, at a share of its width."""
        x, y = self.evaluate(
            f"(() => {{ const one = document.querySelectorAll({json.dumps(selector)})[{row}];"
            "one.scrollIntoView({block: 'center'}); const area = one.getBoundingClientRect();"
            f"return [area.left + {across} * area.width, area.top + area.height / 2]; }})()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, selector: str | None = None) -> np.ndarray:
        """[H W 3] uint8, what is on the screen: an element, or the window."""
        from PIL import Image

        options: dict[str, Any] = {}
        if selector is not None:
            area = self.evaluate(
                f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
                "one.scrollIntoView({block: 'center'}); const area = one.getBoundingClientRect();"
                "return {x: area.left + scrollX, y: area.top + scrollY, width: area.width,"
                " height: area.height, scale: 1}; })()"
            )
            options["clip"] = area
        shot = self.call("Page.captureScreenshot", format="png", **options)["data"]
        with Image.open(io.BytesIO(base64.b64decode(shot))) as image:
            return np.array(image.convert("RGB"))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = os.read(self._up, 1 << 16)
            assert got, "the browser ended"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def _keep(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.complaints.append(parameters["entry"]["text"])
