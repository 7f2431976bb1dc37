"""The ArrayRecord files of a source: what they hold, and their bytes, asked for again where storage fails now and then.

What is damaged is told at once and not asked for again. Next: records.py, which knows what the bytes mean.
"""

import contextlib
import os
import re
import time
from collections.abc import Sequence
from concurrent import futures

import numpy as np
from absl import logging
from array_record.python import array_record_module
from array_record.python.array_record_data_source import ArrayRecordDataSource

from skysense_jax import storage
from skysense_jax.data.checks import RecordError, wrapped

RETRY_AFTER_S = (0.5, 2.0, 8.0)  # before each further try
# In what the reader says when a system call, or a service behind it, failed: of damage it says something else.
_OF_STORAGE = re.compile(
    r"\b(open|read|pread|fstat|stat|lseek|close)\w*\(\) failed|UNAVAILABLE|DEADLINE_EXCEEDED|timed out"
)


class Shards:
    """The records of all files in a row, as bytes; picklable.

    Args:
      paths: a glob of files or of gs://bucket/..., or files in the order wanted.

    Raises:
      ValueError: no file matches, a file is no ArrayRecord, or there are no records.
    """

    def __init__(self, paths: str | Sequence[str | os.PathLike]):
        files = storage.matching(paths) if isinstance(paths, str) else [os.fspath(path) for path in paths]
        if not files:
            raise ValueError(f"config.data.sources: empty dataset: no file matches {paths!r}")
        with futures.ThreadPoolExecutor(min(64, len(files))) as pool:
            counts = list(pool.map(_count_records, files))
        if sum(counts) == 0:
            raise ValueError(f"config.data.sources: empty dataset: the {len(files)} files of {paths!r} hold no record")
        self._files = [file for file, count in zip(files, counts) if count]
        self._ends = np.cumsum([count for count in counts if count])
        self._source = self._open()

    def _open(self) -> ArrayRecordDataSource:
        return ArrayRecordDataSource([f"{f}[0:{n}]" for f, n in zip(self._files, np.diff(self._ends, prepend=0))])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def payload(self, index: int) -> bytes:
        """The bytes of the record at ``index``.

        Raises:
          RecordError: they are damaged, or storage failed again and again; names file and place.
        """
        for seconds in (*RETRY_AFTER_S, None):
            source = self._source
            try:
                with wrapped(self.locate(index)):
                    return source[index]
            except RecordError as error:
                if seconds is None or not _OF_STORAGE.search(str(error)):
                    raise
                logging.warning("%s; trying again in %g s", error, seconds)
            time.sleep(seconds)
            if self._source is source:  # its readers may have failed for good
                self._source = self._open()
        raise AssertionError("the last try returns or raises")

    def locate(self, index: int) -> str:
        """Which file and which record of it ``index`` is."""
        file = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self._files[file]}, record {index - (self._ends[file - 1] if file else 0)}"


def _count_records(file: str) -> int:
    if os.path.isdir(file):
        raise ValueError(f"config.data.sources: {file} is a folder; wanted a glob of files: {file}/*.array_record")
    try:
        with contextlib.closing(array_record_module.ArrayRecordReader(file)) as reader:
            return reader.num_records()
    except Exception as error:
        raise ValueError(f"config.data.sources: {file} is no whole ArrayRecord file: {error}") from error
