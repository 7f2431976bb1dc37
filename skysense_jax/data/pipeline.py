"""The input pipeline (Grain): an endless, shuffled mix of sources as batches of views, the same for any machinery.

What batch number n holds depends on the sources, their shares, the seed and the batch size; not on threads, worker
processes or the number of training processes, of which each reads its own places of every batch. So the state
is one number, and restores exactly under another number of processes or workers. Worker processes import this module:
nothing here may import jax. Read before it: views.py (one element), records.py and scenes.py (the sources).
"""

import itertools
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from skysense_jax.data.checks import RecordError
from skysense_jax.data.records import Record, RecordSource
from skysense_jax.data.sample import SampleReader
from skysense_jax.data.scenes import MODALITIES as SCENE_MODALITIES
from skysense_jax.data.scenes import SceneSource
from skysense_jax.data.views import MultiView
from skysense_jax.modalities import OSM, LabelMap, Modality, label_map, select

SCENES = "scenes"  # the name of the procedural source
_LOOKED_AT = 4  # records of each source that are read whole before a run
MAX_TRIES = 16  # records tried in place of an unreadable one before the run stops
MAX_RESTARTS = 3  # of worker processes in a run
_TELL_EVERY_S = 60.0  # while a batch does not come
_DIED = "Worker process was terminated unexpectedly"  # as Grain says

_STATE_KEY = "next_index"
FIRST_STATE = {_STATE_KEY: 0}  # of a stream that nothing was read from


class Mix:
    """All records of all sources under one index, source after source; not shuffled, not weighted.

    Args:
      sources: (glob of .array_record files or "scenes", share of the mix) pairs.
      modalities: what the run uses.
      scenes: arguments of ``SceneSource``, read only if "scenes" is among the sources.
      labels: the label map of records.

    Raises:
      ValueError: an empty dataset, or scenes without a modality they have.
    """

    def __init__(
        self,
        *,
        sources: Sequence[Sequence],
        modalities: Sequence[Modality],
        scenes: Mapping[str, int],
        labels: LabelMap = OSM,
    ):
        assert sources, "told by config_checks.py"
        self.names = tuple(name for name, _ in sources)
        self.shares = tuple(float(share) for _, share in sources)
        rendered = tuple(row.name for row in modalities if row.name in SCENE_MODALITIES)
        if SCENES in self.names and not rendered:
            raise ValueError(
                f"config.data.sources: got {SCENES!r} with config.data.modalities {tuple(m.name for m in modalities)}; "
                f"wanted one or more of {SCENE_MODALITIES} among these, or records instead"
            )
        self._readers = [
            SceneSource(**scenes, modalities=rendered) if name == SCENES else RecordSource(name, modalities, labels)
            for name in self.names
        ]
        self.ends = np.cumsum([len(reader) for reader in self._readers])
        if self.ends[-1] > np.iinfo(np.int32).max:
            raise ValueError(f"config.data.sources: {self.ends[-1]} records; wanted at most {np.iinfo(np.int32).max}")

    def __len__(self) -> int:
        return int(self.ends[-1])

    def range_of(self, source: int) -> range:
        """The indices of one source's records."""
        return range(int(self.ends[source - 1]) if source else 0, int(self.ends[source]))

    def source_of(self, index: int) -> int:
        """Which source the record at ``index`` belongs to."""
        return int(np.searchsorted(self.ends, index, side="right"))

    def __getitem__(self, index: int) -> Any:
        """The record at ``index``, a ``SampleReader``; raises RecordError."""
        source = self.source_of(index)
        return self._readers[source][index - self.range_of(source).start]

    def describe(self, index: int) -> str:
        """Where the record at ``index`` comes from."""
        source = self.source_of(index)
        local = index - self.range_of(source).start
        reader = self._readers[source]
        return reader.locate(local) if isinstance(reader, RecordSource) else f"{self.names[source]}, scene {local}"


class LoadViews(grain.transforms.RandomMap):
    """An index of the mix to its views. An unreadable record is replaced by the next readable one of its source."""

    def __init__(self, mix: Mix, multi_view: MultiView):
        self._mix, self._multi_view = mix, multi_view

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """The views; ``bad_record`` is the index asked for if it could not be read.

        Raises:
          RecordError: neither it nor the next ones can be read.
        """
        index = int(element)
        candidates = self._mix.range_of(self._mix.source_of(index))
        seed = rng.integers(2**63)  # each try starts anew, so that a stand-in does not depend on how far a try came
        tries = min(MAX_TRIES, len(candidates))
        for attempt in range(tries):
            record = candidates[(index - candidates.start + attempt) % len(candidates)]
            try:
                return self._multi_view(
                    self._mix[record],
                    np.random.default_rng(seed),
                    record=record,
                    bad_record=index if attempt else -1,
                )
            except RecordError as error:
                last = error
        raise RecordError(f"{tries} records in a row are unreadable, from {self._mix.describe(index)} on: {last}")


