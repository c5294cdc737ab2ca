"""What the service's look at all flows costs: `python -m tests.bench.walk [FLOWS]`, as root.

A secondary's flows are made by SYNs of clients (nothing is held for them), a primary's by datagrams (each holds one).
"""

from __future__ import annotations

import argparse
import ctypes as ct
import os
import statistics
import struct
import time
from collections.abc import Callable
from pathlib import Path

from coloebpf import bpfsys
from coloebpf.control import Control
from coloebpf.dataplane import Dataplane, NicSpec, Role, Sizes, detach
from coloebpf.netns import inside
from tests.unit.conftest import make_devices
from tests.unit.rig import GUEST_MAC, XDP_MD, Rig, tcp, udp

ROUNDS = 20
SLOTS = 65536
PORT_OFFSETS = {"guest": 36, "client": 34}  # in an untagged IPv4 frame: destination and source port
ADDRESS_OFFSET = 26  # of the IPv4 source


def timed(what: str, run: Callable[[], object], rounds: int = ROUNDS) -> None:
    """Prints median and worst of `rounds` runs."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter_ns()
        run()
        times.append((time.perf_counter_ns() - begin) / 1e6)
    print(f"{what:<64} median {statistics.median(times):8.3f} ms   worst {max(times):8.3f} ms")


def open_flows(rig: Rig, count: int) -> None:
    """`count` connections on the secondary, SYN by SYN."""
    frame = bytearray(tcp(80, 1, flags="S", output=False, ack=0))
    context = XDP_MD.pack(0, len(frame), 0, rig.ifindex["fwd1"], 0, 0)
    program = rig.plane.prog_fd("link_arrive")
    for i in range(count):
        struct.pack_into("!H", frame, PORT_OFFSETS["client"], 1024 + i % 60_000)
        frame[ADDRESS_OFFSET + 3] = i // 60_000 + 1
        bpfsys.test_run(program, bytes(frame), ctx=context)


def hold(rig: Rig, count: int) -> None:
    """`count` flows of the PVM with a datagram held in each."""
    frame = bytearray(udp(53, b"answer", remote_port=1024))
    for i in range(count):
        struct.pack_into("!H", frame, PORT_OFFSETS["guest"], 1024 + i)
        rig.run("p2_output", bytes(frame), "vif0")


def whole(control: Control, runs: int) -> Callable[[], None]:
    """A walk over everything in parts."""

    def walk() -> None:
        here = control.sweep_some(0, runs)
        while here:
            here = control.sweep_some(here, runs)

    return walk


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("flows", type=int, nargs="?", default=100_000)
    wanted = parser.parse_args().flows
    name = f"coloebpf-walk-{os.getpid()}"
    pin_dir = Path("/sys/fs/bpf/coloebpf") / name
    sizes = Sizes(slots=SLOTS, flows=1 << (wanted - 1).bit_length())
    make_devices(name, 2)
    try:
        plane = Dataplane.load(pin_dir, sizes)
        with inside(name):
            plane.attach(NicSpec(0, 0, Role.PRIMARY, "vif0", "fwd0", mac=GUEST_MAC))
            plane.attach(NicSpec(1, 1, Role.SECONDARY, "vif1", "fwd1", mac=GUEST_MAC))
            with Control.open(pin_dir) as control:
                rig = Rig(name, plane, control)
                rig.reset()
                open_flows(rig, wanted)
                print(f"{rig.gauge(1)} flows, {rig.gauge(0)} packets held")
                timed("walk of all flows in parts of 8 batches", whole(control, 8))
                timed("one part of 8 batches", lambda: control.sweep_some(0, 8))
                timed("one part of 1 batch", lambda: control.sweep_some(0, 1), 200)
                rig.age_flows()
                control.sweep()
                hold(rig, min(wanted, SLOTS * 3 // 4))
                print(f"{rig.gauge(1)} flows, {rig.gauge(0)} packets held")
                timed("walk of all flows in parts of 8 batches", whole(control, 8))
                rig.set_timeout(1)
                timed("likewise, when each of them is late", whole(control, 8), 1)
                timed("reading and decoding their events", lambda: control.events(0), 1)
                table, flow = control.shapes.leaf("held")(), control.shapes.leaf("flows")()
                timed("reading one flow", lambda: bpfsys.lookup(control.fd("flows"), ct.c_uint32(7), flow), 200)
                timed(
                    "reading all records of held packets",
                    lambda: bpfsys.lookup(control.fd("held"), ct.c_uint32(0), table),
                )
    finally:
        with inside(name):
            detach(pin_dir)
        os.system(f"ip netns del {name}")


if __name__ == "__main__":
    main()
