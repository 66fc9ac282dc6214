"""A headless Chromium, controlled over its debugging protocol."""

import asyncio
import base64
import re
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)

_KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowDown": 40}


class Page:
    """One tab, with its console messages and requests."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._session: str | None = None
        self._sent = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self._loaded = False

    async def attach(self) -> None:
        """Open a tab and subscribe to its events."""
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self._sent += 1
        message: dict[str, Any] = {"id": self._sent, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._socket.send_json(message)
        while True:
            answer = await self._receive()
            if answer.get("id") == self._sent:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    async def open(self, url: str, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Load a page at a width in CSS pixels."""
        await self.resize(width, height, dark=dark)
        await self.loaded_by("Page.navigate", url=url)

    async def resize(self, width: int, height: int = 900, *, dark: bool = False) -> None:
        """Give the window a size in CSS pixels, and light or dark colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def loaded_by(self, method: str, **params: Any) -> None:
        """Send a command that loads a page, and wait until it is loaded."""
        self._loaded = False
        await self.call(method, **params)
        while not self._loaded:
            await self._receive()

    async def evaluate(self, expression: str) -> Any:
        """Evaluate an expression in the page; the value of a promise is awaited."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 10.0) -> None:
        """Wait until an expression is true in the page."""
        is_true = await self.evaluate(f"""new Promise((done) => {{
            const end = performance.now() + {1000 * timeout_s};
            const look = () => {{
                if ({expression}) done(true);
                else if (performance.now() > end) done(false);
                else setTimeout(look, 20);
            }};
            look();
        }})""")
        assert is_true, f"not within {timeout_s:g} s: {expression}"

    async def press(self, *keys: str) -> None:
        """Press keys, such as Tab or Enter; `Shift+Tab` holds Shift."""
        for name in keys:
            shift, _, key = name.rpartition("+")
            text = {"Enter": "\r", " ": " "}.get(key, "")
            pressed = {"key": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": 8 if shift else 0}
            await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **pressed)
            await self.call("Input.dispatchKeyEvent", type="keyUp", **pressed)

    async def type(self, text: str) -> None:
        """Type a text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def choose(self, selector: str, path: Path) -> None:
        """Choose a file in a field."""
        document = await self.call("DOM.getDocument")
        found = await self.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector=selector)
        await self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=found["nodeId"])

    async def screenshot(self, width: int, height: int | None = None) -> bytes:
        """Return a PNG of the whole page, or of its top."""
        tall = height or await self.evaluate("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": tall, "scale": 1}
        answer = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(answer["data"])

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self._socket.receive_json()
        params = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.complaints.append(str(params))
            case "Log.entryAdded":
                self.complaints.append(str(params["entry"]))
            case "Page.javascriptDialogOpening":
                self.complaints.append(str(params))
        return message


def chromium() -> str | None:
    """Return the browser's path; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@asynccontextmanager
async def opened(profile: Path) -> AsyncIterator[Page]:
    """Open a browser with one tab; its stderr is discarded."""
    path = chromium()
    assert path is not None, "Chromium is missing; install it with deploy/chromium/install.sh"
    process = await asyncio.create_subprocess_exec(
        path,
        *_FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        address = ""
        while not address:
            line = (await process.stderr.readline()).decode(errors="replace")
            assert line, "Chromium ended before it listened"
            found = re.search(r"ws://\S+", line)
            address = found.group() if found else ""
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(address, max_msg_size=0) as socket,
            asyncio.TaskGroup() as reading,
        ):
            drain = reading.create_task(process.stderr.read(), name="stderr")
            page = Page(socket)
            await page.attach()
            yield page
            drain.cancel()
    finally:
        process.terminate()
        await process.wait()
