"""The feeder's frames are what real guests send, and it notices what a peer does wrong with them."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from tests.bench.feeder import Feeder, Ports, Run
from tests.bench.workloads import LOCK_STEP, TCP_64, UDP_ONE, Pace, Workload

GUEST, CLIENT = "02:c0:10:00:00:00", "02:c0:10:01:00:01"
PACE = Pace(rate=1000, lag_us=-100)  # the echo waits for the primary only, so its frames come last
SECONDS = 0.3

Mangle = Callable[[list[bytes]], list[bytes]]


class Echo:
    """A peer that hears both guests and gives the client what `mangle` makes of each burst of the primary's frames."""

    def __init__(self, directory: Path, mangle: Mangle) -> None:
        self.heard: dict[str, list[bytes]] = {"primary": [], "secondary": []}
        self._mangle = mangle
        self._directory = directory
        self._listeners = {name: self._listen(name) for name in ("client", "primary", "secondary")}
        self._threads = [threading.Thread(target=self._serve, args=(name,), daemon=True) for name in self.heard]
        self._client: socket.socket | None = None

    def ports(self) -> Ports:
        path = {name: str(self._directory / name) for name in self._listeners}
        return Ports(path["primary"], path["secondary"], path["client"], GUEST, CLIENT, stream=True)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(5)
        for listener in self._listeners.values():
            listener.close()

    def _listen(self, name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._directory / name))
        listener.listen()
        return listener

    def _serve(self, name: str) -> None:
        client = self._listeners["client"].accept()[0] if name == "primary" else None
        connection = self._listeners[name].accept()[0]
        for burst in bursts(connection):
            self.heard[name] += burst
            if client:
                client.sendall(b"".join(struct.pack("!I", len(frame)) + frame for frame in self._mangle(burst)))


def bursts(connection: socket.socket, frames: int = 4) -> Iterator[list[bytes]]:
    """What comes in, `frames` at a time, until the other side closes."""
    stream, burst = connection.makefile("rb"), []
    while header := stream.read(4):
        burst.append(stream.read(struct.unpack("!I", header)[0]))
        if len(burst) == frames:
            yield burst
            burst = []


@pytest.fixture(scope="module")
def feeder(tmp_path_factory: pytest.TempPathFactory) -> Feeder:
    return Feeder(tmp_path_factory.mktemp("feeder"))


def paced(feeder: Feeder, directory: Path, workload: Workload, mangle: Mangle = list) -> tuple[Echo, Run]:
    echo = Echo(directory, mangle)
    echo.start()
    run = feeder.paced(echo.ports(), workload, PACE, seconds=SECONDS)
    echo.join()
    return echo, run


@pytest.mark.parametrize("workload", [TCP_64, UDP_ONE], ids=lambda w: w.name)
def test_frames_are_valid_and_only_differ_where_replicas_do(feeder: Feeder, tmp_path: Path, workload: Workload) -> None:
    echo, run = paced(feeder, tmp_path, workload)
    assert run.clean
    assert len(echo.heard["primary"]) == len(echo.heard["secondary"]) == PACE.rate * SECONDS
    next_seq: dict[int, int] = {}
    for one, two in zip(echo.heard["primary"], echo.heard["secondary"], strict=True):
        frames = [Ether(one), Ether(two)]
        for frame in frames:
            assert (frame.src, frame.dst) == (GUEST, CLIENT)
            rebuilt = frame.copy()
            del rebuilt[IP].chksum
            del rebuilt[TCP if workload.tcp else UDP].chksum
            assert bytes(rebuilt) == bytes(frame)
            assert len(frame[TCP if workload.tcp else UDP].payload) == workload.payload
        assert frames[0][IP].id != frames[1][IP].id
        assert bytes(frames[0].lastlayer()) == bytes(frames[1].lastlayer())
        if workload.tcp:
            tcp = frames[0][TCP]
            assert tcp.seq == frames[1][TCP].seq == next_seq.get(tcp.dport, tcp.seq)
            next_seq[tcp.dport] = tcp.seq + workload.payload
    assert len(next_seq) == (64 if workload.tcp else 0)


@pytest.mark.parametrize(
    ("mangle", "count"),
    [
        (lambda burst: [burst[1], burst[0], *burst[2:]], "reordered"),
        (lambda burst: burst[1:], "lost"),
        (lambda burst: [burst[0], *burst], "duplicates"),
        (lambda burst: [burst[0][:-1], *burst], "foreign"),
    ],
    ids=["reordered", "lost", "doubled", "foreign"],
)
def test_audit(feeder: Feeder, tmp_path: Path, mangle: Mangle, count: str) -> None:
    _, run = paced(feeder, tmp_path, UDP_ONE, mangle)
    counts = {name: run.counts[name] for name in ("reordered", "lost", "duplicates", "foreign")}
    assert counts == {name: PACE.rate * SECONDS / 4 if name == count else 0 for name in counts}


def test_closed_loop_counts_what_was_measured(feeder: Feeder, tmp_path: Path) -> None:
    echo = Echo(tmp_path, list)
    echo.start()
    readings = iter(({"x": 3.0}, {"x": 10.0}))
    run = feeder.closed(echo.ports(), TCP_64, LOCK_STEP, seconds=0.2, meter=lambda: next(readings))
    echo.join()
    assert run.clean
    assert not run.stalled
    assert run.meters == {"x": 7}
    assert run.counts["sent"] == len(echo.heard["primary"]) > run.packets > 0
