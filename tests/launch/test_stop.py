"""Whether a run is told to stop; with real processes and signals: test_chain.py."""

from skysense_jax.launch import stop


def test_processes_that_agreed_to_stop_do_not_forget_it_where_a_run_goes_back(monkeypatch):
    monkeypatch.setattr(stop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(stop.multihost_utils, "reached_preemption_sync_point", lambda step: step == 8)
    told = stop.Stop()
    assert [told.reached(step) for step in (7, 8, 5, 6)] == [False, True, True, True]
