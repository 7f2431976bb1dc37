"""Shards made by workers of Apache Beam: DirectRunner on this machine, Dataflow, Flink or Spark by Beam's own flags.

Workers need this package, the manifest, the sources and the folder of the dataset under the same names as the machine
that starts them: a shared file system, or gs:// for manifest and dataset and addresses for sources (STAC).
A shard that is tried again, or made by two workers at once, comes to the same bytes (folder.py). Extra: ``beam``.
"""

from collections.abc import Callable, Iterator, Sequence

from etils import epath

from skysense_jax.ingest import folder
from skysense_jax.ingest.engines import Engine
from skysense_jax.ingest.folder import Maker, Shard

try:
    import apache_beam
except ImportError as error:
    raise ModuleNotFoundError(f"{error}; --engine=beam needs: pip install --editable '.[beam]'") from error
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions

_ASK_A_SERVER = ("FlinkRunner", "SparkRunner", "PortableRunner")  # which has options of its own


class WriteShard(apache_beam.DoFn):
    """Shards to the names of those that are written."""

    def __init__(self, make: Callable[[], Maker], out: epath.Path):
        self._make, self._out = make, out

    def setup(self) -> None:
        self._maker = self._make()

    def process(self, shard: Shard) -> Iterator[str]:
        folder.write_shard(self._maker, shard, self._out)
        yield shard.name


def options_of(engine: Engine) -> PipelineOptions:
    """What Beam makes of the flags.

    Raises:
      ValueError: one that it does not know.
    """
    here = [  # what DirectRunner alone reads, and less to read of the workers
        "--direct_running_mode=multi_processing",
        f"--direct_num_workers={engine.workers}",
        "--default_sdk_harness_log_level=WARNING",
    ]
    options = PipelineOptions([*here, *engine.flags])
    unknown = options.get_all_options(retain_unknown_options=True).keys() - options.get_all_options().keys()
    if unknown and options.view_as(StandardOptions).runner not in _ASK_A_SERVER:
        raise ValueError(f"Apache Beam has no flag {', '.join(f'--{name}' for name in sorted(unknown))}")
    return options


def run(make: Callable[[], Maker], missing: Sequence[Shard], out: epath.Path, options: PipelineOptions) -> None:
    """Writes the shards ``missing`` into ``out``; returns when the pipeline has ended.

    Raises:
      ValueError: there is no such runner.
      OSError: a worker failed and Beam gave up, or a cluster does not take the job.
    """
    try:
        pipeline = apache_beam.Pipeline(options=options)
        (
            pipeline
            | "Shards" >> apache_beam.Create(list(missing))
            | "Spread" >> apache_beam.Reshuffle()
            | "Write" >> apache_beam.ParDo(WriteShard(make, out))
        )
        pipeline.run().wait_until_finish()
    except ValueError:
        raise
    except Exception as error:  # each runner has classes of its own; the last line says it, behind a worker's traceback
        said = [line for line in str(error).splitlines() if line.strip() not in ("", "None")]
        raise OSError(f"Apache Beam: {said[-1] if said else type(error).__name__}") from error
