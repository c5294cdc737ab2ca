"""Heartbeats: which path is alive, when the other host counts as lost, and the frames on the forward link."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest

from coloebpf.model import FwdBeat, Role
from coloebpf.netns import inside
from coloebpf.service import beat_frames
from coloebpf.service.beat_frames import FwdSender
from coloebpf.service.heartbeat import Heartbeat, Reports
from coloebpf.service.paths import NEVER_NS, Paths, Watch, verdict
from coloebpf.service.peer.messages import Beat, Hello, Settled
from coloebpf.service.peer.witness import DRIFT, IN_FLIGHT_NS
from coloebpf.service.status import PathStatus

MS = 1_000_000
INTERVAL, TIMEOUT, LEASE = 50 * MS, 200 * MS, 300 * MS
COOKIE, PEER = b"own cookie".ljust(16), b"peer's cookie".ljust(16)
NONE: tuple[int, ...] = ()


@pytest.mark.parametrize(
    ("mgmt", "fwd", "paths", "lost"),
    [
        (1000, {0: 1000, 1: 1000}, Paths(True, {0: True, 1: True}), set()),
        (801, {0: 801}, Paths(True, {0: True}), set()),
        (800, {0: 1000}, Paths(False, {0: True}), set()),  # a path lost, nothing else
        (1000, {0: 800}, Paths(True, {0: False}), set()),
        (800, {0: 800}, Paths(False, {0: False}), {0}),
        (800, {0: 801, 1: 800}, Paths(False, {0: True, 1: False}), {1}),  # only the pair whose fwd is gone as well
        (NEVER_NS, {0: NEVER_NS}, Paths(False, {0: False}), {0}),
        (NEVER_NS, {}, Paths(False, {}), set()),
    ],
)
def test_verdict(mgmt: int, fwd: dict[int, int], paths: Paths, lost: set[int]) -> None:
    got = verdict(1000, mgmt, fwd, 200)
    assert got == paths
    assert got.lost == lost


@dataclass
class Bench:
    """A Heartbeat with a clock that the test turns, and everything it says noted."""

    role: Role = Role.PRIMARY
    leased: bool = True
    now: int = 10**12
    said: list[tuple[str, object]] = field(default_factory=list)
    noted: dict[int, FwdBeat] = field(default_factory=dict)
    number: int = 100  # of the peer's last beat

    def __post_init__(self) -> None:
        self.beat = Heartbeat(
            session=COOKIE,
            interval_ns=INTERVAL,
            timeout_ns=TIMEOUT,
            lease_ns=LEASE,
            clock=lambda: self.now,
            send=self._send,
            fwd_beats=lambda: self.noted,
            reports=Reports(
                lambda pair: self.said.append(("lost", pair)),
                lambda pair: self.said.append(("back", pair)),
                lambda pair, deadline: self.said.append(("lease", (pair, deadline))),
                lambda cookie: self.said.append(("expect", cookie)),
            ),
        )
        self.beat.watch([Watch(0, self.role, {4: ("none", 0), 5: ("none", 7)}, leased=self.leased)])
        self.beat.peer_up(Hello("b", PEER.hex(), 1, LEASE, ()))

    def _send(self, message: Beat | Settled) -> bool:
        self.said.append((message.TYPE, message))
        return True

    def mgmt(self, echo: int = 0, granted: tuple[int, ...] = (), age: int = 0) -> None:
        self.number += 1
        self.beat.received(Beat(self.number, echo, age, granted))

    def fwd(self, nic: int = 4, cookie: bytes = PEER, echo: int = 0) -> None:
        self.number += 1
        self.noted[nic] = FwdBeat(self.now, cookie, self.number << 32 | echo, 0)

    def ticks(self, count: int, *paths: str) -> None:
        """That many intervals, in each of them a beat of the peer on the `paths`."""
        for _ in range(count):
            self.now += INTERVAL
            for path in paths:
                getattr(self, path)()
            self.beat.tick()

    def told(self, what: str) -> list[object]:
        return [detail for kind, detail in self.said if kind == what]

    @property
    def sent(self) -> Beat:
        beat = self.told("beat")[-1]
        assert isinstance(beat, Beat)
        return beat


def test_a_path_lost_is_a_warning_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bench = Bench()
    bench.ticks(6, "mgmt", "fwd")
    bench.ticks(20, "mgmt")
    assert bench.beat.paths == Paths(True, {0: False})
    bench.ticks(20, "mgmt", "fwd")
    bench.ticks(20, "fwd")
    assert bench.beat.paths == Paths(False, {0: True})
    assert bench.told("lost") == []
    lines = [record.message for record in caplog.records if "path" in record.message]
    assert lines == [
        "a path to the peer is alive path=management",
        "a path to the peer is alive path=forward pair=0",
        "a path to the peer is lost path=forward pair=0",
        "a path to the peer is alive path=forward pair=0",
        "a path to the peer is lost path=management",
    ]


def test_both_lost_is_told_once_and_its_end_too() -> None:
    bench = Bench()
    bench.ticks(10, "mgmt", "fwd")
    last = bench.now
    while not bench.told("lost"):
        bench.ticks(1)
    assert bench.now - last == TIMEOUT
    bench.ticks(20)
    assert bench.told("lost") == [0]
    assert bench.told("back") == []
    bench.ticks(3, "fwd")
    assert bench.told("back") == [0]
    bench.ticks(10)
    assert bench.told("lost") == [0, 0]


@pytest.mark.parametrize("cookie", [PEER, b"another cookie".ljust(16)])
def test_a_hello_is_a_sign_of_life(cookie: bytes) -> None:
    """An operator protects right behind it, and the first commit comes before the first beat."""
    bench = Bench(leased=False)
    bench.ticks(10, "mgmt", "fwd")
    bench.ticks(20)
    assert bench.beat.is_lost(0)
    bench.beat.peer_up(Hello("b", cookie.hex(), 1, LEASE, ()))
    assert not bench.beat.is_lost(0)
    assert bench.told("back") == [0]
    bench.ticks(10)
    assert bench.told("lost") == [0, 0], "no beat came behind it"


def test_a_pair_is_lost_until_something_comes() -> None:
    bench = Bench()
    bench.ticks(10, "mgmt", "fwd")
    assert not bench.beat.is_lost(0)
    bench.ticks(20)
    assert bench.beat.is_lost(0)
    bench.mgmt(echo=bench.sent.number, granted=(0,))
    assert not bench.beat.is_lost(0), "before the next tick says so"
    bench.ticks(10, "mgmt")
    assert bench.beat.is_lost(0), "its leave to speak has ended"
    assert not bench.beat.is_lost(1)


def test_a_secondary_waits_for_a_lease_and_stops_granting_before_it_asks() -> None:
    bench = Bench(Role.SECONDARY)
    bench.beat.set_granting(0, True)
    bench.ticks(10, "mgmt")
    assert bench.sent.granted == (0,)
    last = bench.now
    while not bench.told("lost"):
        bench.ticks(1)
    assert bench.now - last == LEASE
    bench.ticks(5, "mgmt")
    assert bench.told("back") == [0]
    assert bench.sent.granted == NONE  # it has asked: only its owner knows whether it may grant again


def test_a_pair_of_which_nothing_was_ever_heard_is_lost_after_a_timeout() -> None:
    bench = Bench()
    start = bench.now
    bench.ticks(3)
    assert bench.told("lost") == []
    while not bench.told("lost"):
        bench.ticks(1)
    assert bench.now - start == TIMEOUT


def test_after_standing_still_it_listens_for_a_whole_timeout() -> None:
    bench = Bench()
    bench.ticks(10, "mgmt")
    bench.now += 10_000 * MS  # this service was frozen
    bench.beat.tick()
    assert bench.beat.stalls == 1
    bench.ticks(3)
    assert bench.told("lost") == []
    bench.ticks(1, "mgmt")
    bench.ticks(3)
    assert bench.told("lost") == []  # the other one lives
    bench.ticks(3)
    assert bench.told("lost") == [0]


def test_a_hiccup_puts_the_verdict_off_until_the_socket_was_read() -> None:
    bench = Bench()
    bench.ticks(10, "mgmt")
    bench.ticks(1)
    bench.now += 100 * MS
    bench.ticks(1)  # 150 ms since the last look, 200 ms since the peer was heard
    assert bench.told("lost") == []
    bench.ticks(1)
    assert bench.told("lost") == [0]


def test_a_host_that_is_always_late_judges_all_the_same() -> None:
    bench = Bench()
    bench.ticks(10, "mgmt")
    for _ in range(10):
        bench.now += 100 * MS
        bench.ticks(1)
    assert bench.told("lost") == [0]


def test_a_frame_is_a_beat_once_and_only_with_the_peers_cookie() -> None:
    bench = Bench()
    bench.ticks(6, "fwd")
    assert bench.beat.paths.fwd == {0: True}
    assert bench.beat.fwd_counts == {4: 6}
    replayed = bench.noted[4]
    for _ in range(6):  # the same one comes again and again
        bench.noted[4] = FwdBeat(bench.now, replayed.cookie, replayed.counter, 0)
        bench.ticks(1)
    assert bench.beat.paths.fwd == {0: False}
    for _ in range(6):
        bench.fwd(cookie=b"stranger".ljust(16))
        bench.ticks(1)
    assert bench.beat.paths.fwd == {0: False}
    bench.fwd(nic=5)  # of another NIC of the pair
    bench.ticks(1)
    assert bench.beat.paths.fwd == {0: True}
    bench.fwd(nic=6)  # of nobody
    bench.ticks(1)
    assert 6 not in bench.beat.fwd_counts


def test_a_restarted_peer_is_believed_from_its_hello_on() -> None:
    bench = Bench()
    bench.ticks(6, "fwd", "mgmt")
    bench.number = 5  # it counts anew
    other = b"the next".ljust(16)
    bench.fwd(cookie=other)
    bench.ticks(4)
    assert bench.beat.paths.fwd == {0: False}
    bench.beat.peer_up(Hello("b", other.hex(), 1, LEASE, ()))
    bench.ticks(1)
    assert bench.sent.echo == 6
    assert bench.told("expect") == [PEER, other]


def test_the_echo_and_the_round_trip() -> None:
    bench = Bench(Role.SECONDARY)
    bench.beat.set_granting(0, True)
    assert bench.beat.rtt_ns is None
    bench.ticks(1)
    assert (bench.sent.echo, bench.sent.echo_age_ns, bench.sent.granted) == (0, 0, NONE)  # nothing heard: no grant
    first = bench.sent.number
    bench.now += 30 * MS
    bench.mgmt(echo=first, age=25 * MS)
    assert bench.beat.rtt_ns == 5 * MS
    bench.now += 20 * MS
    bench.beat.tick()
    assert (bench.sent.number, bench.sent.echo, bench.sent.echo_age_ns) == (first + 1, bench.number, 20 * MS)
    bench.now += LEASE
    bench.beat.tick()
    assert (bench.sent.echo, bench.sent.granted) == (0, NONE)  # too old to renew anything


def test_a_beat_on_fwd_was_heard_when_it_was_looked_at() -> None:
    """Its number and its time may be of two beats, if the program was writing them just then."""
    bench = Bench(Role.SECONDARY)
    bench.beat.set_granting(0, True)
    bench.fwd()
    bench.now += 45 * MS
    bench.beat.tick()
    assert bench.sent.granted == (0,)
    assert bench.beat.granter.safe_at_ns(0) >= bench.now + LEASE
    assert bench.beat.last_fwd_ns[4] == bench.now - 45 * MS

    def frozen_before_reading() -> dict[int, FwdBeat]:
        bench.now += 10_000 * MS
        bench.fwd()
        return bench.noted

    bench.beat._fwd_beats = frozen_before_reading
    bench.beat.tick()
    assert (bench.sent.echo, bench.sent.echo_age_ns) == (bench.number, 0)
    assert bench.beat.granter.safe_at_ns(0) >= bench.now + LEASE


def test_numbers_start_anywhere() -> None:
    assert len({Bench().beat._number for _ in range(8)}) == 8


def test_numbers_go_round() -> None:
    bench = Bench()
    bench.beat._number = 0xFFFFFFFE
    bench.ticks(2)
    assert [beat.number for beat in bench.told("beat")] == [0xFFFFFFFF, 1]  # type: ignore[attr-defined]


def test_a_grant_on_either_path_is_a_deadline_once() -> None:
    bench = Bench()
    bench.ticks(1)
    sent_at, number = bench.now, bench.sent.number
    bench.now += 10 * MS
    bench.mgmt(echo=number, granted=(0, 9))
    assert bench.told("lease") == [(0, sent_at + LEASE)]
    bench.fwd(echo=number)
    bench.ticks(1)
    assert bench.told("lease") == [(0, sent_at + LEASE)]
    bench.fwd(echo=bench.sent.number)
    bench.ticks(1)
    assert bench.told("lease")[1:] == [(0, sent_at + 60 * MS + LEASE)]
    bench.mgmt(echo=1, granted=(0,))  # of whoever
    assert len(bench.told("lease")) == 2


def test_the_shorter_lease_of_the_two_counts() -> None:
    bench = Bench()
    bench.beat.peer_up(Hello("b", PEER.hex(), 1, 100 * MS, ()))
    bench.ticks(1)
    bench.mgmt(echo=bench.sent.number, granted=(0,))
    assert bench.told("lease") == [(0, bench.now + 100 * MS)]


@pytest.mark.parametrize("watch", [Watch(0, Role.SECONDARY, {}, leased=True), Watch(0, Role.PRIMARY, {}, leased=False)])
def test_neither_a_secondary_nor_a_pair_without_leases_gets_deadlines(watch: Watch) -> None:
    bench = Bench()
    bench.beat.watch([watch])
    bench.ticks(1)
    bench.mgmt(echo=bench.sent.number, granted=(0,))
    assert bench.told("lease") == []


def test_leave_that_has_ended_is_a_loss_and_leave_that_comes_again_its_end() -> None:
    bench = Bench()
    bench.ticks(5, "mgmt")
    assert bench.told("lost") == []  # it never had any
    bench.mgmt(echo=bench.sent.number, granted=(0,))
    bench.ticks(6, "mgmt")
    assert bench.told("lost") == []
    bench.ticks(4, "mgmt")
    assert bench.told("lost") == [0]
    bench.mgmt(echo=bench.sent.number, granted=(0,))
    bench.ticks(1, "mgmt")
    assert bench.told("back") == [0]
    bench.beat.watch([Watch(0, Role.PRIMARY, {}, leased=False)])
    bench.ticks(20, "mgmt")
    assert bench.told("lost") == [0]


def test_the_status_of_the_paths() -> None:
    bench = Bench()
    bench.beat.watch(
        [Watch(0, Role.PRIMARY, {4: ("fwd0", 1), 5: ("fwd0", 2)}, True), Watch(1, Role.PRIMARY, {6: ("fwd1", 0)}, True)]
    )
    bench.ticks(5, "mgmt", "fwd")
    bench.fwd(nic=5)
    bench.noted[5] = replace(bench.noted[5], strangers=3)
    bench.ticks(2)
    assert bench.beat.status() == [
        PathStatus(name="management", alive=True, seen_ago_ms=100.0, beats=5),
        PathStatus(name="fwd0", alive=True, seen_ago_ms=100.0, beats=6, strangers=3),
        PathStatus(name="fwd1", alive=False, seen_ago_ms=None),
    ]


def test_a_new_pair_is_not_judged_at_once_and_an_old_one_is_forgotten() -> None:
    bench = Bench(Role.SECONDARY)
    bench.beat.set_granting(0, True)
    bench.ticks(20)
    assert bench.told("lost") == [0]
    bench.beat.set_granting(0, True)
    bench.beat.watch([Watch(1, Role.PRIMARY, {}, True)])
    assert not bench.beat.granter.pairs
    bench.ticks(3)
    assert bench.told("lost") == [0]
    bench.ticks(1)
    assert bench.told("lost") == [0, 1]


def test_waiting_until_the_primary_is_silent() -> None:
    async def run() -> None:
        beat = Heartbeat(
            session=COOKIE, interval_ns=INTERVAL, timeout_ns=20 * MS, lease_ns=30 * MS, clock=time.monotonic_ns,
            send=lambda beat: True, fwd_beats=dict, reports=Reports(print, print, print, print),
        )  # fmt: skip
        start = time.monotonic_ns()
        beat.granter.settle(0)
        beat.granter.promise(0, start)
        await beat.wait_safe(0)
        assert time.monotonic_ns() - start >= 30 * MS + 30 * MS // DRIFT + IN_FLIGHT_NS - 5 * MS

    asyncio.run(run())


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_the_frame_on_the_wire() -> None:
    """The XDP program on fwd reads this."""
    plain = beat_frames.frame(b"\2\0\0\0\0\1", 0, b"c" * 16, 0x01020304, 0x05060708)
    payload = b"COLO\x01" + b"c" * 16 + bytes.fromhex("0102030405060708")
    assert plain == b"\xff" * 6 + b"\2\0\0\0\0\1" + b"\x88\xb5" + payload + bytes(60 - 14 - 29)
    tagged = beat_frames.frame(b"\2\0\0\0\0\1", 7, b"c" * 16, 1, 0)
    assert tagged[12:18] == b"\x81\x00\x00\x07\x88\xb5"
    assert len(tagged) == 64
    beat = FwdBeat(0, b"c" * 16, int.from_bytes(payload[-8:], "big"), 0)
    assert (beat.number, beat.echo) == (0x01020304, 0x05060708)


@pytest.fixture
def wire() -> Iterator[str]:
    """A namespace with fwd and far, the two ends of a veth pair."""
    if os.geteuid() != 0:
        pytest.skip("frames need root")
    name = f"coloebpf-beat-{os.getpid()}"
    try:
        subprocess.run(["ip", "netns", "add", name], check=True)
        for command in ("link add fwd type veth peer name far", "link set fwd up", "link set far up"):
            subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@contextlib.contextmanager
def ear(device: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as heard:
        heard.bind((device, 0x0003))
        heard.settimeout(5)
        yield heard


def mac_of(namespace: str, device: str) -> bytes:
    shown = subprocess.run(
        ["ip", "-n", namespace, "-json", "link", "show", device], capture_output=True, text=True, check=True
    )
    return bytes.fromhex(json.loads(shown.stdout)[0]["address"].replace(":", ""))


@pytest.mark.parametrize("vlan", [0, 7])
def test_frames_are_sent_and_a_device_that_comes_back_is_used_again(
    wire: str, vlan: int, caplog: pytest.LogCaptureFixture
) -> None:
    def ip(command: str) -> None:
        subprocess.run(["ip", "-n", wire, *command.split()], check=True)

    def receive(heard: socket.socket) -> bytes:
        while True:  # the kernel's own chatter on a new device is not ours
            got = heard.recv(2048)
            if b"COLO\x01" in got:
                return got

    caplog.set_level(logging.INFO)
    with inside(wire):
        sender = FwdSender("fwd", vlan)
        with ear("far") as heard:
            assert sender.send(COOKIE, 1, 2)
            assert receive(heard)[:12] == b"\xff" * 6 + mac_of(wire, "fwd")
        ip("link del fwd")
        assert [sender.send(COOKIE, number, 0) for number in range(3)] == [False] * 3
        ip("link add fwd type veth peer name far")
        ip("link set far up")
        assert not sender.send(COOKIE, 4, 0)  # it is down
        ip("link set fwd up")
        with ear("far") as heard:
            assert sender.send(COOKIE, 5, 0)
            assert COOKIE + (5).to_bytes(4, "big") in receive(heard)
        sender.close()
    assert (sender.sent, sender.failed) == (2, 4)
    assert [record.message.split(" device")[0] for record in caplog.records] == [
        "can't send heartbeats on fwd",
        "heartbeats are sent on fwd again",
    ]


def test_run_beats_at_its_interval_on_both_paths(wire: str) -> None:
    async def run() -> None:
        sent: list[Beat] = []
        enough = asyncio.Event()

        def send(beat: Beat | Settled) -> bool:
            assert isinstance(beat, Beat)
            sent.append(beat)
            if len(sent) == 6:
                enough.set()
            return True

        beat = Heartbeat(
            session=COOKIE, interval_ns=20 * MS, timeout_ns=TIMEOUT, lease_ns=LEASE, clock=time.monotonic_ns,
            send=send, fwd_beats=dict, reports=Reports(print, print, print, print),
        )  # fmt: skip
        with inside(wire), ear("far") as heard:
            beat.watch([Watch(0, Role.PRIMARY, {0: ("fwd", 0)}, True)])
            start = time.monotonic_ns()
            running = asyncio.create_task(beat.run())
            await asyncio.wait_for(enough.wait(), 5)
            assert time.monotonic_ns() - start >= 95 * MS
            running.cancel()
            await asyncio.wait([running])
            frames = [got for got in (heard.recv(2048) for _ in range(6)) if got[12:14] == b"\x88\xb5"]
            assert [got[35:39] for got in frames] == [one.number.to_bytes(4, "big") for one in sent[: len(frames)]]
            assert frames

    asyncio.run(run())
