"""The roll call: all processes of a run meet at the coordinator's port, before JAX takes that port over.

JAX alone would not do: a wrong number of processes connects without a word, a number used twice or a coordinator that
is not there ends every process with a C++ stack trace. Here process 0 listens, the others come, each step has a
time-out, and what is wrong is said in words to all of them. One JSON object a line; no secrets, and like JAX's own
service it trusts its network. Does not import jax. Next: start.py.
"""

import errno
import functools
import json
import os
import secrets
import socket
import time
from typing import Any

from absl import logging

_GREETING = "skysense-jax roll call 1"
_GRACE_S = 5.0  # after the first thing that is wrong: others may come and be told
_HELLO_S = 10.0  # for one that has connected to say who it is
_RETRY_S = 0.3
_MAX_LINE = 1 << 26


class StartError(Exception):
    """Why the processes of a run do not start together: who, what was got, what was wanted, what to change."""


class _Line:
    """A connection on which each side sends JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, **message: Any) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The next message; OSError (also a time-out) or ValueError if there is none."""
        self._connection.settimeout(max(timeout_s, 0.01))
        line = self._file.readline(_MAX_LINE)
        if not line.endswith(b"\n"):
            raise ConnectionError("the other side ended")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError(f"got {line[:40]!r}")
        return message

    def drain(self, timeout_s: float) -> None:
        """Waits until the other side has hung up, so that the port is not left in TIME_WAIT on this side."""
        self._connection.settimeout(max(timeout_s, 0.01))
        try:
            while self._file.read(4096):
                pass
        except OSError as error:
            logging.debug("roll call: %s", error)

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class RollCall:
    """One of the two sides below, as a context manager. An exception inside ends all processes with its text."""

    process_id: int
    num_processes: int

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all processes in order, on process 0; None elsewhere."""
        raise NotImplementedError

    def share(self, value: Any) -> Any:
        """The value of process 0, everywhere."""
        raise NotImplementedError

    def clock_offsets_s(self) -> list[float] | None:
        """How far each process' clock is ahead of that of process 0, on process 0; None elsewhere."""
        raise NotImplementedError

    def __enter__(self) -> "RollCall":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        raise NotImplementedError


def meet(*, coordinator: str, process_id: int, num_processes: int, host: str, timeout_s: float) -> RollCall:
    """The roll call once all are there. ``coordinator`` is HOST:PORT of process 0, ``host`` this machine's name.

    Raises:
      StartError: the port is taken, process 0 cannot be reached, a process did not come, or the numbers disagree.
    """
    name, _, port = coordinator.rpartition(":")
    if not name or not port.isdigit() or not 0 < int(port) < 65536:
        raise StartError(f"--coordinator: got {coordinator!r}; wanted HOST:PORT of process 0")
    side = _Coordinator if process_id == 0 else _Participant
    return side((name.strip("[]"), int(port)), process_id, num_processes, host, timeout_s)


