"""Which host speaks for the guest, as the network sees it: the switch's ports, watched from outside of both hosts."""

from __future__ import annotations

import select
import socket
import struct
import threading
from contextlib import suppress
from dataclasses import dataclass

from coloebpf.lab.plan import HOSTS, LabPlan
from coloebpf.netns import inside

ETH_P_ALL = 3
SO_TIMESTAMPNS, SO_RCVBUFFORCE = 35, 33
RECEIVE_BUFFER = 16 << 20
PACKET_OUTGOING = 4  # what the switch sends to the host
NS_PER_S = 1_000_000_000


@dataclass
class Heard:
    """Frames that a host has sent with the guest's address. Times: the kernel's, ns of CLOCK_REALTIME."""

    frames: int = 0
    first_ns: int = 0
    last_ns: int = 0


class Speakers(threading.Thread):
    """Listens from its start to stop(). The SVM speaks when it was promoted, and from then on the PVM must be silent."""

    def __init__(self, plan: LabPlan) -> None:
        super().__init__(daemon=True)
        self.heard = {host: Heard() for host in HOSTS}
        self._mac = bytes.fromhex(plan.nic_list()[0].mac.replace(":", ""))
        self._ending, self._ender = socket.socketpair()
        self._ports: dict[socket.socket, str] = {}
        for host in HOSTS:
            with inside(plan.namespace("lan")):
                port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            port.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
            port.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
            port.bind((host, ETH_P_ALL))
            port.setblocking(False)
            self._ports[port] = host
        self.start()

    def run(self) -> None:
        poll = select.poll()
        for one in (self._ending, *self._ports):
            poll.register(one, select.POLLIN)
        by_number = {port.fileno(): port for port in self._ports}
        while True:
            ready = {number for number, _ in poll.poll()}
            for number in ready & by_number.keys():
                self._drain(by_number[number])
            if self._ending.fileno() in ready:
                return

    def _drain(self, port: socket.socket) -> None:
        heard = self.heard[self._ports[port]]
        with suppress(BlockingIOError):
            while True:
                frame, notes, _, source = port.recvmsg(64, 64)
                if source[2] == PACKET_OUTGOING or frame[6:12] != self._mac:
                    continue
                seconds, ns = struct.unpack("qq", notes[0][2])
                at = seconds * NS_PER_S + ns
                heard.frames += 1
                heard.first_ns = heard.first_ns or at
                heard.last_ns = at

    def stop(self) -> None:
        self._ender.send(b".")
        self.join()
        for one in (self._ending, self._ender, *self._ports):
            one.close()

    def check(self) -> None:
        """Never two of them. An AssertionError says by how much."""
        primary, secondary = (self.heard[host] for host in HOSTS)
        assert primary.frames, "the watch at the switch has seen nothing"
        if secondary.frames:
            late_us = (primary.last_ns - secondary.first_ns) // 1000
            assert late_us < 0, f"two speakers: the primary was heard {late_us} us after the secondary's first frame"
