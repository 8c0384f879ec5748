"""A tab of a headless Chromium, driven over its debugging protocol: pages that poll need a browser in real time."""

from __future__ import annotations

import itertools
import json
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from tests.report.pages import CHROMIUM, FLAGS

PATIENCE = 60.0
"""Seconds that a slow machine may take for anything."""


class Tab:
    """A context manager.

    Attributes:
        errors: What the page's scripts or the browser complained about.
    """

    def __init__(self, profile: Path, width: int = 1280) -> None:
        self.errors: list[str] = []
        self._ids = itertools.count(1)
        flags = [flag for flag in FLAGS if not flag.startswith(("--virtual-time", "--window-size"))]
        command = [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = self._port(profile / "DevToolsActivePort")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=PATIENCE) as answer:
                target = next(entry for entry in json.load(answer) if entry["type"] == "page")
            self._ws = connect(target["webSocketDebuggerUrl"], compression=None, max_size=None).__enter__()
        except BaseException:
            self._process.kill()
            raise
        for domain in ("Runtime", "Log", "Page"):
            self.call(f"{domain}.enable")
        # --window-size does not go below the 500 pixels of a desktop's window
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol."""
        number = next(self._ids)
        self._ws.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._ws.recv(PATIENCE))
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def open(self, url: str) -> None:
        """Go to a page, and wait until its script has begun."""
        self.call("Page.navigate", url=url)
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression becomes true."""
        end = time.monotonic() + PATIENCE
        while not self.evaluate(script):
            assert time.monotonic() < end, f"never true: {script}; {self.errors}"
            time.sleep(0.05)

    @property
    def text(self) -> str:
        """What the page shows."""
        return str(self.evaluate("document.body.innerText"))

    def _note(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(json.dumps(params["entry"]))
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.errors.append(json.dumps(params["args"]))

    def _port(self, file: Path) -> int:
        end = time.monotonic() + PATIENCE
        while not (file.exists() and file.read_text(encoding="utf-8").count("\n") >= 1):
            assert self._process.poll() is None, "Chromium did not start"
            assert time.monotonic() < end, "Chromium never told its port"
            time.sleep(0.05)
        return int(file.read_text(encoding="utf-8").splitlines()[0])

    def __enter__(self) -> Tab:
        return self

    def __exit__(self, *_: object) -> None:
        self._ws.close()
        self._process.terminate()
        self._process.wait(PATIENCE)
