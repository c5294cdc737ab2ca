"""Announcing a guest: the frames as scapy and the kernel read them, through the vif, the hooks and a bridge."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet

from coloebpf.control import Control
from coloebpf.dataplane import Dataplane, detach
from coloebpf.errors import AnnounceError
from coloebpf.model import NicSpec, Role, Sizes, State
from coloebpf.netns import inside
from coloebpf.service import announce as announce_module
from coloebpf.service.announce import MOST, PAUSES_S, Address, AddressBook, Injector, announce, frames

MAC, CLIENT_MAC = "02:c0:10:00:00:01", "02:c0:20:00:00:01"
NIC, PAIR = 3, 2
BPF = Path(__file__).parents[2] / "bpf"
V4, V6 = Address(ipaddress.ip_address("10.77.0.10")), Address(ipaddress.ip_address("fd77::10"))
TAGGED = Address(ipaddress.ip_address("10.78.0.10"), (b"\x88\xa8\0\5", b"\x81\0\0\7"))


# ---- the frames ------------------------------------------------------------------------------------------------------


def test_without_an_address_one_frame_teaches_the_switches() -> None:
    (raw,) = frames(MAC, ())
    frame = Ether(raw)
    assert (frame.src, frame.dst, frame.type) == (MAC, "ff:ff:ff:ff:ff:ff", 0x8035)
    rarp = ARP(bytes(frame.payload))
    assert (rarp.op, rarp.hwsrc, rarp.hwdst, rarp.psrc, rarp.pdst) == (3, MAC, MAC, "0.0.0.0", "0.0.0.0")
    assert len(raw) == 60


def test_an_ipv4_address_is_asked_for_and_answered() -> None:
    _, *arps = map(Ether, frames(MAC, [V4]))
    assert [(a.dst, a[ARP].op, a[ARP].hwsrc, a[ARP].psrc, a[ARP].pdst) for a in arps] == [
        ("ff:ff:ff:ff:ff:ff", 1, MAC, "10.77.0.10", "10.77.0.10"),
        ("ff:ff:ff:ff:ff:ff", 2, MAC, "10.77.0.10", "10.77.0.10"),
    ]


def test_an_ipv6_address_is_advertised() -> None:
    _, raw = frames(MAC, [V6])
    frame = Ether(raw)
    assert (frame.src, frame.dst) == (MAC, "33:33:00:00:00:01")
    assert (frame[IPv6].src, frame[IPv6].dst, frame[IPv6].hlim) == ("fd77::10", "ff02::1", 255)
    said = frame[ICMPv6ND_NA]
    assert (said.tgt, said.O, said.S) == ("fd77::10", 1, 0)
    assert said[ICMPv6NDOptDstLLAddr].lladdr == MAC
    fresh = Ether(raw)
    del fresh[ICMPv6ND_NA].cksum  # scapy computes it anew
    assert bytes(fresh) == raw


def test_the_guests_own_tags() -> None:
    sent = [Ether(raw) for raw in frames(MAC, [TAGGED])]
    assert [frame.haslayer(Dot1AD) for frame in sent] == [0, 1, 1, 1]  # RARP without and with them, then ARP
    assert all((frame[Dot1AD].vlan, frame[Dot1Q].vlan) == (5, 7) for frame in sent[1:])
    assert sent[2][ARP].psrc == "10.78.0.10"
    assert len(frames(MAC, [TAGGED])[3]) == 68


@pytest.mark.parametrize("mac", ["", "02:c0", "02:c0:10:00:00:xx"])
def test_what_is_no_mac(mac: str) -> None:
    with pytest.raises(AnnounceError, match="no MAC address"):
        frames(mac, ())


def test_the_programs_numbers() -> None:
    """Those that have no place in a map's type; bpf/ is where they are declared."""
    text = "\n".join(path.read_text() for path in BPF.glob("*.h"))
    for name in ("TAG_PRESENT", "TAG_AD", "FLOW_LIVE", "FLOW_SVM_ISN", "FLOW_DELTA", "GAUGE_FLOW_TOP"):
        found = re.search(rf"#define {name} (\w+?)u?\s", text)
        assert found, name
        assert int(found[1], 0) == getattr(announce_module, name), name


# ---- through a bridge ------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


