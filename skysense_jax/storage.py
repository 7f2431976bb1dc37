"""Where a run and its data lie: a file system, or a bucket of Google Cloud Storage (gs://bucket/name).

Orbax writes checkpoints into a bucket by itself, and ArrayRecord reads shards from one; here is what is left: which
addresses are taken, whether a bucket can be reached, and the files that an object store cannot append to or move.
Needs the extra ``gcs`` for buckets, and does not import jax.
"""

import glob
import pathlib
import re
import shutil
import tempfile
from collections.abc import Sequence

from absl import logging
from etils import epath

Directory = pathlib.Path | epath.Path
_TIMEOUT_S = 30.0  # for a bucket to answer, retries included


def is_url(path: object) -> bool:
    """Whether it is an address such as gs://bucket/name, not a path."""
    return re.match(r"[a-zA-Z][\w+.-]*:/", str(path)) is not None


def in_bucket(path: object) -> bool:
    """Whether it is an address that is understood here."""
    return re.match(r"gs://\w", str(path)) is not None


def run_directory(text: str, *, flag: str = "--workdir") -> Directory:
    """The absolute path or the address of a run, that ``flag`` gave; whether a bucket is there is not asked.

    Raises:
      ValueError: it is a file, or an address of another kind than gs://bucket/name.
    """
    if in_bucket(text):
        return epath.Path(text)
    if is_url(text):
        raise ValueError(
            f"{flag}: got {text}; wanted gs://bucket/name, or a directory of a file system that can append and "
            "rename (on AWS: FSx for Lustre or EFS): Orbax, which writes the checkpoints, has no other"
        )
    if pathlib.Path(text).is_file():
        raise ValueError(f"{flag}: got the file {text}; wanted the directory of the run")
    return pathlib.Path(text).resolve()


def problem(url: str) -> str:
    """Why the bucket of ``url`` cannot be used from here, or nothing. Asked first: libraries wait for minutes."""
    if not in_bucket(url):
        return "only gs:// is read without mounting; mount the bucket (mountpoint-s3, rclone) and give the path"
    try:
        import gcsfs  # noqa: F401
        from google.cloud import storage
        from google.cloud.storage.retry import DEFAULT_RETRY
    except ImportError as error:
        return f"{error}; wanted the client of Google Cloud Storage: pip install --editable '.[gcs]'"
    bucket = url.split("/")[2]
    try:
        # Orbax asks the same, so that storage.buckets.get is needed beside the rights on objects.
        storage.Client().get_bucket(bucket, timeout=_TIMEOUT_S, retry=DEFAULT_RETRY.with_timeout(_TIMEOUT_S))
    except Exception as error:  # of authentication, of the service or of the network: each has its own family
        return (
            f"{type(error).__name__}: {error}".split("\n")[0]
            + f"; wanted a bucket {bucket!r} that exists, and credentials with storage.buckets.get and rights on its "
            "objects (gcloud auth application-default login, or the machine's service account)"
        )
    return ""


def forget() -> None:
    """Forgets what buckets held, so that what other processes wrote since is seen."""
    import fsspec

    fsspec.filesystem("gs").invalidate_cache()


def find(pattern: str) -> list[tuple[str, int]]:
    """(address, bytes) of the objects that match a glob gs://bucket/..., sorted.

    Raises:
      ValueError: the bucket cannot be used.
    """
    if told := problem(pattern):
        raise ValueError(told)
    import fsspec

    forget()
    try:
        found = fsspec.filesystem("gs").glob(pattern, detail=True)
    except Exception as error:  # of authentication, of the service or of the network: each has its own family
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"{said}; wanted the right to list it, storage.objects.list") from error
    return sorted((f"gs://{name}", info["size"]) for name, info in found.items() if info["type"] == "file")


def matching(pattern: str) -> list[str]:
    """Files, or addresses in a bucket, that match a glob of ``config.data.sources``, sorted.

    Raises:
      ValueError: the bucket cannot be used.
    """
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    try:
        return [address for address, _ in find(pattern)]
    except ValueError as error:
        raise ValueError(f"config.data.sources: {pattern!r}: {error}") from error


class SmallFiles:
    """All files of a run but its checkpoints, under ``path``: WORKDIR itself, or for a bucket a folder of this host.

    Objects can be neither appended to nor moved, and are there whole or not at all: what changed in the folder is
    copied into the bucket, by ``send`` before a checkpoint counts and by ``close``.

    Attributes:
      path: the folder.
      staged: whether it is one of this host.
    """

    def __init__(self, workdir: Directory, *, fetch: Sequence[str] = ()):
        """``fetch``: files that go on in a run that goes on; where they are, they are copied here first."""
        self._workdir, self._sent = workdir, {}
        self.staged = in_bucket(workdir)
        if not self.staged:
            self.path = pathlib.Path(workdir)
            return
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="skysense_jax_"))
        logging.info("small files stand in %s, and are copied to %s with every checkpoint", self.path, workdir)
        for name in fetch:
            if (workdir / name).exists():
                (self.path / name).write_bytes((workdir / name).read_bytes())

    def send(self) -> None:
        """What changed is in the bucket when it returns; in a file system nothing is left to do."""
        if not self.staged:
            return
        for path in sorted(path for path in self.path.rglob("*") if path.is_file() and not path.is_symlink()):
            stat = path.stat()
            if self._sent.get(path) != (stat.st_size, stat.st_mtime_ns):
                (self._workdir / str(path.relative_to(self.path))).write_bytes(path.read_bytes())
                self._sent[path] = (stat.st_size, stat.st_mtime_ns)

    def close(self) -> None:
        """Sends, and removes the folder; if that fails, it stays where the log said."""
        self.send()
        if self.staged:
            shutil.rmtree(self.path)
