"""Starting a run of one or of many processes: the order in which they meet, check each other, and start JAX.

``started`` is what entry points wrap around their work. Everything that can be checked is checked before JAX starts,
as it then hangs or dies without words; devices and mesh right after. One report, on process 0; all processes end
together.
"""

import collections
import contextlib
import functools
import os
import secrets
import sys
import time
import traceback
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from skysense_jax import config as config_lib
from skysense_jax import sharding, storage
from skysense_jax.launch import facts, processes, report, roll_call
from skysense_jax.launch.processes import Placement
from skysense_jax.launch.report import Finding, Report
from skysense_jax.launch.roll_call import RollCall, StartError
from skysense_jax.launch.stop import Stop, Stopped

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, for a run of several processes. Schedulers' own settings are found."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_DEVICES = flags.DEFINE_integer("devices_per_process", None, "Devices that each process must find; none: all alike.")
_START_TIMEOUT_S = flags.DEFINE_integer("start_timeout_s", 300, "How long processes wait for each other at the start.")
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s", 100, "After so long without a sign of life a process counts as lost and the others end."
)
_SHARED_WAIT_S = 10.0  # for a file to appear on the other hosts


@contextlib.contextmanager
def started(
    config: ConfigDict, workdir: storage.Directory, *, same_flags: Mapping[str, str] | None = None
) -> Iterator[Stop]:
    """All processes of the run, checked and connected; gives what knows whether the run is told to stop.

    ``same_flags``: of the command line, by name, that must be the same on all.

    Raises:
      StartError: they cannot start, on every process.
      ValueError: a field or flag is wrong.
    """
    placement = processes.find(
        os.environ, coordinator=_COORDINATOR.value, num_processes=_NUM_PROCESSES.value, process_id=_PROCESS_ID.value
    )
    config_lib.validate(config)
    known = functools.partial(
        facts.collect,
        config_text=config_lib.flat_text(config),
        sources=tuple(name for name, _ in config.data.sources),
        more_flags=same_flags or {},
    )
    if placement is None:
        hosts, checked = [facts.host_name()], _check_alone(known(), workdir)
    else:
        hosts, checked = _check_together(placement, known(), workdir)
    try:
        if placement is not None:
            processes.initialize(
                placement, timeout_s=_START_TIMEOUT_S.value, heartbeat_timeout_s=_HEARTBEAT_TIMEOUT_S.value
            )
        checked = _with_devices(checked, hosts, config)
        if jax.process_index() == 0:
            logging.info("%s", checked.text)
        if checked.findings:
            raise StartError(checked.text)
        stop = Stop()
        stop.listen()
        yield stop
    except (Stopped, StartError):
        _leave(placement)
        raise
    except BaseException as error:
        if placement is not None:
            _end_at_once(error)
        raise
    _leave(placement)


def _leave(placement: Placement | None) -> None:
    """Waits for the others to be at their end too, and disconnects."""
    if placement is not None:
        jax.distributed.shutdown()


def _end_at_once(error: BaseException) -> None:
    """Ends this process of several. An ordinary end would wait for the others, alive to them, for five minutes."""
    if isinstance(error, ValueError) and str(error).startswith(("config.", "--")):
        sys.stderr.write(f"error: {error}\n")
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _check_alone(known: dict, workdir: storage.Directory) -> Report:
    """One process: its data and its working directory; a table all the same."""
    lines, findings = report.compare([known], clock_offsets_s=[0.0])
    token = facts.Token(workdir, secrets.token_hex(4))
    if problem := token.write():
        findings.append(Finding("workdir", 0, known["host"], f"--workdir: {workdir}: {problem}; wanted write access"))
    token.remove()
    checked = Report(f"1 process on {known['host']}", {**lines, "workdir": str(workdir)}, findings)
    if findings:
        raise StartError(checked.text)
    return checked


