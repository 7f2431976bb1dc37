"""Are all processes the same: the facts of all of them compared, and one table that says so.

Wanted is what most processes have (of two, what process 0 has). Every finding names process and host, what was got,
what was wanted and what to change. Works on plain values; sends nothing. Next: start.py.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

MAX_CLOCK_OFFSET_S = 5.0  # beyond this, times in logs and of files on shared storage mislead
_MAX_FINDINGS = 20  # told one by one


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong with one process.

    Attributes:
      check: of ``CHECKS``.
      process_id, host: where; -1 and "" for the run as a whole.
      text: what was got, what was wanted, and what to change.
    """

    check: str
    process_id: int
    host: str
    text: str


@dataclasses.dataclass(frozen=True)
class Report:
    """One line a check, and what is wrong.

    Attributes:
      title: how many processes, and who told them.
      lines: check to what holds everywhere, in the order of the table.
      findings: empty if the run may start.
    """

    title: str
    lines: Mapping[str, str]
    findings: Sequence[Finding]

    @property
    def text(self) -> str:
        """The table."""
        failed = collections.Counter(finding.check for finding in self.findings)
        width = max(map(len, self.lines), default=0)
        rows = [
            f"  {check:{width}}  {'FAILED' if failed[check] else 'ok':6}  {said}".rstrip()
            for check, said in self.lines.items()
        ]
        told = []
        for finding in self.findings[:_MAX_FINDINGS]:
            where = f"process {finding.process_id} on {finding.host}: " if finding.process_id >= 0 else ""
            told.append(f"{finding.check}: {where}{finding.text}")
        if len(self.findings) > _MAX_FINDINGS:
            told.append(f"and {len(self.findings) - _MAX_FINDINGS} more")
        return "\n".join([f"preflight: {self.title}", *rows, *told])


def compare(facts: Sequence[Mapping[str, Any]], *, clock_offsets_s: Sequence[float]) -> tuple[dict, list[Finding]]:
    """(lines of the table, findings) of everything that is known before JAX starts, but for the working directory.

    ``facts``: of ``facts.collect``, by process.
    """
    hosts = [fact["host"] for fact in facts]
    findings = [
        *_versions(facts, hosts),
        *_differing(
            "code",
            [fact["code"] for fact in facts],
            hosts,
            "skysense_jax {got}; wanted {wanted}. Install the same checkout on every host, or mount one",
        ),
        *_fields(
            "config",
            [dict(_fields_of(fact["config"])) for fact in facts],
            hosts,
            "{name}: got {got}; wanted {wanted}. Start every process with the same command and config file",
        ),
        *_fields(
            "flags",
            [fact["flags"] for fact in facts],
            hosts,
            "environment variable {name}: got {got!r}; wanted {wanted!r}. Export it on every host alike",
        ),
        *_fields(
            "devices",
            [fact["device_files"] for fact in facts],
            hosts,
            "{got} {name} devices in /dev; wanted {wanted} as elsewhere. Look at this host's driver, or leave it out",
        ),
        *_sources(facts, hosts),
        *_clocks(clock_offsets_s, hosts),
    ]
    first = facts[0]
    found = [f"{source['files']} files, {source['bytes'] / 2**30:.3g} GiB" for source in first["sources"].values()]
    devices = [f"{count} {kind}" for kind, count in first["device_files"].items() if count]
    spread = max(clock_offsets_s) - min(clock_offsets_s)
    lines = {
        "versions": ", ".join(f"{name} {first['versions'][name]}" for name in ("python", "jax", "jaxlib", "flax")),
        "code": f"skysense_jax {first['code']}",
        "config": f"{len(first['config'].splitlines())} fields",
        "flags": ", ".join(name for name, value in first["flags"].items() if value) or "none set",
        "devices": ", ".join(devices) or "none in /dev; jax not started",
        "data": "; ".join(found) or "procedural scenes",
        "clocks": f"within {spread:.2f} s",
    }
    return lines, findings


