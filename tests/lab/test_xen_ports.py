"""Ports of Xen guests: Xen's hotplug script joins a tap to one, as QEMU would have opened it; and frames wait in one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf.errors import DeviceError
from coloebpf.netns import inside
from coloebpf.xen import ports

pytestmark = [pytest.mark.lab]
SCRIPT = Path(__file__).parents[2] / "deploy/xen/vif-coloebpf"
NETNS = "coloebpf-xen-ports"
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000
ARRIVE_S = 30.0  # seconds for a frame on a busy machine
# What the script takes from Xen's: arguments and environment as libxl gives them, and xenstore.
VIF_COMMON = """
command=$1
dev=${vif:-$INTERFACE}
do_or_die() { "$@" || fatal "$* failed"; }
fatal() { echo "$*" >&2; exit 1; }
xenstore_read() { [ "$1" = "$XENBUS_PATH/bridge" ] && echo "$PORT"; }
xenstore_read_default() { [ "$1" = "$XENBUS_PATH/type" ] && echo "${TYPE:-$2}"; }
success() { echo connected; }
"""


def sh(line: str) -> str:
    return subprocess.run(line, shell=True, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def place() -> Iterator[None]:
    """A namespace with a bridge."""
    subprocess.run(["ip", "netns", "del", NETNS], capture_output=True, check=False)
    sh(f"ip netns add {NETNS}")
    try:
        with inside(NETNS):
            sh("ip link add br0 type bridge && ip link set br0 up")
            yield
    finally:
        sh(f"ip netns del {NETNS}")


@contextlib.contextmanager
def tap(name: str) -> Iterator[int]:
    """As QEMU opens it: without a header, and down."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH14x", name.encode(), IFF_TAP | IFF_NO_PI))
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "vif-common.sh").write_text(VIF_COMMON)
    return Path(shutil.copy(SCRIPT, tmp_path))


def run(script: Path, argument: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "XENBUS_PATH": "/local/domain/0/backend/vif/5/0", **environment}
    return subprocess.run([script, argument], env=env, capture_output=True, text=True, check=False)


def frame(number: int) -> bytes:
    return bytes.fromhex("ffffffffffff 02c010000001 88b6".replace(" ", "")) + number.to_bytes(4, "big") + bytes(60)


def came(fd: int, wanted: bytes) -> None:
    """Until it has; what else there is, is not looked at."""
    while True:
        assert select.select([fd], [], [], ARRIVE_S)[0], "nothing came"
        if os.read(fd, 2000) == wanted:
            return


def test_a_port_is_made_once(place: None) -> None:
    ports.ensure("web0", "br0", 1500)
    ports.ensure("web0", "br0", 1500)
    links = sh("ip -br link")
    assert "web0@web0-x" in links
    assert "web0-x@web0" in links
    assert "master br0" in sh("ip link show web0")
    assert "master" not in sh("ip link show web0-x")
    with pytest.raises(DeviceError, match="br1"):
        ports.ensure("web1", "br1", 1500)
    ports.remove("web0")
    assert "web0" not in sh("ip -br link")


def test_a_device_that_is_no_port(place: None) -> None:
    sh("ip link add web0 type veth peer name other")
    with pytest.raises(DeviceError, match="web0 is there and no port"):
        ports.ensure("web0", "br0", 1500)
    ports.remove("web0")
    assert "web0" in sh("ip -br link")


def test_frames_pass_both_ways(place: None, script: Path) -> None:
    """Also for the domain that follows in the same slot, and when its NIC's PV half is told that all is well."""
    ports.ensure("web0", "br0", 1500)
    with tap("client") as client:
        sh("ip link set client master br0 && ip link set client up")
        for name in ("vif5.0-emu", "vif6.0-emu"):
            done = run(script, "online", type_if="vif", vif=name.removesuffix("-emu"), PORT="web0-x")
            assert (done.returncode, done.stdout) == (0, "connected\n"), done.stderr
            with tap(name) as guest:
                done = run(script, "add", type_if="tap", INTERFACE=name, PORT="web0-x")
                assert done.returncode == 0, done.stderr
                os.write(guest, frame(1))
                came(client, frame(1))
                os.write(client, frame(2))
                came(guest, frame(2))
                assert "master" not in sh(f"ip link show {name}")
            assert run(script, "remove", type_if="tap", INTERFACE=name, PORT="web0-x").returncode == 0
            assert run(script, "offline", type_if="vif", vif="vif5.0", PORT="web0-x").returncode == 0


def test_a_pv_nic(place: None, script: Path) -> None:
    """Of a guest without a tap: its vif is what is joined. The PV half of an emulated NIC is not, and stays down."""
    ports.ensure("web0", "br0", 1500)
    with tap("client") as client, tap("vif5.0") as guest:
        sh("ip link set client master br0 && ip link set client up")
        half = run(script, "online", type_if="vif", vif="vif5.0", PORT="web0-x", TYPE="vif_ioemu")
        assert (half.returncode, half.stdout) == (0, "connected\n"), half.stderr
        assert "state DOWN" in sh("ip link show vif5.0")
        done = run(script, "online", type_if="vif", vif="vif5.0", PORT="web0-x", TYPE="vif")
        assert (done.returncode, done.stdout) == (0, "connected\n"), done.stderr
        os.write(guest, frame(1))
        came(client, frame(1))
        os.write(client, frame(2))
        came(guest, frame(2))


def test_no_such_port(place: None, script: Path) -> None:
    """libxl gives the domain up, instead of leaving its NIC with nobody."""
    with tap("vif5.0-emu"):
        done = run(script, "add", type_if="tap", INTERFACE="vif5.0-emu", PORT="web9-x")
        assert done.returncode != 0
        assert "there is no port web9-x" in done.stderr


def test_frames_wait(place: None, script: Path) -> None:
    """In order, until they are released; then what comes passes."""
    ports.ensure("web0", "br0", 1500)
    try:
        ports.hold("web0")
    except DeviceError as e:
        assert "sch_plug" in str(e)  # noqa: PT017
        pytest.skip("this kernel has no sch_plug")
    with tap("client") as client:
        sh("ip link set client master br0 && ip link set client up")
        for number in range(3):
            os.write(client, frame(number))
        with tap("vif5.0-emu") as guest:
            assert run(script, "add", type_if="tap", INTERFACE="vif5.0-emu", PORT="web0-x").returncode == 0
            os.write(client, frame(3))
            ports.release("web0")
            os.write(client, frame(4))
            seen: list[int] = []
            while len(seen) < 5:
                assert select.select([guest], [], [], ARRIVE_S)[0], seen
                data = os.read(guest, 2000)
                if data[12:14] == b"\x88\xb6":
                    seen.append(int.from_bytes(data[14:18], "big"))
            assert seen == [0, 1, 2, 3, 4]
            ports.hold("web0")
            ports.release("web0")
            os.write(client, frame(5))
            came(guest, frame(5))