def _check_together(placement: Placement, known: dict, workdir: storage.Directory) -> tuple[list[str], Report]:
    """(hosts by process, what was found before JAX), the same on all processes.

    Raises:
      StartError: something is wrong, the report on process 0 and a line elsewhere.
    """
    logging.info(
        "process %d of %d (%s), meeting at %s",
        placement.process_id,
        placement.num_processes,
        placement.found_by,
        placement.coordinator,
    )
    with roll_call.meet(
        coordinator=placement.coordinator,
        process_id=placement.process_id,
        num_processes=placement.num_processes,
        host=known["host"],
        timeout_s=float(_START_TIMEOUT_S.value),
    ) as call:
        everyone = call.gather(known)
        offsets = call.clock_offsets_s()
        unshared = _check_workdir(call, workdir)
        if everyone is None or offsets is None:
            hosts = call.share(None)
            return hosts, Report("the table is in the log of process 0", {}, ())
        lines, findings = report.compare(everyone, clock_offsets_s=offsets)
        hosts = [fact["host"] for fact in everyone]
        for number, problem in enumerate(unshared):
            if problem:
                text = f"--workdir: {workdir}: {problem}; wanted one directory that every host can write"
                findings.append(Finding("workdir", number, hosts[number], text))
        title = f"{placement.num_processes} processes on {len(set(hosts))} hosts ({placement.found_by})"
        checked = Report(title, {**lines, "workdir": str(workdir)}, findings)
        if findings:
            raise StartError(checked.text)
        call.share(hosts)
        return hosts, checked


def _check_workdir(call: RollCall, workdir: storage.Directory) -> list[str]:
    """For each process, on process 0: what is wrong with its working directory, or nothing."""
    name = call.share(secrets.token_hex(4))
    mine = facts.Token(workdir, f"{name}-{call.process_id}")
    problem = mine.write()
    call.share(call.gather(problem))  # all have written
    if not problem and not facts.Token(workdir, f"{name}-0").is_there(wait_s=_SHARED_WAIT_S):
        problem = "what process 0 wrote there does not show up on this host"
    problems = call.gather(problem)
    if problems is not None:
        deadline = time.monotonic() + _SHARED_WAIT_S
        for number, told in enumerate(problems):
            token = facts.Token(workdir, f"{name}-{number}")
            if not told and not token.is_there(wait_s=deadline - time.monotonic()):
                problems[number] = "what this process wrote there does not show up on process 0"
    call.share(problems is None)  # all have looked
    mine.remove()
    return problems or []


def _with_devices(checked: Report, hosts: list[str], config: ConfigDict) -> Report:
    """The report with devices and mesh: known to every process alike, so all come to the same end."""
    devices = jax.devices()
    counts = collections.Counter(device.process_index for device in devices)
    kinds = {device.process_index: device.device_kind for device in devices}
    findings = report.device_findings(counts, hosts, wanted=_DEVICES.value, kinds=kinds)
    said = "-"
    if not findings:
        try:
            config_lib.validate(config, num_devices=len(devices))
            said = str(dict(sharding.make_mesh(**config.mesh).shape))
        except ValueError as error:
            findings = [Finding("mesh", -1, "", str(error))]
    if not findings and jax.process_count() > 1:
        findings = _exchange(len(devices))
    lines = {**checked.lines, "devices": f"{len(devices)} x {devices[0].device_kind}", "mesh": said}
    return Report(checked.title, lines, [*checked.findings, *findings])


def _exchange(num_devices: int) -> list[Finding]:
    """What is wrong with a sum over all devices: better known now than after minutes of compilation.

    It also joins all devices before processes compile at different speeds: on CPUs gloo waits 30 s for that, once.
    """
    mesh = jax.make_mesh((num_devices,), ("all",), axis_types=(AxisType.Auto,))
    ones = jax.make_array_from_callback(
        (num_devices,), NamedSharding(mesh, PartitionSpec("all")), lambda index: np.ones(num_devices)[index]
    )
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)
    if (got := int(total.addressable_data(0))) != num_devices:
        return [Finding("devices", -1, "", f"the sum of a 1 from each is {got}; wanted {num_devices}")]
    return []
