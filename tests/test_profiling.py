"""Which steps are traced, and what is left of the question after a restart; real traces of a small program."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from skysense_jax import profiling, sharding


@pytest.mark.parametrize("text", ["20:22", " 20:22 "])
def test_parse_takes_both_ends(text):
    assert list(profiling.parse_steps(text, num_steps=22)) == [20, 21, 22]


@pytest.mark.parametrize("text", [None, ""])
def test_parse_of_nothing_is_no_trace(text):
    assert profiling.parse_steps(text, num_steps=22) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("20", "wanted START:END"),
        ("20-22", "wanted START:END"),
        ("a:b", "wanted START:END"),
        ("-3:5", "wanted START:END"),
        ("20:22:2", "wanted START:END"),
        ("0:5", "a START of 2 or more"),
        ("1:5", "the first step compiles"),
        ("9:8", "an END not before START"),
        ("20:301", r"an END in the run, 300 \(config.optim.num_steps\)"),
        ("2:102", "101 steps; wanted at most 100"),
    ],
)
def test_parse_wrong_range_is_refused(text, message):
    with pytest.raises(ValueError, match=f"--profile_steps: got '{text}'.*{message}"):
        profiling.parse_steps(text, num_steps=300)


@pytest.fixture
def program():
    """A step on 8 devices with an exchange, and its first state."""
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, expert=1)
    split = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def step(state, batch):
        return state + (batch @ state.T).sum(), {"loss": state.sum()}

    return step, jax.device_put(jnp.ones((16, 8)), split), jax.device_put(jnp.ones((24, 8)), split)


def run(program, workdir, steps, *, after=0, last=9):
    """What a run of the steps after ``after`` up to ``last`` is told: where a trace ends, and its numbers."""
    step_fn, state, batch = program
    told = []
    profiler = profiling.Profiler(
        steps, workdir, after_step=after, begins=told.append, report=lambda *numbers: told.append(numbers)
    )
    for step in range(after + 1, last + 1):
        state, _ = profiler.run(step, step_fn, state, batch)
    profiler.close()
    return told


def traces(workdir):
    return sorted(path.parent.name for path in (workdir / "profile" / "plugins" / "profile").rglob("*.xplane.pb"))


def test_trace_of_steps_is_written_and_split(program, tmp_path, caplog):
    with caplog.at_level("INFO"):
        begun, (step, numbers) = run(program, tmp_path, range(3, 6))
    assert begun == step == 5
    assert traces(tmp_path) == ["steps_3_5"]
    assert numbers["profile/step_seconds"] > 0
    assert numbers["profile/exchange_seconds"] > 0
    assert "mean of 3 steps on 8 devices of this process" in caplog.text
    assert "warning" not in caplog.text.lower()


def test_exchanges_are_known_by_the_names_that_jax_gives_them(tmp_path):
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, expert=1)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec("data"))
    def exchange(x):
        x = jax.lax.all_to_all(x.reshape(8, -1), "data", 0, 0, tiled=True)
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        scattered = jax.lax.psum_scatter(gathered, "data", tiled=True)
        moved = jax.lax.ppermute(scattered, "data", [(i, (i + 1) % 8) for i in range(8)])
        return moved.sum() + jax.lax.psum(x, "data") + jax.lax.pmax(x, "data")

    x = jax.device_put(jnp.ones((64, 24)), NamedSharding(mesh, PartitionSpec("data")))
    _, (_, numbers) = run((lambda state, batch: (state, exchange(batch)), x, x), tmp_path, range(2, 4), last=3)
    for kind in ("all_to_all", "all_gather", "reduce_scatter", "permute", "all_reduce"):
        assert numbers[f"profile/{kind}_seconds"] > 0, kind


def test_restart_inside_the_range_traces_what_is_left_after_compilation(program, tmp_path, caplog):
    begun, (step, _) = run(program, tmp_path, range(3, 8), after=4)
    assert begun == step == 7
    assert traces(tmp_path) == ["steps_6_7"]
    assert "steps 3 to 7 are asked for; this process goes on after step 4" in caplog.text
    assert "traced are 6 to 7" in caplog.text


@pytest.mark.parametrize("after", [6, 8])
def test_restart_after_the_range_goes_on_without_a_trace(program, tmp_path, caplog, after):
    assert run(program, tmp_path, range(3, 8), after=after) == []
    assert not list(tmp_path.iterdir())
    assert "no trace" in caplog.text


def test_no_range_no_trace(program, tmp_path):
    assert run(program, tmp_path, None) == []
    assert not list(tmp_path.iterdir())


def test_run_that_ends_inside_the_range_leaves_no_trace_and_no_profiler_on(program, tmp_path):
    assert run(program, tmp_path, range(3, 8), last=5) == [7]  # no numbers
    assert not list(tmp_path.iterdir())
    assert len(run(program, tmp_path, range(3, 5))) == 2  # another can start


def test_trace_that_cannot_be_read_is_told_and_the_run_goes_on(program, tmp_path, monkeypatch, caplog):
    def fail(path):
        raise ValueError("a plane never seen")

    monkeypatch.setattr(profiling.trace, "read", fail)
    assert run(program, tmp_path, range(3, 6)) == [5]  # no numbers
    assert traces(tmp_path) == ["steps_3_5"]
    assert "the trace cannot be read here" in caplog.text
    assert "a plane never seen" in caplog.text


def test_processes_of_a_host_do_not_write_over_each_other(program, tmp_path, monkeypatch):
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        run(program, tmp_path, range(3, 5), last=4)
    assert traces(tmp_path) == ["steps_3_4", "steps_3_4"]
