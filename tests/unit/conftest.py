"""One loaded dataplane for all tests that show frames to programs: a primary's NIC and a secondary's in a namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf.control import Control
from coloebpf.dataplane import Dataplane, NicSpec, Role, Sizes, detach
from coloebpf.netns import inside
from tests.unit.rig import GUEST_MAC, MTU, Rig

PIN_ROOT = Path("/sys/fs/bpf/coloebpf")
# Small: each free place is one system call of the loader, which the emulated machine of tests/vm feels.
SIZES = Sizes(mtu=MTU, slots=256, flows=256)
SPECS = (
    NicSpec(0, 0, Role.PRIMARY, "vif0", "fwd0", mac=GUEST_MAC),
    NicSpec(1, 1, Role.SECONDARY, "vif1", "fwd1", mac=GUEST_MAC),
)


def ip(*arguments: str) -> None:
    """iproute2, which must succeed."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def make_devices(namespace: str, nics: int) -> None:
    """vif<n> and fwd<n>, each one end of a veth pair whose other end has a p behind its name; none speaks by itself."""
    ip("netns", "add", namespace)
    with inside(namespace):
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1\n")  # no frames but the tests' own
        for nic in range(nics):
            for name, mtu in ((f"vif{nic}", MTU), (f"fwd{nic}", MTU + 8)):
                ip("link", "add", name, "mtu", str(mtu), "type", "veth", "peer", "name", f"{name}p", "mtu", str(mtu))
                ip("link", "set", name, "up")
                ip("link", "set", f"{name}p", "up")


@pytest.fixture(scope="session")
def session_rig() -> Iterator[Rig]:
    """SPECS, attached."""
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")
    name = f"coloebpf-unit-{os.getpid()}"
    pin_dir = PIN_ROOT / name
    make_devices(name, len(SPECS))
    try:
        plane = Dataplane.load(pin_dir, SIZES)
        with inside(name):
            for spec in SPECS:
                plane.attach(spec)
            control = Control.open(pin_dir)
            rig = Rig(name, plane, control)
        with control:  # outside: the tests that come later in this session are not of this namespace
            yield rig
    finally:
        with inside(name):
            detach(pin_dir)
        ip("netns", "del", name)


@pytest.fixture
def rig(session_rig: Rig) -> Iterator[Rig]:
    """The dataplane with both pairs in lock-step, no flow, nothing held, counters as the last test left them."""
    with inside(session_rig.namespace):
        session_rig.reset()
        yield session_rig
