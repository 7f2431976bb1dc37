"""What a run may begin with and go on from: the same model, and the same files unless told."""

import contextlib
from unittest import mock

import jax
import numpy as np
import pytest
from micro import distil_config, mono_config
from states import make_state, open_run, placed, put

from skysense_jax import config as config_lib
from skysense_jax import resume
from skysense_jax.data.pipeline import PipelineIterator
from skysense_jax.train_state import TrainState


def test_resume_on_other_files_or_code_is_refused_or_told(tmp_path, caplog):
    pattern = str(tmp_path / "*.array_record")
    config = mono_config()
    config.data.sources = ((pattern, 1.0),)
    (tmp_path / "a.array_record").write_bytes(b"12345")
    before = resume.run_facts(config)
    resume.check_same_run(before, now=resume.run_facts(config), config=config, accepted=())
    assert not caplog.records
    (tmp_path / "b.array_record").write_bytes(b"67")
    now = resume.run_facts(config)
    with pytest.raises(ValueError, match=r"config.data.sources: the files of '.*' are not those .* --accept=data"):
        resume.check_same_run(before, now=now, config=config, accepted=())
    resume.check_same_run(before, now=now | {"code": "0 abc"}, config=config, accepted=("data",))
    assert "going on with other code than before" in caplog.text
    assert "going on with --accept=data" in caplog.text


@pytest.mark.parametrize("of_torch", [False, True])
def test_resume_of_a_checkpoint_that_does_not_say_what_it_distils(of_torch):
    """A run of before there was distillation learns from nothing; what export.from_torch wrote has yet to begin."""
    config = distil_config("runs/teacher")
    now = resume.run_facts(config) | {"distilled": {"step": 8, "digest": "ab"}}
    lines = config_lib.flat_text(config).splitlines(keepends=True)
    before = {"config": "".join(line for line in lines if of_torch or "distil" not in line)}
    wanted = r"^config\.objective\.distil: .* learns from no other run, this config from step 8 .*--init_from"
    with contextlib.nullcontext() if of_torch else pytest.raises(ValueError, match=wanted):
        resume.check_same_run(before, now=now, config=config, accepted=())


def _train_state(seed):
    made = make_state(seed)
    return TrainState(made.step, made.student, made.teacher, made.optimizer, made.step, made.step)


def test_weights_of_another_run_lie_as_the_new_ones_do_on_its_mesh(tmp_path):
    config, saved = mono_config(), _train_state(1)
    other = open_run(tmp_path / "other")
    other.save(7, put(saved, (1, 1)), data_state={}, meta={"config": config_lib.flat_text(config)})
    other.close()
    checkpoints, shapes = open_run(tmp_path / "run"), placed(saved, (2, 4))
    step, state, origin = resume.first_state(
        checkpoints,
        shapes,
        mock.create_autospec(PipelineIterator, instance=True),
        new=lambda: put(_train_state(0), (2, 4)),
        config=config,
        facts_now={},
        init_from=tmp_path / "other",
    )
    checkpoints.close()
    assert (step, origin) == (0, f"the teacher of step 7 in {tmp_path / 'other'}")
    wanted = _train_state(0).replace(student=saved.teacher, teacher=saved.teacher)
    for leaf, value, shape in zip(*map(jax.tree.leaves, (state, wanted, shapes)), strict=True):
        np.testing.assert_array_equal(leaf, value)
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    student, teacher = (
        {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}
        for tree in (state.student, state.teacher)
    )
    assert not student & teacher  # a step overwrites both
