"""A stand-in for xl, on fake_xen's domains: `python -m tests.service.fake_xl DIR remus|migrate-receive|xenstore-write ...`.

It writes and reads libxl's stream as libxl does, record by record, and waits where libxl waits. The order and what
happens at the stream's end are of Xen 4.17's libxl_colo_save.c, libxl_colo_restore.c and xl_migrate.c.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from coloebpf.errors import XenError
from coloebpf.service.engines import libxl_wire as wire
from coloebpf.xen.stream import read_head, write_head
from tests.service.fake_xen import FakeXen

BANNER = b"xl migration receiver ready, send binary domain data.\n"
LIBXL_HEAD = struct.pack(">QII", 0x4C6962786C466D74, 2, 0)
XC_HEADS = bytes(24 + 16)
END, CONTEXT, EMULATOR, CHECKPOINT_END, STATE = 0, 1, 3, 4, 5
PAGES, HVM, CHECKPOINT, DIRTY = 1, 9, 0xE, 0xF
NEW, SUSPENDED, READY, RESUMED = range(4)
SMALL = 2600  # bytes of an HVM_CONTEXT, as an idle guest's of type pvh
OWN_S = 5.0  # COLO_PROXY_CHECKPOINT_TIMEOUT


def record(kind: int, body: bytes = b"") -> bytes:
    return struct.pack("=II", kind, len(body)) + body + bytes(-len(body) % 8)


def state(what: int) -> bytes:
    return record(STATE, struct.pack("=II", what, 0))


def exactly(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            raise XenError("the stream broke off")
        data += more
    return data


def next_record(fd: int) -> tuple[int, bytes]:
    kind, length = struct.unpack("=II", exactly(fd, 8))
    body = exactly(fd, length)
    exactly(fd, -length % 8)
    return kind, body


def expect(fd: int, what: int) -> None:
    kind, body = next_record(fd)
    if kind != STATE or struct.unpack("=II", body)[0] != what:
        raise XenError(f"record {kind} {body!r}, expected state {what}")


def write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Sender:
    """`xl remus`."""

    def __init__(self, xen: FakeXen, args: list[str]) -> None:
        self.xen, self.colo = xen, "-c" in args
        self.name, rune = args[-2:]
        self.interval_s = int(args[args.index("-i") + 1]) / 1000 if "-i" in args else 0.0
        self.domid = next(domain.domid for domain in xen.domains() if domain.name == self.name)
        child = subprocess.Popen(["/bin/sh", "-c", rune], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdin is not None
        assert child.stdout is not None
        self.out, self.into = child.stdin.fileno(), child.stdout.fileno()
        self.proxy: socket.socket | None = None
        self.run(child)

    def run(self, child: subprocess.Popen[bytes]) -> None:
        try:
            if exactly(self.into, len(BANNER)) != BANNER:
                raise XenError("no banner")
            write_head(self.out, self.xen.configuration(self.domid))
            write(self.out, LIBXL_HEAD)
            if self.colo:
                self.connect()
            write(self.out, record(CONTEXT) + XC_HEADS)
            first = True
            while True:
                self.checkpoint(first)
                first = False
        except (XenError, OSError) as e:
            print(f"xl: {e}", file=sys.stderr)
        if self.xen.domain(self.domid) is None:
            print("Primary domain has been destroyed.", file=sys.stderr)
            sys.exit(0)
        self.xen.resume(self.domid)
        sys.exit(1)

    def connect(self) -> None:
        keys = json.loads((self.xen.home / "store").read_text())
        at = f"/libxl/{self.domid}/device/vif/0/colo_checkpoint_"
        self.proxy = socket.create_connection((keys[f"{at}host"], int(keys[f"{at}port"])))
        self.proxy.sendall(struct.pack(">I", len(wire.INIT)))
        self.proxy.sendall(wire.INIT)
        self.proxy.settimeout(0.5)
        if not self.proxy.recv(1024):
            raise XenError("no answer to INIT")
        self.proxy.settimeout(None)

    def checkpoint(self, first: bool) -> None:
        self.xen.write(self.domid, suspended=True)
        if self.colo and not first:
            expect(self.into, SUSPENDED)
            assert next_record(self.into)[0] == DIRTY
        self.xen._hold("suspend")
        memory = self.xen.read(self.domid)["memory"].encode()
        hvm = bytes(SMALL if (self.xen.home / "small").exists() else 9000)  # in a pipe there is room for 4096
        write(self.out, record(PAGES, memory) + record(HVM, hvm) + record(CHECKPOINT))
        write(self.out, record(EMULATOR, b"qemu") + record(CHECKPOINT_END))
        if not self.colo:
            self.xen.write(self.domid, suspended=False)
            time.sleep(self.interval_s)
            return
        assert self.proxy is not None
        expect(self.into, READY)
        self.proxy.sendall(struct.pack(">I", len(wire.COLO_CHECKPOINT)))
        self.proxy.sendall(wire.COLO_CHECKPOINT)
        self.xen.write(self.domid, suspended=False)
        if first:
            self.xen.unpause(self.domid)
        expect(self.into, RESUMED)
        if select.select([self.proxy], [], [], OWN_S)[0]:
            (length,) = struct.unpack(">I", self.proxy.recv(4))
            assert self.proxy.recv(length) == wire.DO_CHECKPOINT
        write(self.out, state(NEW))


class Receiver:
    """`xl migrate-receive`."""

    def __init__(self, xen: FakeXen, args: list[str]) -> None:
        self.xen, self.colo = xen, "--colo" in args
        self.domid: int | None = None
        self.waits = False  # between two checkpoints
        write(1, BANNER)
        config = json.loads(read_head(0))
        self.name = config["c_info"]["name"]
        config["c_info"]["name"] = f"{self.name}--incoming"
        assert exactly(0, len(LIBXL_HEAD)) == LIBXL_HEAD
        assert next_record(0)[0] == CONTEXT
        exactly(0, len(XC_HEADS))
        try:
            while True:
                self.checkpoint(config)
        except OSError as e:
            print(f"xl: {e}", file=sys.stderr)
        except XenError as e:
            if self.colo and self.waits:  # stream_complete: Assertion `rc' failed
                os.abort()
            print(f"xl: {e}", file=sys.stderr)
        if self.domid is None:
            sys.exit(1)
        # As in do_failover(), and in migrate_receive().
        self.xen.write(self.domid, suspended=False)
        try:
            self.xen.rename(self.domid, f"{self.name}--incoming", self.name)
        except XenError as e:
            print(f"xl: {e}", file=sys.stderr)  # it goes on all the same
        if not self.colo:
            self.xen.unpause(self.domid)
        sys.exit(0)

    def checkpoint(self, config: dict[str, object]) -> None:
        memory = ""
        self.xen._hold("apply")
        while (found := next_record(0))[0] != CHECKPOINT:
            if found[0] == PAGES:
                memory = found[1].decode()
        while next_record(0)[0] != CHECKPOINT_END:
            pass
        if (self.xen.home / "fail.apply").exists():
            self.xen.destroy(self.domid) if self.domid is not None else None
            sys.exit(1)
        if self.domid is None:
            self.domid = self.xen.create(config, memory, paused=True)
        self.xen.write(self.domid, memory=memory)
        if not self.colo:
            return
        write(1, state(READY))
        if self.xen.read(self.domid)["paused"]:
            self.xen.unpause(self.domid)
        self.xen.write(self.domid, suspended=False)
        write(1, state(RESUMED))
        self.waits = True
        expect(0, NEW)
        self.waits = False
        self.xen.write(self.domid, suspended=True)
        blind = (self.xen.home / "blind").exists()
        write(1, state(SUSPENDED) + record(DIRTY, b"" if blind else bytes(16)))


def store(xen: FakeXen, args: list[str]) -> None:
    (xen.home / "store").write_text(json.dumps(dict(zip(args[::2], args[1::2], strict=True))))


if __name__ == "__main__":
    {"remus": Sender, "migrate-receive": Receiver, "xenstore-write": store}[sys.argv[2]](
        FakeXen(Path(sys.argv[1])), sys.argv[3:]
    )
