"""What attach() refuses, what it replaces, and what the pins show. (Undoing and detaching: test_attach.py.)"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from coloebpf import bpfsys
from coloebpf.dataplane import Dataplane, NicSpec, Role
from coloebpf.errors import ColoError, ConfigError, DeviceError, HookBusyError
from coloebpf.model import Sizes
from coloebpf.netns import inside
from tests.unit.conftest import PIN_ROOT, SIZES, SPECS, ip, make_devices
from tests.unit.rig import MTU, Rig, next_port, udp

pytestmark = pytest.mark.kernel

_numbers = itertools.count()
SPEC = NicSpec(9, 9, Role.PRIMARY, "vif0", "fwd0")
HOOKS = {("vif0", "ingress"): "p2_output", ("vif0", "egress"): "p1_mirror", ("fwd0", "ingress"): "link_deliver"}


def tool(*command: str) -> str:
    """A command that must succeed; its output."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def filters(device: str, side: str) -> list[str]:
    """Names of the bpf filters on a hook, kinds of the others."""
    found = json.loads(tool("tc", "-j", "filter", "show", "dev", device, side) or "[]")
    return [f["options"].get("bpf_name", f["kind"]) for f in found if "options" in f]


def has_clsact(device: str) -> bool:
    return any(q["kind"] == "clsact" for q in json.loads(tool("tc", "-j", "qdisc", "show", "dev", device)))


def xdp_of(device: str) -> int:
    """Id of the XDP program, 0: none."""
    (link,) = json.loads(tool("ip", "-j", "-d", "link", "show", device))
    return int(link.get("xdp", {}).get("prog", {}).get("id", 0))


def untouched(*devices: str) -> bool:
    return not any(has_clsact(d) or xdp_of(d) or filters(d, "ingress") or filters(d, "egress") for d in devices)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Inside a namespace with vif0 and fwd0 that nobody has attached to."""
    name = f"coloebpf-at{next(_numbers)}-{os.getpid()}"
    make_devices(name, 1)
    try:
        with inside(name):
            yield
    finally:
        ip("netns", "del", name)


def foreign(device: str, side: str) -> list[str]:
    """Commands that put a program of somebody else's on a hook."""
    hung = f"tc filter add dev {device} {side} bpf da object-pinned PINS/s1_deliver"
    return [f"tc qdisc add dev {device} clsact", hung]


BAD: dict[str, tuple[list[str], NicSpec, type[ColoError], str]] = {
    "no-vif": ([], replace(SPEC, vif="vif77.0"), DeviceError, "vif77.0 does not exist"),
    "no-fwd": ([], replace(SPEC, fwd="eth7"), DeviceError, "eth7 does not exist"),
    "same-device": ([], replace(SPEC, fwd="vif0"), DeviceError, "vif0 can't be both"),
    "fwd-mtu": (["ip link set fwd0 mtu 1500"], SPEC, DeviceError, f"ip link set fwd0 mtu {MTU + 8}"),
    "vif-mtu": (["ip link set vif0 mtu 1600"], SPEC, DeviceError, "vif0 has MTU 1600"),
    "fwd-address": (["ip addr add 192.0.2.1/24 dev fwd0"], SPEC, DeviceError, "address 192.0.2.1"),
    "fwd-address-6": (
        ["sysctl -qw net.ipv6.conf.fwd0.disable_ipv6=0", "ip addr add 2001:db8::1/64 dev fwd0"],
        SPEC,
        DeviceError,
        "address 2001:db8::1",
    ),
    "fwd-in-bridge": (
        ["ip link add br0 type bridge", "ip link set fwd0 master br0"],
        SPEC,
        DeviceError,
        "belongs to a bridge",
    ),
    "old-ingress": (["tc qdisc add dev vif0 ingress"], SPEC, DeviceError, "ingress"),
    "foreign-in": (foreign("vif0", "ingress"), SPEC, HookBusyError, "tc ingress hook of vif0"),
    "foreign-out": (foreign("vif0", "egress"), SPEC, HookBusyError, "tc egress hook of vif0"),
    "foreign-fwd": (foreign("fwd0", "ingress"), SPEC, HookBusyError, "tc ingress hook of fwd0"),
    "nic-number": ([], replace(SPEC, nic=64), ConfigError, "nic 64"),
    "pair-number": ([], replace(SPEC, pair=-1), ConfigError, "pair -1"),
    "mac": ([], replace(SPEC, mac="02:c0:10"), ConfigError, "02:c0:10"),
    "xdp-mode": ([], SPEC, ConfigError, "xdp mode 'offload'"),
}


