"""A real headless Chromium, driven by chromedriver over the WebDriver protocol: a dozen HTTP calls need no library."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
# Keys that no character stands for, as the protocol has them.
KEYS = {"Left": "\ue012", "Right": "\ue014", "Home": "\ue011", "End": "\ue010", "Enter": "\ue007", "Tab": "\ue004"}
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "about:blank"),
)


class Browser:
    """One window; logs of its console and its network are kept."""

    def __init__(self, server: str, profile: Path) -> None:
        self._server = server
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        logs = {"browser": "ALL", "performance": "ALL"}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": logs}
        answer = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{answer['sessionId']}"

    def _call(self, method: str, path: str, **content: Any) -> Any:
        body = json.dumps(content).encode() if method == "POST" else None
        request = urllib.request.Request(self._server + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from error

    def post(self, path: str, **content: Any) -> Any:
        return self._call("POST", self._session + path, **content)

    def close(self) -> None:
        self._call("DELETE", self._session)

    def open(self, page: Path, width: int = 1280, height: int = 900) -> None:
        """Show a file in a window of this inner size, and wait for its pictures."""
        self.resize(width, height)
        self.requests()  # those of an empty window
        self.post("/url", url=page.as_uri())
        self.js("return Promise.all([...document.images].map((image) => image.decode().catch(() => 0))).then(() => 0)")

    def resize(self, width: int, height: int) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def js(self, script: str, *arguments: Any) -> Any:
        """What a script returns; of a promise, what it comes to."""
        return self.post("/execute/sync", script=script, args=list(arguments))

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.post("/goog/cdp/execute", cmd=command, params=parameters)

    def dark(self, wanted: bool) -> None:
        """What the system prefers; and no motion, so that nothing moves while it is clicked."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if wanted else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.devtools("Emulation.setEmulatedMedia", features=features)

    def find(self, css: str) -> dict[str, str]:
        return self.post("/element", using="css selector", value=css)

    def click(self, css: str) -> None:
        self.post(f"/element/{self.find(css)[ELEMENT]}/click")

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        actions = [{"type": way, "value": KEYS.get(key, key)} for key in keys for way in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keys", "actions": actions}])

    def drag(self, css: str, across: int, down: int = 0, touch: bool = False) -> None:
        """From the middle of an element, in pixels; with a mouse or a finger."""
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self.find(css))
        start = {"type": "pointerMove", "origin": self.find(css), "x": 0, "y": 0}
        move = {"type": "pointerMove", "origin": "pointer", "x": across, "y": down, "duration": 100}
        steps = [start, {"type": "pointerDown", "button": 0}, move, {"type": "pointerUp", "button": 0}]
        kind = {"pointerType": "touch" if touch else "mouse"}
        self.post(
            "/actions", actions=[{"type": "pointer", "id": f"pointer{touch}", "parameters": kind, "actions": steps}]
        )

    def pinch(self, css: str, start: int, end: int) -> None:
        """Two fingers on a line through the middle of an element, so many pixels from it, one after the other."""
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", self.find(css))
        fingers = []
        for number, side in enumerate((-1, 1)):
            place = {"type": "pointerMove", "origin": self.find(css), "y": 0}
            steps: list[dict[str, Any]] = [place | {"x": side * start}, *[{"type": "pause"}] * number]
            steps += [{"type": "pointerDown", "button": 0}, *[{"type": "pause"}] * (1 - number)]
            steps += [place | {"x": side * end, "duration": 100}, {"type": "pointerUp", "button": 0}]
            kind = {"pointerType": "touch"}
            fingers.append({"type": "pointer", "id": f"finger{number}", "parameters": kind, "actions": steps})
        self.post("/actions", actions=fingers)

    def wheel(self, css: str, by: int) -> None:
        scroll = {"type": "scroll", "origin": self.find(css), "x": 0, "y": 0, "deltaX": 0, "deltaY": by, "duration": 50}
        self.post("/actions", actions=[{"type": "wheel", "id": "wheel", "actions": [scroll]}])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", f"{self._session}/screenshot")))

    def console(self) -> list[str]:
        """Messages since the last call."""
        return [entry["message"] for entry in self.post("/se/log", type="browser")]

    def requests(self) -> list[str]:
        """Addresses of what was requested since the last call, but for data and the pages of an empty window."""
        events = [json.loads(entry["message"])["message"] for entry in self.post("/se/log", type="performance")]
        sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "chrome:"))]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with its driver."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert DRIVER is not None
    command: Sequence[str] = [DRIVER, f"--port={port}", "--log-level=SEVERE"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        opened = _started(f"http://127.0.0.1:{port}", profile)
        try:
            yield opened
        finally:
            opened.close()
    finally:
        driver.terminate()
        driver.wait(timeout=20)


def _started(server: str, profile: Path) -> Browser:
    for _ in range(200):
        try:
            with urllib.request.urlopen(f"{server}/status", timeout=5):
                return Browser(server, profile)
        except OSError:
            time.sleep(0.1)
    raise AssertionError("chromedriver does not answer")
