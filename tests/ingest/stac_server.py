"""A server for tests, in a process of its own: a STAC API over items of a folder, files with ranges, and signatures.

``python stac_server.py FOLDER PORT`` prints its port (0: any free one) and serves 127.0.0.1 until it is ended.

- /api: a STAC API (item search) over FOLDER/items/*.json, one item a page.
- /files/NAME, /store/NAME, /bucket/NAME: FOLDER/NAME, whole or in ranges.
- /sas/ACCOUNT/CONTAINER: a token as the Planetary Computer gives it.
- http://ACCOUNT.blob.core.windows.net/NAME (asked for as of a proxy): FOLDER/NAME, with the latest token only.
- /control/fail?path=P&times=N: the next N requests of paths that begin with P are answered 503.
- /control/log: all requests so far.
"""

import datetime
import http.server
import json
import pathlib
import re
import sys
import urllib.parse

FOLDER = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else pathlib.Path()
LOG: list[dict] = []
FAILING: dict[str, int] = {}
TOKENS: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer(b"")

    def do_HEAD(self):
        self._answer(b"")

    def do_POST(self):
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body):
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if address.path == "/control/fail":
            FAILING[query["path"]] = int(query["times"])
            return self._send(200, b"{}")
        if address.path == "/control/log":
            return self._send(200, json.dumps(LOG).encode())
        payer = self.headers.get("x-amz-request-payer")
        LOG.append(dict(method=self.command, path=address.path, query=address.query, body=body.decode(), payer=payer))
        for path, times in FAILING.items():
            if address.path.startswith(path) and times:
                FAILING[path] -= 1
                return self._send(503, b"busy")
        if address.netloc.endswith(".blob.core.windows.net"):
            allowed = query.get("sig") == TOKENS[-1] if TOKENS else False
            return self._file(address.path.removeprefix("/")) if allowed else self._send(403, b"no signature")
        if address.path.startswith("/sas/"):
            TOKENS.append(f"secret{len(TOKENS)}")
            expiry = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
            return self._json({"msft:expiry": expiry.isoformat(), "token": f"se=soon&sig={TOKENS[-1]}"})
        if address.path.startswith(("/files/", "/store/", "/bucket/")):
            return self._file(address.path.split("/", 2)[2])
        return self._api(address.path, json.loads(body or b"{}"))

    def _api(self, path, asked):
        root = f"http://127.0.0.1:{self.server.server_port}/api"
        if path.rstrip("/") == "/api":
            links = [
                dict(rel="self", href=root),
                dict(rel="root", href=root),
                dict(rel="search", href=f"{root}/search", method="POST", type="application/geo+json"),
            ]
            conforms = ["https://api.stacspec.org/v1.0.0/core", "https://api.stacspec.org/v1.0.0/item-search"]
            facts = dict(type="Catalog", id="api", description="for tests", stac_version="1.0.0")
            return self._json({**facts, "conformsTo": conforms, "links": links})
        if path != "/api/search":
            return self._send(404, b"none")
        found = [json.loads(file.read_text()) for file in sorted((FOLDER / "items").glob("*.json"))]
        found = [item for item in found if matches(item, asked)]
        start = int(asked.get("token", 0))
        links = []
        if start + 1 < len(found):
            body = dict(token=str(start + 1))
            links.append(dict(rel="next", href=f"{root}/search", method="POST", body=body, merge=True))
        return self._json(dict(type="FeatureCollection", features=found[start : start + 1], links=links))

    def _file(self, name):
        path = FOLDER / name
        if not path.is_file():
            return self._send(404, b"none")
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self._send(200, data)
        first, last = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        return self._send(206, data[first : last + 1], **{"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def _send(self, status, data, **headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def matches(item, asked):
    """Whether an item is one that a search asks for, as the specification of STAC APIs says."""
    facts = item["properties"]
    if asked.get("collections") and item.get("collection") not in asked["collections"]:
        return False
    if asked.get("bbox"):
        west, south, east, north = asked["bbox"]
        left, low, right, high = item["bbox"]
        if right < west or left > east or high < south or low > north:
            return False
    if asked.get("datetime"):
        ends = asked["datetime"].split("/")
        begin, end = (None if text == ".." else datetime.datetime.fromisoformat(text) for text in (ends[0], ends[-1]))
        single = facts["datetime"]
        first, last = (single, single) if single else (facts["start_datetime"], facts["end_datetime"])
        first, last = (datetime.datetime.fromisoformat(text).replace(microsecond=0) for text in (first, last))
        return not ((begin and last < begin) or (end and first > end))
    return True


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