class _Coordinator(RollCall):
    """The side of process 0."""

    def __init__(self, address: tuple[str, int], process_id: int, num_processes: int, host: str, timeout_s: float):
        self.process_id, self.num_processes = process_id, num_processes
        self._host, self._port, self._timeout_s = host, address[1], timeout_s
        self._lines: dict[int, _Line] = {}
        self._hosts = {0: host}
        self._tokens: dict[int, str] = {}
        self._turned_away: list[_Line] = []
        self._server = self._listen()
        try:
            self._admit()
            for number in self._lines:
                self._send(number, ok=True)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _listen(self) -> socket.socket:
        both = socket.has_dualstack_ipv6()
        try:
            return socket.create_server(
                ("", self._port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=min(self.num_processes, 4096),
            )
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            raise StartError(
                f"coordinator port {self._port} on {self._host}: {os.strerror(error.errno)}; wanted a free port above "
                "1023. Another run on this machine, or one that has not ended, may hold it: end that one, or give "
                "another port with --coordinator=HOST:PORT or JAX_COORDINATOR_PORT, the same everywhere"
            ) from error

    def _admit(self) -> None:
        """Takes connections until all processes are there; then or before says what is wrong."""
        deadline, problem = time.monotonic() + self._timeout_s, ""
        while len(self._lines) < self.num_processes - 1 or problem:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            self._server.settimeout(left)
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                break
            line = _Line(connection)
            try:
                hello = line.receive(min(_HELLO_S, left))
            except (OSError, ValueError):
                line.close()  # a health check or a port scanner
                continue
            if hello.get("greeting") != _GREETING:
                line.close()
                continue
            if refusal := self._take(hello, line):
                problem = problem or refusal
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        missing = [number for number in range(1, self.num_processes) if number not in self._lines]
        if problem:
            raise StartError(problem)
        if missing:
            raise StartError(
                f"{len(missing)} of {self.num_processes} processes did not come within {self._timeout_s:g} s: numbers "
                f"{_some(missing)} (here: {_some([f'{n} on {host}' for n, host in sorted(self._hosts.items())])}). "
                "Wanted all of them: their own logs say why they do not; if they start later, raise --start_timeout_s"
            )

    def _take(self, hello: dict[str, Any], line: _Line) -> str:
        """Nothing if the process is one of those that are awaited, else what is wrong with it."""
        number, count, host, token = (hello[key] for key in ("process_id", "num_processes", "host", "token"))
        if number in self._lines and self._tokens[number] == token:
            self._lines.pop(number).close()  # it lost its connection and came again
        if count == self.num_processes and number in range(1, count) and number not in self._lines:
            self._lines[number], self._hosts[number], self._tokens[number] = line, host, token
            return ""
        self._turned_away.append(line)
        if count != self.num_processes:
            return (
                f"number of processes: process {number} on {host} was started as one of {count}, process 0 on "
                f"{self._host} as one of {self.num_processes}; wanted the same --num_processes (or JAX_NUM_PROCESSES) "
                "everywhere"
            )
        return (
            f"process id {number}: both {self._hosts.get(number, 'another process')} and {host} were started with it; "
            f"wanted each of 0 to {count - 1} once: --process_id (or JAX_PROCESS_ID)"
        )

    def _send(self, number: int, **message: Any) -> None:
        try:
            self._lines[number].send(**message)
        except OSError as error:
            raise self._lost(number, error) from error

    def _receive(self, number: int) -> Any:
        try:
            message = self._lines[number].receive(self._timeout_s)
        except (OSError, ValueError) as error:
            raise self._lost(number, error) from error
        if "error" in message:
            raise StartError(f"process {number} on {self._hosts[number]}: {message['error']}")
        return message["value"]

    def _lost(self, number: int, error: Exception) -> StartError:
        return StartError(
            f"process {number} on {self._hosts[number]} was here and went during the checks ({error}); its log says why"
        )

    def gather(self, value: Any) -> list[Any] | None:
        return [value, *(self._receive(number) for number in range(1, self.num_processes))]

    def share(self, value: Any) -> Any:
        for number in self._lines:
            self._send(number, value=value)
        return value

    def clock_offsets_s(self) -> list[float] | None:
        offsets = [0.0]
        for number in range(1, self.num_processes):
            before = time.time()
            self._send(number, value="what time is it?")
            there = self._receive(number)
            offsets.append(there - (before + time.time()) / 2)
        return offsets

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._server.close()
        lines = [*self._lines.values(), *self._turned_away]
        if error is not None:
            for line in lines:
                try:
                    line.send(error=str(error) or repr(error))
                except OSError as lost:
                    logging.debug("roll call: %s", lost)
        deadline = time.monotonic() + _GRACE_S
        for line in lines:
            line.drain(deadline - time.monotonic())
            line.close()


class _Participant(RollCall):
    """The side of every other process."""

    def __init__(self, address: tuple[str, int], process_id: int, num_processes: int, host: str, timeout_s: float):
        self.process_id, self.num_processes = process_id, num_processes
        # what process 0 may take: its own waiting, and the grace it gives late ones
        self._address, self._answer_s = address, timeout_s + 2 * _GRACE_S
        self._line: _Line | None = None
        hello = dict(greeting=_GREETING, process_id=process_id, num_processes=num_processes, host=host)
        deadline, last, token = time.monotonic() + timeout_s, "nothing", _token()
        while self._line is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise StartError(
                    f"process {process_id} on {host} did not reach process 0 at {address[0]}:{address[1]} within "
                    f"{timeout_s:g} s; last: {last}. Wanted process 0 running there, the name resolved and the port "
                    "open on this network; if it starts later, raise --start_timeout_s"
                )
            try:
                line = _Line(socket.create_connection(address, timeout=min(left, _GRACE_S)))
            except OSError as error:
                last = str(error)
                time.sleep(min(_RETRY_S, left))
                continue
            try:
                line.send(**hello, token=token)
                answer = line.receive(self._answer_s)
            except (OSError, ValueError) as error:
                last = f"something answers there that is not process 0 of this run ({error})"
                line.close()
                time.sleep(min(_RETRY_S, left))
                continue
            self._line = line
            if "error" in answer:
                self._line.close()
                raise StartError(answer["error"])

    def _receive(self) -> Any:
        assert self._line is not None
        try:
            message = self._line.receive(self._answer_s)
        except (OSError, ValueError) as error:
            raise StartError(f"process 0 at {self._address[0]} ended during the checks ({error})") from error
        if "error" in message:
            raise StartError(message["error"])
        return message["value"]

    def _send(self, value: Any) -> None:
        assert self._line is not None
        try:
            self._line.send(value=value)
        except OSError as error:
            raise StartError(f"process 0 at {self._address[0]} ended during the checks ({error})") from error

    def gather(self, value: Any) -> list[Any] | None:
        self._send(value)

    def share(self, value: Any) -> Any:
        del value
        return self._receive()

    def clock_offsets_s(self) -> list[float] | None:
        self._receive()
        self._send(time.time())

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        assert self._line is not None
        if error is not None and not isinstance(error, StartError):
            try:
                self._line.send(error=str(error) or repr(error))
            except OSError as lost:
                logging.debug("roll call: %s", lost)
        self._line.close()


@functools.cache
def _token() -> str:
    """Tells this process, should it come again, from another one with its number."""
    return secrets.token_hex(8)


def _some(items: list[Any], most: int = 8) -> str:
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")
