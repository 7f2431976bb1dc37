"""Google Cloud Storage on loopback, as far as gcsfs, tensorstore and google-cloud-cpp need it; in memory."""

import contextlib
import functools
import http.server
import logging
import os
import re
import threading
import urllib.parse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"


class Emulator:
    """A server with one bucket, in which a test may let reads fail.

    Attributes:
      environ: what makes the libraries go there.
      failing: (pattern of a path, status that its reads are answered with) pairs.
      refusing: [pattern of a path, status, how often] of writes, whose count goes down with each.
      storage: what the bucket holds.
    """

    def __init__(self):
        self.storage, self.failing, self.refusing = _Storage(use_memory_fs=True), [], []
        buckets.create_bucket(BUCKET, self.storage)
        self._server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self._server.server_port}"
        self.environ = {
            "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
            "TENSORSTORE_GCS_HTTP_URL": url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # google-cloud-cpp, in array_record
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC, which is not emulated
            "NO_GCE_CHECK": "true",
        }
        os.environ.update(self.environ)
        logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)  # tells every object that is not there

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Storage(Storage):
    def _write_config_to_file(self):
        """Nothing: at every request it would write down all that there is."""


class _Server(http.server.HTTPServer):
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that hangs up early is no news."""


class _Handler(RequestHandler):
    """Adds what the libraries rely on and the emulator leaves out: generations, conditions on them, moves."""

    _generation = ""

    def __init__(self, emulator, *args):
        self._emulator = emulator
        super().__init__(emulator.storage, *args)

    def end_headers(self):
        if self._generation:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def do_GET(self):
        for pattern, status in self._emulator.failing:
            if re.search(pattern, self.path):
                return self._refuse(status)
        address = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(address.query)
        if "alt" in query:
            self._generation = self._generation_of(urllib.parse.unquote(address.path.rpartition("/o/")[2]))
            if query.get("ifGenerationNotMatch") == [self._generation]:
                return self._refuse(304)
        return super().do_GET()

    def do_POST(self):
        address = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(address.query)
        for refusal in self._emulator.refusing:
            if refusal[2] and re.search(refusal[0], self.path):
                refusal[2] -= 1
                self.rfile.read(int(self.headers["Content-Length"]))
                return self._refuse(refusal[1])
        wanted = query.get("ifGenerationMatch")
        if "name" in query and wanted and wanted != [self._generation_of(query["name"][0]) or "0"]:
            self.rfile.read(int(self.headers["Content-Length"]))
            return self._refuse(412)
        moved = re.fullmatch(r"(/storage/v1/b/\w+/o/)([^/]+)/moveTo/o/([^/]+)", address.path)
        if moved is None:
            return super().do_POST()
        self.path = f"{moved[1]}{moved[2]}/copyTo/b/{BUCKET}/o/{moved[3]}"
        super().do_POST()
        with contextlib.suppress(NotFound):
            self.storage.delete_file(BUCKET, urllib.parse.unquote(moved[2]))
        return None

    def _generation_of(self, name: str) -> str:
        try:
            return self.storage.get_file_obj(BUCKET, name)["generation"]
        except NotFound:
            return ""

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()
