"""What a run may go on from: the same model, and the same files unless told."""

import pytest
from micro import mono_config

from skysense_jax import resume


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