class _BatchOrder:
    """The elements that one training process reads, in an order in which every worker process gets whole batches.

    Grain deals elements to its workers in turn (worker w gets w, w + workers, ...), and each worker batches what it
    got; element j here is chosen so that batch k of the whole is what worker k mod workers builds next.
    """

    def __init__(self, elements, *, start: int, batch_size: int, places: Sequence[int], num_workers: int):
        self._elements, self._start, self._batch_size = elements, start, batch_size
        self._places, self._num_workers = places, num_workers

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> dict[str, Any]:
        turn, worker = divmod(index, self._num_workers)
        batch, element = divmod(turn, len(self._places))
        batch = batch * self._num_workers + worker
        return self._elements[self._start + batch * self._batch_size + self._places[element]]


class _WorkerDiedError(Exception):
    """Worker processes of the input are gone."""


def _leave_stopping_to_the_run(worker: int, num_workers: int) -> None:
    """Schedulers send "stop" to whole process groups; the run still needs this worker for the step it ends with.

    Grain ends workers by an event and then SIGKILL, so nothing is lost.
    """
    del worker, num_workers
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


class PipelineIterator:
    """An endless iterator: this process's part of each batch, nested dicts of numpy arrays as in batch.Batch."""

    def __init__(
        self, elements: grain.MapDataset, *, batch_size: int, places: Sequence[int], num_threads: int, num_workers: int
    ):
        self._elements = elements
        self._batch_size, self._places = batch_size, places
        self._num_threads, self._num_workers = num_threads, num_workers
        self._next_index = 0
        self._running = None
        self._restarts = 0

    def __iter__(self) -> "PipelineIterator":
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            if self._running is None:
                self._running = self._start()
            try:
                batch = self._await_next()
            except _WorkerDiedError as died:
                if self._restarts == MAX_RESTARTS:
                    raise RuntimeError(f"{died}, after {MAX_RESTARTS} restarts in this run: is there memory?") from died
                self._restarts += 1
                logging.error("%s: all are started again, with the batch that was waited for", died)
                self.close()
                continue
            self._next_index += self._batch_size
            return batch

    def _await_next(self) -> dict[str, Any]:
        """The next batch of what runs; says so while it does not come.

        Raises:
          _WorkerDiedError: a worker process is gone.
        """
        running, answer = self._running, queue.SimpleQueue()

        def ask() -> None:
            try:
                answer.put((next(running), None))
            except BaseException as error:  # raised below
                answer.put((None, error))

        threading.Thread(target=ask, daemon=True, name="next batch").start()
        began = time.monotonic()
        while True:
            try:
                batch, error = answer.get(timeout=_TELL_EVERY_S)
            except queue.Empty:
                waited = time.monotonic() - began
                logging.warning("no batch for %.0f s: does the storage of the sources hang?", waited)
                continue
            if error is not None and _DIED in str(error):
                raise _WorkerDiedError(f"input: {str(error).splitlines()[0]}") from error
            if error is not None:
                raise error
            return batch

    def get_state(self) -> dict[str, int]:
        """JSON-able: where the stream goes on after the last batch handed out, whatever was read ahead."""
        return {_STATE_KEY: self._next_index}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from there; the state may come from another number of processes or workers.

        Raises:
          ValueError: no state of this pipeline.
        """
        if set(state) != {_STATE_KEY} or not isinstance(state[_STATE_KEY], int) or state[_STATE_KEY] < 0:
            raise ValueError(f"state of the input pipeline: got {dict(state)}; wanted {{{_STATE_KEY!r}: a number}}")
        self.close()
        self._next_index = state[_STATE_KEY]

    def close(self) -> None:
        """Stops threads and worker processes; the next batch starts them again."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _start(self) -> grain.DatasetIterator:
        order = _BatchOrder(
            self._elements,
            start=self._next_index,
            batch_size=self._batch_size,
            places=self._places,
            num_workers=max(1, self._num_workers),
        )
        # Grain's buffer counts elements here. Without workers it must hold a whole batch to run ahead of the step.
        ahead = 2 * self._num_threads if self._num_workers else max(2 * self._num_threads, len(self._places))
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(order).to_iter_dataset(options).batch(len(self._places), drop_remainder=True)
        if self._num_workers:
            if not flags.FLAGS.is_parsed():
                # Grain reads flags here and refuses outside absl.app (grain #1355); parsing them later still works.
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._num_workers), worker_init_fn=_leave_stopping_to_the_run
            )
        return iter(dataset)


