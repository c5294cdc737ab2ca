"""One host's link, heartbeat and arbiter in a process of its own, as test_two_hosts.py starts it.

It says "loaded", and serves once it has got a line. It stands where the service's supervisor will. Instead of the
dataplane's map there is a file with the pair's state and deadline (two words of 8 bytes), which the test reads as the
programs read theirs; instead of XDP a socket on fwd.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import json
import logging
import mmap
import secrets
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from coloebpf.model import FwdBeat, Role, State
from coloebpf.service import farewell
from coloebpf.service.arbiters.base import Refusal, keep
from coloebpf.service.arbiters.etcd import EtcdArbiter
from coloebpf.service.beat_frames import ETHERTYPE
from coloebpf.service.config import EtcdConfig
from coloebpf.service.farewell import Farewell
from coloebpf.service.heartbeat import Heartbeat, Reports
from coloebpf.service.paths import Watch
from coloebpf.service.peer.link import PeerLink
from coloebpf.service.peer.messages import Beat, Hello, Message, Patience, Restarting, Settled
from coloebpf.service.peer.pki import Identity
from coloebpf.service.peer.witness import lease_of

MS = 1_000_000
INTERVAL_MS = 50  # the configuration's default
PAIR, NIC = 0, 0
GRACE_MS = 6000  # beyond the ordinary lease, and time for a process to start
ETCD_LEASE_S = 2
ANSWER_S = 10.0  # for the other side's word; the service gives it less than a busy machine may need
PAYLOAD_AT = 14 + 5  # of a frame: behind Ethernet, magic and version


class Words:
    """State and deadline, shared with the test."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._at = (ct.c_uint64 * 2).from_buffer(mmap.mmap(file.fileno(), 16))

    @property
    def state(self) -> State:
        return State(self._at[0])

    @state.setter
    def state(self, state: State) -> None:
        self._at[0] = int(state)

    @property
    def deadline_ns(self) -> int:
        return self._at[1]

    @deadline_ns.setter
    def deadline_ns(self, at: int) -> None:
        self._at[1] = at

    @property
    def speaks(self) -> bool:
        """What the programs would say to a packet."""
        speaking = self.state in (State.LOCKSTEP, State.PASSTHROUGH, State.PROMOTED)
        return speaking and time.monotonic_ns() <= self.deadline_ns


class HostProcess:
    """`about`: what the test wrote on the command line."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.role = Role(about["role"])
        self.words = Words(Path(about["words"]))
        timeout_ns = about["timeout_ms"] * MS
        cookie, lease = secrets.token_bytes(16), lease_of(timeout_ns)
        pki = Path(about["pki"])
        name = about["name"]
        self.arbiter = EtcdArbiter(
            EtcdConfig(endpoints=(about["etcd"],), lease_s=ETCD_LEASE_S), name, time.monotonic_ns
        )
        self.noted: dict[int, FwdBeat] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.name, self.joined, self.decided = about["pair"], False, False
        self.beat = Heartbeat(
            session=cookie,
            interval_ns=INTERVAL_MS * MS,
            timeout_ns=timeout_ns,
            lease_ns=lease,
            clock=time.monotonic_ns,
            send=self.send,
            fwd_beats=lambda: self.noted,
            reports=Reports(self.lost, lambda pair: None, self.lease, lambda cookie: None),
        )
        self.link = PeerLink(
            name,
            about["peer"],
            Identity(pki / "ca.pem", pki / f"{name}.pem", pki / f"{name}.key"),
            listen=(about["listen"], 7788),
            connect=(about["connect"], 7788),
            session=cookie,
            interval_s=INTERVAL_MS / 1000,
            lease_ns=lease,
            pairs=list,
            on_message=self.message,
            on_up=self.up,
            on_down=lambda reason: None,
        )
        self.farewell = Farewell(self.beat, self.link.send, GRACE_MS, time.monotonic_ns)
        self.ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETHERTYPE))
        self.ear.bind(("fwd", ETHERTYPE))

    async def run(self) -> None:
        asyncio.get_running_loop().add_reader(self.ear, self.frame)
        if self.role is Role.PRIMARY:
            await self.arbiter.begin(self)
        self.link.start()
        self.beat.watch([Watch(PAIR, self.role, {NIC: ("fwd", 0)}, leased=True)])
        beating = asyncio.create_task(self.beat.run())
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.end, beating)
        with contextlib.suppress(asyncio.CancelledError):
            await beating

    def end(self, beating: asyncio.Task[None]) -> None:
        """As the service ends on SIGTERM."""

        async def leave() -> None:
            await self.farewell.say()
            beating.cancel()

        self.tasks.add(asyncio.create_task(leave()))

    def up(self, hello: Hello) -> None:
        self.beat.peer_up(hello)
        if self.role is Role.SECONDARY and not self.joined:
            self.beat.set_granting(PAIR, True)
        self.joined = True

    def send(self, message: Message) -> bool:
        return self.link.send(message)

    def message(self, message: Message) -> None:
        if isinstance(message, Beat):
            self.beat.received(message)
        elif isinstance(message, Patience | Restarting | Settled):
            self.farewell.received(message)

    def frame(self) -> None:
        try:
            got = self.ear.recv(2048)
        except OSError:  # the device went down
            return
        cookie, counter = got[PAYLOAD_AT : PAYLOAD_AT + 16], got[PAYLOAD_AT + 16 : PAYLOAD_AT + 24]
        self.noted[NIC] = FwdBeat(time.monotonic_ns(), cookie, int.from_bytes(counter, "big"), 0)

    def lease(self, pair: int, deadline_ns: int) -> None:
        if not self.decided:
            self.words.deadline_ns = deadline_ns
            self.words.state = State.LOCKSTEP

    def lost(self, pair: int) -> None:
        if self.joined and not self.tasks:
            task = asyncio.get_running_loop().create_task(self.decide())
            self.tasks.add(task)

    async def decide(self) -> None:
        """What pair.py will do with PEER_LOST."""
        answer = await self.arbiter.acquire(self)
        if not isinstance(answer, Refusal):
            if self.role is Role.SECONDARY:
                await self.beat.wait_safe(PAIR)
            self.decided = True
            self.words.deadline_ns = answer.deadline_ns or 0
            self.words.state = State.PASSTHROUGH if self.role is Role.PRIMARY else State.PROMOTED
            answer = await keep(self.arbiter, self, answer, time.monotonic_ns, self.renewed)
        self.decided = True
        self.words.state = State.HALTED
        logging.error("halted: %s", answer.reason)

    def renewed(self, deadline_ns: int) -> None:
        self.words.deadline_ns = deadline_ns


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    farewell.ANSWER_S = ANSWER_S
    print("loaded", flush=True)
    sys.stdin.readline()
    asyncio.run(HostProcess(json.loads(sys.argv[1])).run())