@dataclass
class Host:
    """A secondary host: the guest's end of vif0 is guest0, the LAN is behind uplink, its far end is lan0."""

    control: Control

    def promote(self, state: State = State.PROMOTED, deadline_ns: int = 0) -> None:
        self.control.set_state(PAIR, state)
        self.control.set_deadline(PAIR, deadline_ns)

    def guest_sends(self, frame: Packet) -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as guest:
            guest.bind(("guest0", 0))
            guest.send(bytes(frame))


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    if os.geteuid() != 0:
        pytest.skip("loading programs needs root")
    name = f"coloebpf-announce-{os.getpid()}"
    pins = Path("/sys/fs/bpf/coloebpf") / name
    ip("netns", "add", name)
    try:
        with inside(name):
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1\n")  # no frames but the tests' own
            ip("link", "add", "br0", "type", "bridge")
            for one, other, mtu in (("vif0", "guest0", "1500"), ("fwd0", "far0", "1508"), ("uplink", "lan0", "1500")):
                ip("link", "add", one, "mtu", mtu, "type", "veth", "peer", "name", other, "mtu", mtu)
            for port in ("vif0", "uplink"):
                ip("link", "set", port, "master", "br0")
            for device in ("br0", "vif0", "guest0", "fwd0", "far0", "uplink", "lan0"):
                ip("link", "set", device, "up")
            plane = Dataplane.load(pins, Sizes(slots=256, flows=256))
            plane.attach(NicSpec(NIC, PAIR, Role.SECONDARY, "vif0", "fwd0", mac=MAC))
            with Control.open(pins) as control:
                yield Host(control)
    finally:
        with inside(name):
            detach(pins)
        ip("netns", "del", name)


@pytest.fixture
def secondary(host: Host) -> Iterator[Host]:
    """In lock-step, this thread in its namespace."""
    with inside(f"coloebpf-announce-{os.getpid()}"):
        host.promote(State.LOCKSTEP)
        yield host


@pytest.fixture
def lan(secondary: Host) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as heard:
        heard.bind(("lan0", 0x0003))
        heard.settimeout(5)
        yield heard


def heard_on(lan: socket.socket, count: int) -> list[bytes]:
    return [lan.recv(2048) for _ in range(count)]


def nothing_on(lan: socket.socket) -> bool:
    """veth and bridge deliver within the sender's call, or right after it."""
    lan.settimeout(0.3)
    try:
        return not lan.recv(2048)
    except TimeoutError:
        return True


def fdb_port() -> str:
    shown = subprocess.run(["bridge", "-json", "fdb", "show", "br", "br0"], capture_output=True, text=True, check=True)
    return str(next(entry["ifname"] for entry in json.loads(shown.stdout) if entry["mac"] == MAC))


