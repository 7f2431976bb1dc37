"""Files that lie on servers: how GDAL asks for them, who signs their addresses, and which failures are a server's.

What GDAL's own variables of the environment say comes first: credentials, requester pays, headers, proxies, time-outs.
Signatures expire, so addresses are signed as they are read, and no signature is written anywhere.
Source: https://gdal.org/en/stable/user/virtual_file_systems.html. Next: series.py (reading), stac.py (finding).
"""

import contextlib
import dataclasses
import functools
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import rasterio
from rasterio.errors import RasterioIOError

from skysense_jax.data.shards import RETRY_AFTER_S
from skysense_jax.ingest.acquisitions import Acquisition, Layer

UNREACHABLE = "unreachable: "  # how the reason of a date begins that is asked for again by the next build
PLANETARY_COMPUTER = "planetary_computer"
SIGNERS = (PLANETARY_COMPUTER,)

_T = TypeVar("_T")
Sign = Callable[[str], str]  # an address to the one to open now
_BROKEN_OFF = "the server broke off"
_OF_SERVERS = re.compile(
    rf"HTTP|CURL|timed? ?out|resolve host|connection|does not exist in the file system|{_BROKEN_OFF}", re.IGNORECASE
)
_OF_DISKS = re.compile("No such file|Input/output error|Stale file handle|Too many open files|Host is down")
_NAMES = re.compile(r"\S+://\S+|(?<!\S)['\"(]?/\S+")  # addresses and paths
_OPTIONS = {
    "GDAL_HTTP_CONNECTTIMEOUT": "10",  # seconds
    "GDAL_HTTP_TIMEOUT": "60",
    "GDAL_HTTP_MAX_RETRY": "2",
    "GDAL_HTTP_RETRY_DELAY": "0.5",  # seconds, doubled each time
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no search for files beside it: 3 requests instead of 12
}
_FILE_SYSTEMS = "/vsicurl/:/vsis3/:/vsigs/:/vsiaz/:/vsioss/:/vsiswift/"
_SIGNATURES = ("sig", "signature", "x-amz-signature", "x-goog-signature")


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in str(path) and not str(path).startswith("file://")


def environment(path: str | os.PathLike) -> contextlib.AbstractContextManager[Any]:
    """A context in which GDAL waits for a server, and asks again, but not for ever; nothing for a local file."""
    if not is_remote(path):
        return contextlib.nullcontext()
    return rasterio.Env(**{key: value for key, value in _OPTIONS.items() if key not in os.environ})


@contextlib.contextmanager
def told(path: str | os.PathLike) -> Iterator[None]:
    """A context in which a failure in the midst of a server's file says that it is the server's: GDAL does not."""
    try:
        yield
    except RasterioIOError as error:
        if not is_remote(path):
            raise
        raise RasterioIOError(f"{_BROKEN_OFF}: {error}") from error


def again(read: Callable[[], _T]) -> _T:
    """``read()``, tried again where a server does not answer; what is damaged is told at once."""
    attempt = read
    for seconds in RETRY_AFTER_S:
        try:
            return attempt()
        except OSError as error:
            if not _told(error, _OF_SERVERS):
                raise
        time.sleep(seconds)
        attempt = functools.partial(_afresh, read)
    return attempt()


def _afresh(read: Callable[[], _T]) -> _T:
    """``read()`` without what GDAL remembers of files: it does not ask for one again that it could not open once."""
    with rasterio.Env(CPL_VSIL_CURL_NON_CACHED=_FILE_SYSTEMS):
        return read()


def reason(error: BaseException) -> str:
    """What an error says, without signatures; begins with ``UNREACHABLE`` if a server or a disk is away."""
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*", r"\1", str(error))
    return f"{UNREACHABLE}{text}" if _told(error, _OF_SERVERS) or _told(error, _OF_DISKS) else text


def _told(error: BaseException | None, pattern: re.Pattern) -> bool:
    """Whether an error, or one that it came from, says so beside names of files: GDAL says the cause there."""
    while error is not None:
        if pattern.search(_NAMES.sub("", str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def signer(name: str) -> Sign:
    """The signer of this name; that of "" changes nothing.

    Raises:
      ValueError: there is none, or its package is missing.
    """
    if not name:
        return str
    if name not in SIGNERS:
        raise ValueError(f"sign = {name!r}; wanted one of {SIGNERS}")
    try:
        import planetary_computer  # an extra
    except ModuleNotFoundError as error:
        raise ValueError(f"sign = {name!r} needs a package more: pip install planetary-computer") from error
    return planetary_computer.sign  # it keeps its tokens until shortly before they expire


def is_signed(address: str) -> bool:
    """Whether an address carries a signature, which expires."""
    return any(key.lower() in _SIGNATURES for key in urllib.parse.parse_qs(urllib.parse.urlsplit(address).query))


def signed(acquisition: Acquisition, sign: Sign) -> Acquisition:
    """The acquisition with addresses to open now; raises OSError where the signer does not answer."""
    layers = {name: signed_layer(layer, sign) for name, layer in acquisition.layers.items()}
    classes = acquisition.classes and signed_layer(acquisition.classes, sign)
    clouds = tuple(signed_layer(layer, sign) for layer in acquisition.clouds)
    return dataclasses.replace(acquisition, layers=layers, classes=classes, clouds=clouds)


def signed_layer(layer: Layer, sign: Sign) -> Layer:
    return dataclasses.replace(layer, path=sign(layer.path))
