"""Attaching and detaching: what fails halfway leaves nothing behind, and what a crash has left can be taken away."""

from __future__ import annotations

import ctypes as ct
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from coloebpf import bpfsys, netdev, pins, shapes
from coloebpf.control import Control
from coloebpf.dataplane import Dataplane, NicSpec, Role, Sizes, detach
from coloebpf.errors import BpfError, ColoError, ConfigError, DeviceError, HookBusyError
from coloebpf.model import Policy
from coloebpf.netns import inside

pytestmark = pytest.mark.kernel

PIN_DIR = Path(f"/sys/fs/bpf/coloebpf/attach-{os.getpid()}")
NAMESPACE = f"coloebpf-attach-{os.getpid()}"
SIZES = Sizes(slots=64, flows=64)
WIDE = 9008  # MTU of fwd; veth takes no native XDP above a page
SPEC = NicSpec(5, 3, Role.PRIMARY, "vif5", "fwd5", mac="02:c0:10:00:00:05")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@dataclass
class Loaded:
    """A loaded dataplane, with its maps open, so that a test may lose the pins."""

    plane: Dataplane
    fds: dict[str, int]
    said: dict[str, list[Any]]

    def pin(self) -> None:
        """Everything is pinned as after a load, and no NIC is attached."""
        PIN_DIR.mkdir(parents=True, exist_ok=True)
        for name, fd in self.fds.items():
            bpfsys.obj_pin(fd, PIN_DIR / name)
        shapes.save(PIN_DIR, self.said)
        for table, key in (("nics", ct.c_uint32), ("links", ct.c_uint64)):
            for entry in bpfsys.keys(self.fds[table], key):
                bpfsys.delete(self.fds[table], entry)
        self.set_nic(shapes.Shapes(PIN_DIR).leaf("nic_by_id")())

    def nic(self) -> Any:
        """The entry of the test's NIC."""
        found = shapes.Shapes(PIN_DIR).leaf("nic_by_id")()
        bpfsys.lookup(self.fds["nic_by_id"], ct.c_uint32(SPEC.nic), found)
        return found

    def set_nic(self, value: Any) -> None:
        bpfsys.update(self.fds["nic_by_id"], ct.c_uint32(SPEC.nic), value)

    def entries(self) -> int:
        """How many NICs and links the maps know."""
        return len(bpfsys.keys(self.fds["nics"], ct.c_uint32)) + len(bpfsys.keys(self.fds["links"], ct.c_uint64))


@pytest.fixture(scope="module")
def loaded() -> Iterator[Loaded]:
    plane = Dataplane.load(PIN_DIR, SIZES)
    names = (*pins.MAPS, *pins.TC_PROGRAMS, *pins.XDP_PROGRAMS)
    fds = {name: bpfsys.obj_get(PIN_DIR / name) for name in names}
    yield Loaded(plane, fds, shapes.Shapes(PIN_DIR).said)
    for fd in fds.values():
        os.close(fd)


@pytest.fixture
def host(loaded: Loaded) -> Iterator[Loaded]:
    """A namespace with vif5 and fwd5, and this thread in it."""
    ip("netns", "add", NAMESPACE)
    try:
        with inside(NAMESPACE):
            for name, mtu in (("vif5", "1500"), ("fwd5", str(WIDE))):
                ip("link", "add", "name", name, "mtu", mtu, "type", "veth", "peer", "name", f"{name}p", "mtu", mtu)
            loaded.pin()
            yield loaded
            detach(PIN_DIR)
    finally:
        ip("netns", "del", NAMESPACE)


def hooks() -> set[str]:
    """What is on the devices: clsact qdiscs, filters, XDP."""
    found = set()
    for name in ("vif5", "fwd5"):
        qdiscs = subprocess.run(["tc", "qdisc", "show", "dev", name], capture_output=True, text=True, check=True).stdout
        found |= {f"{name} clsact"} if "clsact" in qdiscs else set()
        for side in netdev.PARENTS:
            argv = ["tc", "-j", "filter", "show", "dev", name, side]
            for filter_ in json.loads(subprocess.run(argv, capture_output=True, check=True).stdout or "[]"):
                options = filter_.get("options", {})
                found |= {f"{name} {side} {options['bpf_name']}"} if "bpf_name" in options else set()
    links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True, check=True).stdout)
    return found | {f"{link['ifname']} xdp" for link in links if link.get("xdp")}


ALL_HOOKS = {
    "vif5 clsact",
    "vif5 egress coloebpf:p1_mirror",
    "vif5 ingress coloebpf:p2_output",
    "fwd5 clsact",
    "fwd5 ingress coloebpf:link_deliver",
    "fwd5 xdp",
}


def test_attach_and_detach(host: Loaded) -> None:
    host.plane.attach(SPEC)
    assert hooks() == ALL_HOOKS
    assert host.entries() == 2
    detach(PIN_DIR)
    assert hooks() == set()
    assert not PIN_DIR.exists()
    assert not shapes.file_of(PIN_DIR).exists()
    detach(PIN_DIR)


def test_what_fails_halfway_is_undone(host: Loaded) -> None:
    before = bytes(host.nic())
    with pytest.raises(DeviceError, match=r"fwd5 takes no XDP program \(mode native\): Numerical result out of range"):
        host.plane.attach(SPEC, xdp_mode="native")
    assert hooks() == set()
    assert host.entries() == 0
    assert bytes(host.nic()) == before