class Pipeline:
    """A mix, its order and how it is read; every ``iter`` of it starts at the first batch.

    ``num_workers`` 0 reads in this process, with threads. Start worker processes only under
    ``if __name__ == "__main__"``: they import the main module.
    """

    def __init__(
        self,
        *,
        mix: Mix,
        multi_view: MultiView,
        batch_size: int,
        seed: int,
        num_threads: int,
        num_workers: int,
        places: Sequence[int],
    ):
        assert places, "told by config_layout.py"
        assert max(places) < batch_size, (places, batch_size)
        shuffled = [
            grain.MapDataset.range(indices.start, indices.stop).seed(seed + source).shuffle().repeat()
            for source, indices in enumerate(map(mix.range_of, range(len(mix.shares))))
        ]
        mixed = grain.MapDataset.mix(shuffled, weights=mix.shares)
        self._mix = mix
        self._elements = mixed.seed(seed).random_map(LoadViews(mix, multi_view))
        self._reading = dict(
            batch_size=batch_size,
            places=places,
            num_threads=num_threads,
            num_workers=num_workers,
        )

    def __iter__(self) -> PipelineIterator:
        return PipelineIterator(self._elements, **self._reading)

    def samples(self, count: int) -> list[SampleReader]:
        """``count`` records read whole, from each source in turn its next readable one; fewer if there are no more.

        Unreadable ones are named in the log.
        """
        found = []
        in_turn = itertools.zip_longest(*map(self._mix.range_of, range(len(self._mix.names))))
        for index in itertools.chain.from_iterable(in_turn):
            if len(found) == count:
                break
            if index is None:
                continue
            try:
                reader = self._mix[index]
                found.append(reader.decode() if isinstance(reader, Record) else reader)
            except RecordError as error:
                logging.warning("unreadable record skipped: %s: %s", self.describe(index), error)
        return found

    def check_sources(self) -> None:
        """Decodes some records of each source whole, which the windows of training never are.

        A wrong unit shows in the mean of a sample and is most often that of a whole data set. Scenes are our own.

        Raises:
          ValueError: none of a source's can be used; names the source and what is wrong with the first.
        """
        for source, name in enumerate(self._mix.names):
            if name == SCENES:
                continue
            records = self._mix.range_of(source)
            reasons = [self.reason(index) for index in records[:: max(1, len(records) // _LOOKED_AT)][:_LOOKED_AT]]
            if all(reasons):
                raise ValueError(
                    f"config.data.sources: {name!r}: none of {len(reasons)} records looked at can be used: {reasons[0]}"
                )

    def describe(self, index: int) -> str:
        """Which file and record, or scene, ``record`` or ``bad_record`` number ``index`` is."""
        return self._mix.describe(index)

    def reason(self, index: int) -> str:
        """Why a record is unreadable, found by reading all of it again in this process; empty if it is readable."""
        try:
            reader = self._mix[index]
            if isinstance(reader, Record):
                reader.decode()
        except RecordError as error:
            return str(error)
        return ""


def make_pipeline(
    *,
    modalities: Sequence[str],
    new_modalities: Sequence[Mapping[str, Any]],
    sources: Sequence[Sequence],
    batch_size: int,
    seed: int,
    num_dates: Mapping[str, int],
    photometric_strength: float,
    day_jitter: int,
    views: Mapping[str, Any],
    scenes: Mapping[str, int],
    label_classes: Sequence[str] = (),
    input_threads: int,
    input_workers: int,
    places: Sequence[int] | None = None,
) -> Pipeline:
    """The pipeline of ``config.data`` (``batch_size`` over all processes), ``run.input_threads`` and ``input_workers``.

    It reads the samples at these places of each batch; without ``places`` all.

    Raises:
      ValueError: an empty dataset, or a field that makes no sense; named in the message.
    """
    del photometric_strength  # read inside jit
    rows, labels = select(modalities, new_modalities), label_map(label_classes)
    dates = dict(num_dates=dict(num_dates), day_jitter=day_jitter)
    return Pipeline(
        mix=Mix(sources=sources, modalities=rows, scenes=dict(scenes), labels=labels),
        multi_view=MultiView(modalities=rows, **dates, num_classes=labels.num_classes, **views),
        batch_size=batch_size,
        seed=seed,
        num_threads=input_threads,
        num_workers=input_workers,
        places=range(batch_size) if places is None else places,
    )