@pytest.mark.parametrize(("commands", "spec", "error", "text"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_one_sentence_and_nothing_is_changed(
    session_rig: Rig, fresh: None, commands: list[str], spec: NicSpec, error: type[ColoError], text: str
) -> None:
    for command in commands:
        tool(*command.replace("PINS", str(session_rig.plane.pin_dir)).split())
    state = [(has_clsact(d), xdp_of(d), filters(d, "ingress"), filters(d, "egress")) for d in ("vif0", "fwd0")]
    mode = "offload" if text.startswith("xdp mode") else "auto"
    with pytest.raises(error) as caught:
        session_rig.plane.attach(spec, xdp_mode=mode)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert state == [(has_clsact(d), xdp_of(d), filters(d, "ingress"), filters(d, "egress")) for d in ("vif0", "fwd0")]


def test_a_foreign_xdp_program_is_left_alone(session_rig: Rig, fresh: None) -> None:
    tool("ip", "link", "set", "dev", "fwd0", "xdp", "pinned", str(session_rig.plane.pin_dir / "p3_arrive"))
    foreign = xdp_of("fwd0")
    with pytest.raises(HookBusyError, match=f"XDP on fwd0 is held by another program .*{foreign}"):
        session_rig.plane.attach(SPEC)
    assert xdp_of("fwd0") == foreign
    assert untouched("vif0")


@pytest.mark.parametrize(
    "sizes", [Sizes(slots=1000), Sizes(flows=1), Sizes(flows=1 << 21), Sizes(mtu=500), Sizes(mtu=9001)], ids=str
)
def test_sizes_that_can_not_be_are_a_sentence(sizes: Sizes) -> None:
    pin_dir = PIN_ROOT / f"coloebpf-sizes-{os.getpid()}"
    try:
        with pytest.raises(ConfigError, match="must be"):
            Dataplane.load(pin_dir, sizes)
    finally:
        if pin_dir.exists():
            pin_dir.rmdir()


FIELDS = {
    "pairs": {"state", "epoch", "deadline_ns"},
    "nics": {"id", "pair", "role", "vif", "fwd", "vlan", "mac"},
    "settings": {"compare_timeout_ns", "slots"},
    "flow_refs": {"guest_port", "remote", "generation"},
    "flows": {"p_head", "p_count", "s_count", "proven", "key", "guest_port"},
    "held": {"digest", "since_ns", "payload", "epoch"},
    "counters": {"mirrored_packets", "divergences", "dropped"},
    "holding": {"bucket"},
    "links": {"fwd", "vlan"},
    "last_events": {"reason", "pvm_digest", "svm_digest"},
}


def names_in(dumped: Any) -> set[str]:
    if isinstance(dumped, list):
        return {name for part in dumped for name in names_in(part)}
    if isinstance(dumped, dict):
        return set(dumped) | {name for part in dumped.values() for name in names_in(part)}
    return set()


@pytest.mark.parametrize("table", FIELDS)
def test_bpftool_shows_field_names(rig: Rig, table: str) -> None:
    rig.output(udp(next_port(), b"so that there is a flow"))
    shown = json.loads(tool("bpftool", "-j", "map", "dump", "pinned", str(rig.plane.pin_dir / table)))
    formatted = [entry.get("formatted", entry) for entry in shown]
    assert FIELDS[table] <= names_in(formatted)


def test_every_map_and_program_is_pinned(session_rig: Rig) -> None:
    shown = {path.name for path in session_rig.plane.pin_dir.iterdir()}
    assert {"flows", "held", "slab", "events", "p2_output", "flush", "link_arrive", "exempt"} <= shown
    for program in ("p2_output", "hold", "drain", "flush", "sweep", "link_arrive"):
        os.close(bpfsys.obj_get(session_rig.plane.pin_dir / program))
    assert not [name for name in shown if name.endswith("_new")], "a half-made pin is left"


def test_attached_again_the_programs_are_new_and_the_maps_are_kept(rig: Rig) -> None:
    before, keys = hooked_ids(), rig.hash_keys()
    port = next_port()
    rig.output(udp(port, b"held over the change"))
    plane = Dataplane.load(rig.plane.pin_dir, SIZES)
    for spec in SPECS:
        plane.attach(spec)
    rig.plane = plane
    for (device, side), program in HOOKS.items():
        assert filters(device, side) == [f"coloebpf:{program}"]
    assert not before & hooked_ids(), "an old program still runs"
    rig.arrive(udp(port, b"x"))
    rig.control.suspend(0)
    assert rig.control.commit(0) == 1, "what was held is lost"
    rig._keys = None
    assert rig.hash_keys() == keys


def hooked_ids() -> set[int]:
    """Ids of the programs on the hooks."""
    found = {xdp_of("fwd0")}
    for device, side in HOOKS:
        shown = json.loads(tool("tc", "-j", "filter", "show", "dev", device, side))
        found |= {f["options"]["prog"]["id"] for f in shown if "prog" in f.get("options", {})}
    assert len(found) == len(HOOKS) + 1
    return found
