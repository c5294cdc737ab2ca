"""What a guest of the engine libxl-live must be, by its libxl_domain_config in JSON; and how a copy of it is placed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coloebpf.errors import XenError

SCRIPT = "vif-coloebpf"  # deploy/xen; the guest's own configuration names it
SUFFIX = "-x"  # of the guest's end of a port (ports.py)
MAX_NAME = 15 - len(SUFFIX)  # of the other end: IFNAMSIZ, less its NUL


def port_of(vif: str) -> str:
    """What the NIC's `bridge=` must be for the device `vif` of the configuration."""
    return f"{vif}{SUFFIX}"


@dataclass(frozen=True)
class Wrong:
    """`text`: what is wrong. `advice`: the line of the guest's configuration that mends it, or what else does."""

    text: str
    advice: str


def unfit(
    config: str,
    bridges: Sequence[Sequence[str]],
    emulated: bool = True,
    disk: Mapping[str, object] | None = None,
) -> list[Wrong]:
    """Why this guest can't be protected. `bridges`: for each NIC the ports (ports.py) that it may be behind.

    `emulated` False: there is no second guest that must send the same, so it may have PV drivers.
    `disk`: the one that libxl has to replicate, key by key; there may be no other. None: it may write to none.
    """
    try:
        whole = json.loads(config)
        machine = _machine(whole) if emulated else ()
        nics = _nics(whole.get("nics", []), bridges, emulated)
        return [*machine, *nics, *_disks(whole.get("disks", []), disk)]
    except (ValueError, AttributeError, TypeError, KeyError) as e:
        raise XenError(f"libxl's description of the guest can't be read: {e!r}") from e


def _machine(config: Mapping[str, Any]) -> Iterator[Wrong]:
    kind = config["c_info"].get("type")
    if kind != "hvm":
        yield Wrong(f"the guest is {kind or 'of no known type'}, not HVM", 'type = "hvm"')
        return
    hvm = config.get("b_info", {}).get("type.hvm", {})
    if hvm.get("xen_platform_pci") != "False":
        yield Wrong(
            "the guest has PV drivers: they connect anew in each copy, and send other packets",
            "xen_platform_pci = 0, and xen_emul_unplug=never on the guest kernel's command line",
        )


def _nics(nics: Sequence[Mapping[str, Any]], bridges: Sequence[Sequence[str]], emulated: bool) -> Iterator[Wrong]:
    if len(nics) != len(bridges):
        yield Wrong(
            f"the guest has {len(nics)} NICs, the pair {len(bridges)}",
            "a [[pair.nic]] for each vif of the guest, in their order",
        )
        return
    for number, (nic, ports) in enumerate(zip(nics, bridges, strict=True)):
        if emulated and nic.get("nictype") != "vif_ioemu":
            yield Wrong(f"vif {number} is not emulated alone", "type=ioemu,model=e1000 in its line")
        if str(nic.get("script", "")).rpartition("/")[2] != SCRIPT:
            yield Wrong(f"vif {number} is not joined by {SCRIPT}", f"script={SCRIPT} in its line")
        if nic.get("bridge") not in ports:
            place = nic.get("bridge") or "no port"
            yield Wrong(f"vif {number} is behind {place}, not behind {' or '.join(ports)}", f"bridge={ports[0]}")


def _disks(disks: Sequence[Mapping[str, Any]], replicated: Mapping[str, object] | None) -> Iterator[Wrong]:
    if replicated is not None:
        if len(disks) != 1:
            yield Wrong(f"the guest has {len(disks)} disks, the pair one", "`coloebpf config xl` has its line")
            return
        for key, value in replicated.items():
            if disks[0].get(key) != value:
                text = f"{key} of the guest's disk is {disks[0].get(key)}, not {value}"
                yield Wrong(text, "`coloebpf config xl` has its line")
        return
    for disk in disks:
        if disk.get("readwrite"):
            yield Wrong(
                f"the guest can write its disk {disk.get('vdev')}, which nobody replicates",
                "make it read-only (access=ro), or keep the guest's data in its memory",
            )


def ports_of(config: str) -> list[str]:
    """What its NICs are behind."""
    return [str(nic.get("bridge", "")) for nic in json.loads(config).get("nics", [])]


def placed(config: str, name: str, uuid: str, bridges: Sequence[str]) -> str:
    """The same guest as another domain: its own name and UUID (/vm/UUID goes with the first that ends), other ports."""
    try:
        whole = json.loads(config)
        whole["c_info"].pop("domid", None)
        whole["c_info"] |= {"name": name, "uuid": uuid}
        for nic, bridge in zip(whole.get("nics", []), bridges, strict=True):
            nic.pop("ifname", None)  # two domains on one host can't have devices of one name
            nic["bridge"] = bridge
    except (ValueError, AttributeError, TypeError, KeyError) as e:
        raise XenError(f"what came is no guest of this pair: {e}") from e
    return json.dumps(whole)
