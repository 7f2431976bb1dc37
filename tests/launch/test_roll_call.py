"""Processes that meet: threads here, each with its own side of a real connection."""

import contextlib
import socket
import threading
import time

import pytest

from skysense_jax.launch import roll_call
from skysense_jax.launch.roll_call import StartError, meet


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(autouse=True)
def _own_token_each(monkeypatch):
    """In one process all would be taken for one that comes again."""
    names = map(str, range(1000))
    monkeypatch.setattr(roll_call, "_token", lambda: next(names))
    monkeypatch.setattr(roll_call, "_GRACE_S", 1.0)


def _run(port, members, *, timeout_s=20.0, work=lambda call: call.share("done")):
    """What each of ``members``, (process_id, num_processes), came to: a value or its StartError."""
    outcomes = [None] * len(members)

    def one(place, process_id, num_processes):
        try:
            with meet(
                coordinator=f"127.0.0.1:{port}",
                process_id=process_id,
                num_processes=num_processes,
                host=f"host{place}",
                timeout_s=timeout_s,
            ) as call:
                outcomes[place] = work(call)
        except StartError as error:
            outcomes[place] = error

    threads = [threading.Thread(target=one, args=(i, *member)) for i, member in enumerate(members)]
    for thread in reversed(threads):  # process 0 comes last
        thread.start()
    for thread in threads:
        thread.join(60)
    return outcomes


def test_all_meet_gather_and_share(port):
    def work(call):
        everyone = call.gather({"id": call.process_id})
        offsets = call.clock_offsets_s()
        if offsets is not None:
            assert len(offsets) == 3
            assert max(map(abs, offsets)) < 1
        return call.share(everyone)

    assert _run(port, [(0, 3), (1, 3), (2, 3)], work=work) == [[{"id": 0}, {"id": 1}, {"id": 2}]] * 3
    with socket.create_server(("127.0.0.1", port)):
        pass  # free at once for the service that comes next


def test_missing_process_is_named_to_all_who_came(port):
    started = time.monotonic()
    outcomes = _run(port, [(0, 4), (2, 4)], timeout_s=1.5)
    assert time.monotonic() - started < 15
    for outcome in outcomes:
        assert "2 of 4 processes did not come within 1.5 s: numbers 1, 3 (here: 0 on host0, 2 on host1)" in str(outcome)


def test_other_number_of_processes_is_told_to_both(port):
    for outcome in _run(port, [(0, 2), (1, 3)]):
        assert "process 1 on host1 was started as one of 3, process 0 on host0 as one of 2" in str(outcome)


def test_id_used_twice_is_told_to_all(port):
    outcomes = _run(port, [(0, 3), (1, 3), (1, 3)])
    for outcome in outcomes:
        assert "process id 1: both host" in str(outcome)
        assert "--process_id" in str(outcome)


def test_taken_port_is_named(port):
    with socket.create_server(("", port)):
        (outcome,) = _run(port, [(0, 2)])
    assert f"coordinator port {port} on host0: Address already in use; wanted a free port" in str(outcome)


def test_process_zero_that_never_comes_is_named_with_the_time_out(port):
    (outcome,) = _run(port, [(1, 2)], timeout_s=1.0)
    assert f"process 1 on host0 did not reach process 0 at 127.0.0.1:{port} within 1 s" in str(outcome)
    assert "refused" in str(outcome)


def test_another_service_on_the_port_is_told(port):
    with socket.create_server(("127.0.0.1", port)) as server:

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()

        threading.Thread(target=answer, daemon=True).start()
        (outcome,) = _run(port, [(1, 2)], timeout_s=1.0)
        server.close()
    assert "something answers there that is not process 0 of this run" in str(outcome)


def test_strangers_on_the_port_do_not_count(port):
    """A health check that connects and says nothing of ours."""

    def knock():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", port)) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    return
            except OSError:
                time.sleep(0.02)

    threading.Thread(target=knock).start()
    assert _run(port, [(0, 2), (1, 2)]) == ["done", "done"]


def test_failure_of_one_ends_all_with_its_text(port):
    def work(call):
        if call.process_id == 0:
            call.gather("")
            raise StartError("config: 1 is not 2")
        call.gather("")
        return call.share("never sent")

    assert [str(outcome) for outcome in _run(port, [(0, 3), (1, 3), (2, 3)], work=work)] == ["config: 1 is not 2"] * 3


def test_process_that_goes_is_named(port):
    def work(call):
        if call.process_id == 1:
            return "gone"
        call.gather("")
        return call.share("never")

    outcomes = _run(port, [(0, 3), (1, 3), (2, 3)], work=work)
    assert "process 1 on host1 was here and went during the checks" in str(outcomes[0])
    assert "process 1 on host1 was here and went during the checks" in str(outcomes[2])


@pytest.mark.parametrize("address", ["localhost", "localhost:", "localhost:x", ":5000", "localhost:70000"])
def test_address_without_host_or_port_is_refused(address):
    with pytest.raises(StartError, match="wanted HOST:PORT"):
        meet(coordinator=address, process_id=0, num_processes=2, host="here", timeout_s=1.0)