def wanted_of(values: Sequence[Any]) -> Any:
    """What most have; of as many, what comes first."""
    return collections.Counter(values).most_common(1)[0][0]


def _differing(check: str, values: Sequence[Any], hosts: Sequence[str], text: str, **more: str) -> list[Finding]:
    wanted = wanted_of(values)
    return [
        Finding(check, number, hosts[number], text.format(got=value, wanted=wanted, **more))
        for number, value in enumerate(values)
        if value != wanted
    ]


def _fields(check: str, dicts: Sequence[Mapping[str, Any]], hosts: Sequence[str], text: str) -> list[Finding]:
    """The same for every key of dicts."""
    findings = []
    for name in sorted({name for fields in dicts for name in fields}):
        values = [fields.get(name, "nothing") for fields in dicts]
        findings += _differing(check, values, hosts, text, name=name)
    return findings


def _fields_of(config_text: str) -> list[tuple[str, str]]:
    return [(f"config.{name}", value) for name, _, value in (s.partition(" = ") for s in config_text.splitlines())]


def _versions(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[Finding]:
    text = "{name}: got {got}; wanted {wanted}. Install the same version on every host"
    return _fields("versions", [fact["versions"] for fact in facts], hosts, text)


def _sources(facts: Sequence[Mapping[str, Any]], hosts: Sequence[str]) -> list[Finding]:
    findings = []
    for name in facts[0]["sources"]:
        found = [fact["sources"][name] for fact in facts if name in fact["sources"]]
        if len(found) < len(facts):
            continue  # other sources: told by their config
        wanted = wanted_of([(source["files"], source["bytes"], source["digest"]) for source in found])
        for number, source in enumerate(found):
            got = (source["files"], source["bytes"], source["digest"])
            if source["problem"]:
                text = f"config.data.sources: {name!r}: {source['problem']}; wanted files this host can read"
            elif got[:2] != wanted[:2]:
                text = (
                    f"config.data.sources: {name!r}: {got[0]} files of {got[1]} bytes; wanted {wanted[0]} of "
                    f"{wanted[1]}. Copy or mount the same files on every host"
                )
            elif got != wanted:
                text = f"config.data.sources: {name!r}: as many files and bytes, but other names or sizes than wanted"
            else:
                continue
            findings.append(Finding("data", number, hosts[number], text))
    return findings


def _clocks(offsets_s: Sequence[float], hosts: Sequence[str]) -> list[Finding]:
    middle = sorted(offsets_s)[(len(offsets_s) - 1) // 2]
    return [
        Finding(
            "clocks",
            number,
            hosts[number],
            f"{abs(offset - middle):.1f} s {'ahead of' if offset > middle else 'behind'} the others; wanted at most "
            f"{MAX_CLOCK_OFFSET_S:g}. Start a time service (chrony, systemd-timesyncd) there",
        )
        for number, offset in enumerate(offsets_s)
        if abs(offset - middle) > MAX_CLOCK_OFFSET_S
    ]


# ---- devices, once JAX has started


def device_findings(
    counts: Mapping[int, int], hosts: Sequence[str], *, wanted: int | None, kinds: Mapping[int, str]
) -> list[Finding]:
    """What is wrong with the devices of each process; ``wanted`` None: as many as most processes have."""
    findings = []
    expected = wanted or max(set(counts.values()), key=lambda count: (list(counts.values()).count(count), count))
    for number, host in enumerate(hosts):
        if counts.get(number, 0) != expected:
            findings.append(
                Finding(
                    "devices",
                    number,
                    host,
                    f"{counts.get(number, 0)} devices; wanted {expected}"
                    + (" (--devices_per_process)" if wanted else " as elsewhere")
                    + ". Look at this host's driver (nvidia-smi, or the TPU runtime's log), or leave the host out",
                )
            )
    usual = wanted_of(list(kinds.values()))
    findings += [
        Finding("devices", number, hosts[number], f"devices are {kind}; wanted {usual}, one kind in a run")
        for number, kind in kinds.items()
        if kind != usual
    ]
    return findings
