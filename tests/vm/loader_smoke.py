"""The whole dataplane once, on the kernel that runs this: both hosts loaded and attached, held, proven, flushed, gone.

Run by tests/vm/test_debian_kernel.py inside the guest; `python -m tests.vm.loader_smoke` does the same on this machine.
"""

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from coloebpf.netns import inside

LAB = "smoke"
COLOEBPF = (sys.executable, "-m", "coloebpf", "lab")
ARRIVAL_S = 120.0  # for a frame that must come; an emulated machine takes some 10 ms
SILENCE_S = 1.0  # for a frame that must not come
ETH_P_ALL = 3


def lab(command: str, *options: str) -> str:
    """One `coloebpf lab` command; its output. Its errors go to the terminal."""
    argv = [*COLOEBPF, command, "--name", LAB, *options]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False, timeout=3000)
    assert done.returncode == 0, f"{' '.join(argv[1:])} ended with {done.returncode}"
    return done.stdout


def udp_frame(record: dict[str, Any], payload: bytes) -> bytes:
    """A datagram from the guest to the client, without a UDP checksum."""
    source, target = (IPv4Address(record["addresses"][who]["v4"][0]) for who in ("guest", "client"))
    udp = struct.pack("!HHHH", 7000, 7001, 8 + len(payload), 0) + payload
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, source.packed, target.packed)
    total = sum(struct.unpack("!10H", head))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    macs = bytes.fromhex((record["client_mac"] + record["guest_mac"]).replace(":", ""))
    return macs + b"\x08\x00" + head[:10] + struct.pack("!H", checksum) + head[12:] + udp


def port(record: dict[str, Any], node: str) -> socket.socket:
    """A packet socket on the node's eth0."""
    with inside(record["namespaces"][node]):
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        opened.bind(("eth0", 0))
        return opened


def arrived(client: socket.socket, payload: bytes, seconds: float) -> bytes | None:
    """The first frame with `payload` that reaches the client within `seconds`, or None."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        client.settimeout(left)
        try:
            frame = client.recv(4096)
        except TimeoutError:
            return None
        if payload in frame:
            return frame
    return None


def programs() -> list[str]:
    """Tags of the loaded tc and XDP programs."""
    shown = json.loads(subprocess.run(["bpftool", "-j", "prog"], capture_output=True, check=True).stdout)
    return sorted(program["tag"] for program in shown if program["type"] in ("sched_cls", "xdp"))


def exchange(record: dict[str, Any]) -> None:
    """Equal output passes in both orders of arrival; unequal output waits for the checkpoint."""
    with ExitStack() as stack:
        client, pvm, svm = (stack.enter_context(port(record, node)) for node in ("client", "pvm", "svm"))

        frame = udp_frame(record, b"said by the PVM first")
        pvm.send(frame)
        assert arrived(client, b"said by the PVM first", SILENCE_S) is None, "released without proof"
        svm.send(frame)
        assert arrived(client, b"said by the PVM first", ARRIVAL_S) == frame, "proven, but not released as it was"

        frame = udp_frame(record, b"said by the SVM first")
        svm.send(frame)
        assert arrived(client, b"said by the SVM first", SILENCE_S) is None, "the SVM's output reached the client"
        pvm.send(frame)
        assert arrived(client, b"said by the SVM first", ARRIVAL_S) == frame, "proven, but not released as it was"

        frame = udp_frame(record, b"said by the PVM alone")
        svm.send(udp_frame(record, b"and else by the SVM.."))
        pvm.send(frame)
        assert arrived(client, b"said by the PVM alone", SILENCE_S) is None, "unequal output was released"
        held = json.loads(lab("status", "--json"))["nics"][0]
        assert held["held"] == 1, f"held: {held}"
        flushed = json.loads(lab("checkpoint", "--json"))
        assert flushed == {"epoch": 1, "flushed": 1}, flushed
        assert arrived(client, b"said by the PVM alone", ARRIVAL_S) == frame, "not flushed by the checkpoint"
    nic = json.loads(lab("status", "--json"))["nics"][0]
    assert (nic["held"], nic["released_packets"]) == (0, 3), nic


def main() -> None:
    """Brings a lab up, exchanges frames, takes it down, and looks for what was left behind."""
    print(f"kernel {os.uname().release}", flush=True)
    assert shutil.which("bpftool"), "bpftool is missing"
    before = programs()
    start = time.monotonic()
    try:
        record = json.loads(lab("up", "--bare", "--guests", "none", "--json"))
        print(f"up after {time.monotonic() - start:.1f} s: {len(programs()) - len(before)} programs", flush=True)
        exchange(record)
    finally:
        lab("down")
    for pins in record["pins"].values():
        assert not Path(pins).exists(), f"{pins} is left"
    end = time.monotonic() + ARRIVAL_S
    while programs() != before and time.monotonic() < end:
        time.sleep(0.2)  # the kernel frees a namespace's filters after its last user has gone
    assert programs() == before, "programs are left"
    print(f"smoke passed in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