def test_a_clsact_of_somebody_else_stays(host: Loaded) -> None:
    subprocess.run(["tc", "qdisc", "add", "dev", "vif5", "clsact"], check=True)
    with pytest.raises(DeviceError):
        host.plane.attach(SPEC, xdp_mode="native")
    assert hooks() == {"vif5 clsact"}
    host.plane.attach(SPEC)
    detach(PIN_DIR)
    assert hooks() == {"vif5 clsact"}


def test_attaching_again_that_fails_leaves_the_first_at_work(host: Loaded) -> None:
    host.plane.attach(SPEC)
    before = bytes(host.nic())
    with pytest.raises(DeviceError):
        host.plane.attach(replace(SPEC, arp=Policy.DROP), xdp_mode="native")
    assert hooks() == ALL_HOOKS
    assert host.entries() == 2
    assert bytes(host.nic()) == before


def test_attaching_again_keeps_exemptions_and_takes_new_policies(host: Loaded) -> None:
    host.plane.attach(SPEC)
    with Control.open(PIN_DIR) as control:
        control.exempt_add(6, 22, "10.0.0.0/8", SPEC.nic)
        host.plane.attach(replace(SPEC, arp=Policy.DROP))
        assert (host.nic().exempts, host.nic().arp) == (1, Policy.DROP)
        assert control.exempt_del(6, 22, "10.0.0.0/8", SPEC.nic)
        assert host.nic().exempts == 0
    detach(PIN_DIR)
    assert hooks() == set()


def test_a_hook_of_another_program_is_refused(host: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    with netdev.Devices() as devices, monkeypatch.context() as other:
        other.setattr(netdev, "NAME", "cilium:")
        devices.ensure_clsact(devices.find("vif5"))
        devices.attach_tc(devices.find("vif5"), "ingress", "from_container", host.plane.prog_fd("s3_isolate"))
    theirs = {"vif5 clsact", "vif5 ingress cilium:from_container"}
    with pytest.raises(HookBusyError, match=r"tc ingress hook of vif5 is held by another program \(cilium:from_conta"):
        host.plane.attach(SPEC)
    assert hooks() == theirs
    detach(PIN_DIR, also=("vif5",))
    assert hooks() == theirs


@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("shapes", "No such file or directory; it tells how to read the maps at .*: detach, then load again"),
        ("pairs", "is incomplete, pairs missing: .*; detach, then load again"),
        ("nics", "is incomplete, nics missing: .*; detach, then load again"),
    ],
)
def test_half_of_the_pins(host: Loaded, lost: str, sentence: str) -> None:
    host.plane.attach(SPEC)
    if lost == "shapes":
        shapes.forget(PIN_DIR)
    else:
        (PIN_DIR / lost).unlink()
    with pytest.raises(BpfError, match=sentence):
        Control.open(PIN_DIR)
    with pytest.raises(BpfError, match=sentence):
        Dataplane.load(PIN_DIR, SIZES)
    assert hooks() == ALL_HOOKS, "a refused load leaves what runs"
    detach(PIN_DIR, also=("vif5", "fwd5", "gone"))
    assert not {hook for hook in hooks() if not hook.endswith("clsact")}
    assert not PIN_DIR.exists()


def test_devices_are_known_without_shapes(host: Loaded) -> None:
    host.plane.attach(SPEC)
    shapes.forget(PIN_DIR)
    detach(PIN_DIR)
    assert hooks() == {"vif5 clsact", "fwd5 clsact"}


def test_maps_that_were_never_filled(host: Loaded) -> None:
    settings = shapes.Shapes(PIN_DIR).leaf("settings")()
    bpfsys.lookup(host.fds["settings"], ct.c_uint32(0), settings)
    bpfsys.update(host.fds["settings"], ct.c_uint32(0), type(settings)())
    try:
        with pytest.raises(BpfError, match="interrupted before its maps were filled; detach, then load again"):
            Dataplane.load(PIN_DIR, SIZES)
    finally:
        bpfsys.update(host.fds["settings"], ct.c_uint32(0), settings)


def test_other_sizes_than_the_pinned_maps(host: Loaded) -> None:
    with pytest.raises(ConfigError, match=r"\(64, 64, 2048\), asked for \(128, 64, 2048\); detach first"):
        Dataplane.load(PIN_DIR, replace(SIZES, slots=128))


def test_control_without_any_pins(host: Loaded) -> None:
    detach(PIN_DIR)
    with pytest.raises(ColoError, match=r"no dataplane is loaded: .* has no pins"):
        Control.open(PIN_DIR)


def test_control_gives_back_its_descriptors(host: Loaded) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with Control.open(PIN_DIR) as control:
        control.snapshot()
        control.events()
        control.sweep()
        assert count() > before
    assert count() == before


def test_the_forward_device_hears_frames_for_others(host: Loaded) -> None:
    """They have clients' and guests' addresses; seen on Xen's hosts, whose virtio NICs keep such frames to themselves."""
    host.plane.attach(SPEC)
    shown = subprocess.run(["ip", "link", "show", "dev", SPEC.fwd], capture_output=True, text=True, check=True).stdout
    assert "PROMISC" in shown, shown


def test_a_forward_device_that_does_not_hear_all_is_not_taken_for_attached(host: Loaded) -> None:
    """As an earlier coloebpf has left it, with the same programs: an upgrade attaches again."""
    host.plane.attach(SPEC)
    assert host.plane.is_attached(SPEC)
    subprocess.run(["ip", "link", "set", "dev", SPEC.fwd, "promisc", "off"], check=True)
    assert not host.plane.is_attached(SPEC)
    host.plane.attach(SPEC)
    assert host.plane.is_attached(SPEC)