@pytest.mark.kernel
def test_the_bridge_and_the_lan_learn_where_the_guest_is(
    secondary: Host, lan: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as elsewhere:  # until now the PVM spoke, behind the uplink
        elsewhere.bind(("lan0", 0))
        elsewhere.send(bytes(Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff", type=0x9000) / (b"\0" * 46)))
    assert lan.recv(2048)  # our own
    assert fdb_port() == "uplink"
    secondary.promote()
    monkeypatch.setattr(announce_module, "PAUSES_S", (0.0, 0.0))
    asked = []

    def addresses() -> list[Address]:
        asked.append(1)
        return [V4, V6]

    assert asyncio.run(announce("vif0", MAC, addresses)) == 8
    # Each kind of frame is steered to a CPU of its own, so their order may change.
    assert sorted(heard_on(lan, 8)) == sorted(frames(MAC, [V4, V6]) * 2)
    assert fdb_port() == "vif0"
    assert len(asked) >= 2  # what is learnt meanwhile is announced in the next round


@pytest.mark.kernel
@pytest.mark.parametrize("up_again", [True, False])
def test_a_port_that_comes_up_late_is_waited_for(
    secondary: Host, monkeypatch: pytest.MonkeyPatch, up_again: bool
) -> None:
    secondary.promote()
    monkeypatch.setattr(announce_module, "PAUSES_S", (0.0, 0.0, 0.0))
    asked = []

    def addresses() -> list[Address]:
        asked.append(1)
        if len(asked) == 2 and up_again:
            ip("link", "set", "vif0", "up")
        return [V4]

    ip("link", "set", "vif0", "down")
    try:
        if up_again:
            assert asyncio.run(announce("vif0", MAC, addresses)) == 2 * len(frames(MAC, [V4]))
        else:
            with pytest.raises(AnnounceError, match="is it up"):
                asyncio.run(announce("vif0", MAC, addresses))
    finally:
        ip("link", "set", "vif0", "up")


@pytest.mark.kernel
@pytest.mark.parametrize("state", [State.HALTED, State.UNPROTECTED, State.PASSTHROUGH])
def test_who_may_not_speak_does_not_announce(secondary: Host, lan: socket.socket, state: State) -> None:
    secondary.promote(state)
    asyncio.run(announce("vif0", MAC, lambda: [V4]))
    assert nothing_on(lan)


@pytest.mark.kernel
def test_whose_deadline_has_passed_does_not_announce(secondary: Host, lan: socket.socket) -> None:
    secondary.promote(deadline_ns=time.monotonic_ns() - 1)
    asyncio.run(announce("vif0", MAC, lambda: [V4]))
    assert nothing_on(lan)
    secondary.promote(deadline_ns=time.monotonic_ns() + 10**10)
    with_one = Injector("vif0")
    with_one.send(frames(MAC, ())[0])
    with_one.close()
    assert heard_on(lan, 1)


@pytest.mark.kernel
def test_a_device_that_is_gone_or_down(secondary: Host) -> None:
    with pytest.raises(AnnounceError, match="device vif9 does not exist"):
        Injector("vif9")
    ip("link", "add", "gone0", "type", "veth", "peer", "name", "gone1")
    injector = Injector("gone0")
    with pytest.raises(AnnounceError, match="can't announce on gone0"):
        injector.send(frames(MAC, ())[0])
    ip("link", "del", "gone0")
    with pytest.raises(AnnounceError, match="can't announce on gone0"):
        injector.send(frames(MAC, ())[0])
    injector.close()


def syn(source: str, port: int, **fields: Any) -> Packet:
    """The SVM opens a connection."""
    layer = IPv6(src=source, dst="fd77::1") if ":" in source else IP(src=source, dst="10.77.0.1")
    return Ether(src=MAC, dst=CLIENT_MAC) / layer / TCP(sport=port, dport=80, flags="S", seq=1000)


@pytest.mark.kernel
def test_addresses_are_those_that_the_svm_has_sent_from(secondary: Host) -> None:
    book = AddressBook(secondary.control)
    secondary.guest_sends(syn("10.77.0.10", 1001))
    secondary.guest_sends(syn("10.77.0.10", 1002))
    secondary.guest_sends(syn("fd77::10", 1003))
    tagged = syn("10.78.0.10", 1004)
    secondary.guest_sends(Ether(src=MAC, dst=CLIENT_MAC) / Dot1AD(vlan=5) / Dot1Q(vlan=7) / tagged[IP])
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as far:  # a client's, for an address of somebody else
        far.bind(("far0", 0))
        far.send(
            bytes(Ether(src=CLIENT_MAC, dst=MAC) / IP(src="10.77.0.1", dst="10.77.0.99") / TCP(dport=80, flags="S"))
        )
    top = 0
    while top < 1 or len(book.addresses(NIC)) < 3:  # the far frame is XDP's, on another CPU perhaps
        book.look(1)  # a flow at a time: it goes round
        top += 1
        assert top < 100_000
    book.look(1000)
    assert set(book.addresses(NIC)) == {V4, V6, TAGGED}
    assert book.addresses(NIC + 1) == ()
    book.forget(NIC)
    assert book.addresses(NIC) == ()


@pytest.mark.kernel
def test_a_guest_with_very_many_addresses(secondary: Host) -> None:
    book = AddressBook(secondary.control)
    for number in range(MOST + 10):
        secondary.guest_sends(syn(f"10.79.0.{number + 1}", 2000 + number))
    for _ in range(1000):
        book.look(100)
        if len(book.addresses(NIC)) >= MOST:
            break
    book.look(1000)
    assert len(book.addresses(NIC)) == MOST


def test_five_rounds_within_a_second() -> None:
    assert len(PAUSES_S) == 5
    assert PAUSES_S[0] == 0.0
    assert sum(PAUSES_S) < 1
