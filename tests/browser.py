"""Headless Chromium on a page of ours: what it draws, what it asks the network for, and what it complains about."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0  # that an answer may take

# Every text that can be seen, with its contrast: colours are painted on a canvas, bottom up, so that the browser itself
# works out alpha, opacity, color-mix and names.
CONTRASTS = """
(() => {
  const brush = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const paint = (colour, alpha) => {
    brush.globalAlpha = alpha; brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1);
  };
  const light = () => {
    const [r, g, b] = [...brush.getImageData(0, 0, 1, 1).data].map(
      v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility({visibilityProperty: true})) continue;
    const parents = [];
    for (let e = element; e; e = e.parentElement) parents.unshift(getComputedStyle(e));
    const style = parents.at(-1), opacity = parents.reduce((o, s) => o * s.opacity, 1);
    paint("Canvas", 1);
    parents.forEach(s => paint(s.backgroundColor, 1));
    const below = light();
    const vector = element instanceof SVGElement;
    paint(vector ? style.fill : style.color, opacity * (vector ? style.fillOpacity : 1));
    const above = light();
    const scale = vector ? element.getScreenCTM().a : 1;
    found.push({
      text, contrast: (Math.max(above, below) + 0.05) / (Math.min(above, below) + 0.05),
      pixels: parseFloat(style.fontSize) * (scale || 1),
    });
  }
  return found;
})()
"""


def find() -> str | None:
    """Return the path of a Chromium, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class View:
    """A page as it is at one width and in one colour scheme."""

    width: int  # innerWidth, in CSS pixels
    dark: bool  # what matchMedia says
    sideways: bool  # the page itself scrolls sideways
    errors: list[str]  # of scripts, and what the console shows as an error
    requests: list[str]  # for anything but file: and data:
    texts: list[dict[str, Any]]  # of each text: text, contrast, pixels (the size it is drawn at)


class Browser:
    """One Chromium, told what to do over its debugging pipe; a context manager that ends it."""

    def __init__(self, profile: Path) -> None:
        """Start it with an empty folder to keep its files in."""
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()
        options = (
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            *("--no-first-run", "--disable-background-networking", "--hide-scrollbars"),
            *(f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"),
        )
        # Chromium reads commands from descriptor 3 and answers on 4.
        self.process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}',
                "bash",
                str(find()),
                *options,
            ],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self.buffer = b""
        self.events: list[dict[str, Any]] = []
        self.number = 0
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.out)  # it ends by itself when nobody can tell it anything any more
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.into)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have one command of the DevTools protocol done and return its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _read(self) -> dict[str, Any]:
        """Return the next message, an answer or an event."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.into], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self.into, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError(f"Chromium said nothing for {SECONDS:g} seconds, or ended.")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page; a promise is waited for."""
        result = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def view(self, path: Path, width: int, dark: bool, screenshot: Path | None = None) -> View:
        """Open the file `path` in a window of exactly `width` pixels; the whole page goes to `screenshot` (.png)."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            **{"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False},
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.evaluate(
            "new Promise(done => document.readyState == 'complete' ? done() : addEventListener('load', () => done()))"
        )
        if screenshot is not None:
            data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            screenshot.write_bytes(base64.b64decode(data))
        width, sideways, matches, texts = self.evaluate(
            "[innerWidth, document.scrollingElement.scrollWidth > innerWidth,"
            f" matchMedia('(prefers-color-scheme: dark)').matches, {CONTRASTS}]"
        )
        errors, requests = [], []
        for event in self.events:
            got = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                errors.append(got["exceptionDetails"]["exception"]["description"])
            elif event["method"] == "Runtime.consoleAPICalled" and got["type"] == "error":
                errors.append(str(got["args"]))
            elif event["method"] == "Log.entryAdded" and got["entry"]["level"] == "error":
                errors.append(got["entry"]["text"])
            elif event["method"] == "Network.requestWillBeSent":
                url = got["request"]["url"]
                if not url.startswith(("file:", "data:")):
                    requests.append(url)
        return View(width, matches, sideways, errors, requests, texts)
