"""Real servers and clients in lock-step: downloads, redis, guest offloads on and off, lost frames.

Sizes are scaled to some minutes together. COLO_TRAFFIC=full (`make traffic`) takes those of the promise: 200,000
requests, 1 GB, 500 downloads at once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from coloebpf.lab import redis
from coloebpf.lab.plan import GUESTS
from coloebpf.netns import inside
from tests.lab import traffic
from tests.lab.conftest import Lab, LabMaker
from tests.lab.loss import Loss

FULL = os.environ.get("COLO_TRAFFIC") == "full"
pytestmark = [pytest.mark.lab, pytest.mark.timeout(1800 if FULL else 300)]
REQUESTS = 200_000 if FULL else 20_000
BULK = 1_000_000_000 if FULL else 100_000_000
PARALLEL = 500 if FULL else 60
LOSSY_BULK = 20_000_000 if FULL else 3_000_000
LOSSY_PARALLEL = 50 if FULL else 10
LOSSY_REQUESTS = 20_000 if FULL else 3_000
LOSSY_SECONDS = 30.0 if FULL else 15.0  # for one transfer of LOSSY_BULK; measured: well under one at the smaller size
MTUS, OFFLOADS, FAMILIES, COMMANDS = (1500, 9000), ("on", "off"), ("v4", "v6"), ("set", "get", "lrange", "mset")
SETTLE_LOST = 3.0  # seconds for the last retransmissions
SETTLE = 30.0  # seconds for the last segments to be sent again and proven
TRAFFIC = str(Path(__file__).parent / "traffic.py")
# What asks for a checkpoint because one side is late is no difference between the two: a lost frame of the SVM's comes
# again only after its retransmission timeout, 200 ms, which is the compare timeout's size.
LATE = ("missing_on_svm", "missing_on_pvm")


def choose(rows: Iterable[tuple[object, ...]], few: Iterable[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """All rows at full size, else a few in which each value is seen."""
    return list(rows) if FULL else list(few)


@pytest.fixture(scope="module")
def labs(make_module_lab: LabMaker) -> Iterator[Callable[[int], Lab]]:
    """One lab for each MTU, made when it is first asked for: they take longer to make than most tests here."""
    found: dict[int, Lab] = {}
    servers: list[subprocess.Popen[bytes]] = []

    def of_mtu(mtu: int) -> Lab:
        if mtu not in found:
            found[mtu] = make_module_lab(guests="process", mtu=mtu)
            servers.extend(serve(found[mtu]))
        return found[mtu]

    yield of_mtu
    for server in servers:
        server.kill()
        server.wait()


@pytest.fixture(params=MTUS)
def lab(labs: Callable[[int], Lab], request: pytest.FixtureRequest) -> Lab:
    return labs(request.param)


def serve(lab: Lab) -> list[subprocess.Popen[bytes]]:
    """Starts the same servers in both guests. Both listen then: with only one a client would get two different answers, and so none."""
    servers = []
    for guest in GUESTS:
        with inside(lab.plan.namespace(guest)):
            servers += [
                subprocess.Popen([sys.executable, TRAFFIC, "serve"]),
                subprocess.Popen([*redis.SERVER], stdout=subprocess.DEVNULL),
            ]
    for guest in GUESTS:
        with inside(lab.plan.namespace(guest)):
            for port in (traffic.PORT, redis.PORT):
                await_listener(port)
    return servers


def await_listener(port: int) -> None:
    """Returns when something listens on the port in this network namespace."""
    deadline = time.monotonic() + SETTLE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"nothing listens on port {port}"
            time.sleep(0.05)


@pytest.fixture(params=OFFLOADS)
def offloads(lab: Lab, request: pytest.FixtureRequest) -> Iterator[str]:
    """Segmentation and checksum offload of both guests and the client."""
    set_offloads(lab, request.param)
    yield request.param
    set_offloads(lab, "on")


def set_offloads(lab: Lab, value: str) -> None:
    for node in (*GUESTS, "client"):
        with inside(lab.plan.namespace(node)):
            features = [word for feature in ("tx", "tso", "gso", "gro") for word in (feature, value)]
            subprocess.run(["ethtool", "-K", "eth0", *features], check=True, capture_output=True)


def address(lab: Lab, family: str) -> str:
    nic = lab.plan.nic_list()[0]
    return nic.guest_v4 if family == "v4" else nic.guest_v6


def fetch(lab: Lab, family: str, count: int, least: int, most: int, seed: int, way: str = "fetch") -> float:
    """Downloads (or uploads: `send`) at once, each checked; nothing may be missing or wrong. Returns the seconds."""
    with inside(lab.plan.namespace("client")):
        done = subprocess.run(
            [sys.executable, TRAFFIC, way, address(lab, family), *map(str, (count, least, most, seed))],
            capture_output=True,
            text=True,
            check=True,
        )
    result = json.loads(done.stdout)
    print(f"{result['bytes'] / 1e6:.0f} MB in {result['seconds']} s")
    assert result["errors"] == []
    return float(result["seconds"])


def benchmark(lab: Lab, family: str, load: redis.Load) -> None:
    process = redis.benchmark(lab.plan, load, address(lab, family))
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "error" not in output.lower()


def assert_agreed(lab: Lab) -> None:
    """Not one byte differed, nothing is held or parked, every slot is back."""
    deadline = time.monotonic() + SETTLE
    while True:
        status = lab.status()
        nic = status["nics"][0]
        left = nic["held"], nic["parked"], status["slots"]["total"] - status["slots"]["free"]
        if left == (0, 0, 0) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert left == (0, 0, 0)
    assert differences(nic) == {}
    assert [event for event in lab.events() if event["kind"] == "divergence"] == []
    assert status["state"] == "lockstep"


def differences(nic: dict[str, Any]) -> dict[str, int]:
    return {reason: count for reason, count in nic["divergences"].items() if count and reason not in LATE}


@pytest.mark.parametrize(
    ("lab", "offloads", "family"),
    choose(
        product(MTUS, OFFLOADS, FAMILIES),
        [(1500, "on", "v4"), (1500, "off", "v6"), (9000, "on", "v6"), (9000, "off", "v4")],
    ),
    indirect=["lab", "offloads"],
)
class TestDownloads:
    def test_one(self, lab: Lab, offloads: str, family: str) -> None:
        before = lab.nic()["compared_bytes"]
        fetch(lab, family, 1, BULK, BULK, 1)
        assert_agreed(lab)
        assert lab.nic()["compared_bytes"] - before >= BULK

    def test_many(self, lab: Lab, offloads: str, family: str) -> None:
        fetch(lab, family, PARALLEL, 100_000, 1_000_000, 2)
        assert_agreed(lab)


@pytest.mark.parametrize(
    ("lab", "offloads", "family", "pipeline", "command"),
    choose(
        product(MTUS, OFFLOADS, FAMILIES, (1, 16), COMMANDS),
        [
            *(
                (1500, "on", family, pipeline, command)
                for family in FAMILIES
                for pipeline in (1, 16)
                for command in COMMANDS
            ),
            (1500, "off", "v4", 16, "mset"),
            (9000, "on", "v6", 16, "lrange"),
            (9000, "off", "v4", 1, "set"),
        ],
    ),
    indirect=["lab", "offloads"],
)
def test_redis(lab: Lab, offloads: str, family: str, pipeline: int, command: str) -> None:
    words: tuple[str, ...] = ("-t", command)
    requests = REQUESTS if FULL or command != "lrange" else REQUESTS // 4
    if command == "lrange":  # filled by hand: LPUSH of many clients answers in the order in which a replica serves them
        client = redis.Connection(lab.plan, "client", address(lab, family))
        client.ask("DEL", "list")
        client.ask("RPUSH", "list", *(f"element {number}" for number in range(100)))
        client.close()
        words = ("lrange", "list", "0", "99")
    benchmark(lab, family, redis.Load(command, requests, pipeline, words))
    assert_agreed(lab)


# Where frames are lost: node, device, side. Towards the dataplane each place is before it, so that it never sees them.
PLACES = {
    "client to guest": ("lan", "client", "ingress"),
    "guest to client": ("lan", "client", "egress"),
    "primary to secondary": ("primary", "fwd0", "egress"),
    "secondary to primary": ("secondary", "fwd0", "egress"),
}


@pytest.mark.parametrize("lab", [1500], indirect=True)
@pytest.mark.parametrize("place", PLACES)
def test_one_frame_in_a_hundred_lost(lab: Lab, place: str) -> None:
    node, device, side = PLACES[place]
    set_offloads(lab, "off")  # so that a frame is a frame
    try:
        with Loss(lab.plan.namespace(node), device, side) as loss:
            for family in ("v4", "v6"):
                for way in ("fetch", "send"):
                    assert fetch(lab, family, 1, LOSSY_BULK, LOSSY_BULK, 3, way) < LOSSY_SECONDS
            fetch(lab, "v6", LOSSY_PARALLEL, 100_000, 300_000, 4)
            fetch(lab, "v4", LOSSY_PARALLEL, 100_000, 300_000, 5, "send")
            assert_agreed(lab)
            benchmark(lab, "v4", redis.Load("SET and GET", LOSSY_REQUESTS, 1, ("-t", "set,get")))
            assert loss.lost > 0
        # redis-benchmark ends with connections half open. A client that gives up never repeats the SYN that the SVM has
        # not got, so the PVM's SYN-ACK is late, and for that the service asks for a checkpoint.
        time.sleep(SETTLE_LOST)
        if lab.nic()["held"]:
            lab.checkpoint()
        assert_agreed(lab)
    finally:
        set_offloads(lab, "on")
