"""A guest's configuration as xl.cfg(5) has it: read, and what has to change in it for an engine."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coloebpf.errors import ConfigError
from coloebpf.xen.guest import SCRIPT, Wrong

MODEL = "e1000"


def settings(text: str) -> dict[str, Any]:
    """A row of assignments of strings, numbers and lists, as Python has them. Raises ConfigError for anything else."""
    found = {}
    try:
        for statement in ast.parse(text).body:
            if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
                raise ConfigError(f"line {statement.lineno} is no assignment")
            found[statement.targets[0].id] = ast.literal_eval(statement.value)
    except (SyntaxError, ValueError) as e:
        raise ConfigError(str(e)) from e
    return found


def options(row: str) -> dict[str, str]:
    """A vif or disk line: key=value, comma separated; a word without '=' has an empty value."""
    return {key.strip(): value.strip() for key, _, value in (word.partition("=") for word in row.split(","))}


@dataclass(frozen=True)
class Needs:
    """What depends on the engine. `emulated`: two guests have to send the same.

    `replicates`: libxl could replicate one disk; `disk`: the line of the one that the pair has, "" if it has none.
    """

    emulated: bool = True
    replicates: bool = False
    disk: str = ""


def changes(found: Mapping[str, Any], ports: Sequence[str], macs: Sequence[str], needs: Needs = Needs()) -> list[Wrong]:
    """`ports`, `macs`: of the pair's NICs, in their order; a MAC may be ""."""
    machine = _machine(found) if needs.emulated else ()
    disks = _colo_disks(found, needs.disk) if needs.replicates else _disks(found)
    return [*machine, *_vifs(found, ports, macs, needs.emulated), *disks]


def _machine(found: Mapping[str, Any]) -> Iterator[Wrong]:
    if "hvm" not in (found.get("type"), found.get("builder")):
        yield Wrong("only an HVM guest has a NIC that does not notice that it was copied", 'type = "hvm"')
    if str(found.get("xen_platform_pci", 1)) != "0":
        yield Wrong("PV drivers connect anew in each copy, and send other packets than before", "xen_platform_pci = 0")
        yield Wrong(
            "without the platform device Linux still asks to unplug the emulated ones",
            "xen_emul_unplug=never on the guest kernel's command line",
        )


def _vifs(found: Mapping[str, Any], ports: Sequence[str], macs: Sequence[str], emulated: bool) -> Iterator[Wrong]:
    rows = [options(row) for row in found.get("vif", [])]
    if len(rows) != len(ports):
        yield Wrong(
            f"it has {len(rows)} vifs and the pair {len(ports)} NICs: what no NIC is for is not compared",
            "as many lines in vif = [...] as there are [[pair.nic]], in their order",
        )
    for number, (row, port, mac) in enumerate(zip(rows, ports, macs, strict=False)):
        wanted = {**({"type": "ioemu", "model": MODEL} if emulated else {}), "script": SCRIPT, "bridge": port}
        lacks = [f"{key}={value}" for key, value in wanted.items() if row.get(key, "").rpartition("/")[2] != value]
        if lacks:
            line = ",".join([f"mac={mac or row.get('mac', '') or 'ITS OWN'}", *(f"{k}={v}" for k, v in wanted.items())])
            yield Wrong(
                f"vif {number} lacks {', '.join(lacks)}: "
                f"{'an emulated NIC alone, ' if emulated else ''}joined to the port that is compared",
                f"vif = [ '{line}' ]",
            )
        if "vifname" in row:
            yield Wrong(f"vif {number} has a device name, which two copies on one host can't both have", "no vifname=")
        if mac and row.get("mac", "").lower() != mac:
            yield Wrong(f"vif {number} has not the MAC of the pair's file: its frames would be dropped", f"mac={mac}")


def _disks(found: Mapping[str, Any]) -> Iterator[Wrong]:
    for number, row in enumerate(map(options, found.get("disk", []))):
        words = {*row, row.get("access"), row.get("devtype")}
        if not words & {"r", "ro", "cdrom"}:
            yield Wrong(
                f"disk {number} can be written, and this engine replicates no disks",
                "access=ro in its line, or keep the guest's data in its memory",
            )


def _colo_disks(found: Mapping[str, Any], line: str) -> Iterator[Wrong]:
    rows = found.get("disk", [])
    if not line:
        if rows:
            yield Wrong(
                f"it has {len(rows)} disks and the pair none: with COLO each disk has to be one that is replicated",
                "a [[pair.libxl_colo.disk]] in the pair's file, or no disk = [...]",
            )
        return
    if [options(row) for row in rows] != [options(line)]:
        yield Wrong("its disk is not that of the pair's file, and no other may be beside it", f"disk = [ '{line}' ]")
    if str(found.get("hdtype", "ide")) != "ide":
        yield Wrong("behind an AHCI controller libxl replicates no disk, and does not say so", 'hdtype = "ide"')
