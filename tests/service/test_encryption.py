"""Copies that go through TLS: real processes, real certificates, and what a listener in between can see."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.lab import image
from coloebpf.model import State
from coloebpf.service.engine import Failed
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.qemu_primary import QemuPrimary
from coloebpf.service.engines.xen_primary import XenPrimary
from coloebpf.service.peer.pki import init_pki
from tests.service import qemu_rig, xen_rig
from tests.service.peers import expired, identity
from tests.service.test_xl_engines import protect
from tests.service.xl_rig import Rig

SOON_S = 150.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    init_pki(directory, ["a", "b"])
    return directory


def encryption(pki: Path, host: str) -> Encryption:
    return Encryption(identity(pki, host), "b" if host == "a" else "a")


def pass_on(one: socket.socket, other: socket.socket, seen: bytearray, at_end: int) -> None:
    """Both ways, in threads. `at_end`: what the other side's shutdown() is, when one has ended."""

    def way(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(MIB):
                seen.extend(data)
                sink.sendall(data)
            sink.shutdown(at_end)

    for source, sink in ((one, other), (other, one)):
        threading.Thread(target=way, args=(source, sink), daemon=True).start()


class Wire:
    """Two ends of a TCP connection, with somebody in between who writes down what goes by."""

    def __init__(self) -> None:
        self.seen = bytearray()
        with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
            self.a = socket.create_connection(first.getsockname())
            left, _ = first.accept()
            right = socket.create_connection(second.getsockname())
            self.b, _ = second.accept()
        pass_on(left, right, self.seen, socket.SHUT_RDWR)


class Listener:
    """Between the primary and what takes its copies in: `seen` is what went by."""

    def __init__(self, port: int) -> None:
        self.seen = bytearray()
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def between(self, engine: XenPrimary | QemuPrimary) -> None:
        """The engine is told of this port in place of the real one."""
        heard = engine.heard

        def tell(word: str, number: int, detail: str) -> None:
            heard(word, number, detail.replace(f" {self._to} ", f" {self.port} "))

        engine.heard = tell  # type: ignore[method-assign]

    def _serve(self) -> None:
        while True:
            near, _ = self._server.accept()
            far = socket.create_connection(("127.0.0.1", self._to))
            pass_on(near, far, self.seen, socket.SHUT_WR)


async def both(wire: Wire, a: Encryption, b: Encryption) -> tuple[socket.socket, socket.socket]:
    return await a.around(wire.a, server=False), await b.around(wire.b, server=True)


async def everything(end: socket.socket) -> bytes:
    """Until the other side has closed it."""
    got = bytearray()
    while data := await asyncio.get_running_loop().sock_recv(end, MIB):
        got += data
    return bytes(got)


def play(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(SOON_S):
            await test()

    asyncio.run(bounded())


def test_what_goes_in_comes_out_and_cannot_be_read_in_between(pki: Path) -> None:
    """Both ways at once, more than all buffers hold; at one side's end the rest arrives before the other's."""

    async def test() -> None:
        loop, wire = asyncio.get_running_loop(), Wire()
        near, far = await both(wire, encryption(pki, "a"), encryption(pki, "b"))
        there, here = b"the guest's memory" + os.urandom(16 * MIB), b"its answer" + os.urandom(8 * MIB)

        async def primary() -> bytes:
            sending = asyncio.create_task(loop.sock_sendall(near, there))
            got = bytearray()
            while len(got) < len(here):
                got += await loop.sock_recv(near, MIB)
            await sending
            near.close()
            return bytes(got)

        answer, got, _ = await asyncio.gather(primary(), everything(far), loop.sock_sendall(far, here))
        assert hashlib.sha256(answer).digest() == hashlib.sha256(here).digest()
        assert hashlib.sha256(got).digest() == hashlib.sha256(there).digest()
        assert len(wire.seen) > len(there) + len(here)
        assert b"the guest's memory" not in wire.seen
        assert b"its answer" not in wire.seen

    play(test)


def test_one_that_does_not_read_is_waited_for(pki: Path) -> None:
    """A full receiver stops the sender, and nothing is lost."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        near, far = await both(Wire(), encryption(pki, "a"), encryption(pki, "b"))
        data = os.urandom(64 * MIB)
        sending = asyncio.create_task(loop.sock_sendall(near, data))
        await asyncio.sleep(1)
        assert not sending.done(), "64 MiB were taken in by nobody"
        got = bytearray()
        while len(got) < len(data):
            got += await loop.sock_recv(far, MIB)
        await sending
        assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()

    play(test)


@pytest.mark.parametrize("who", ["another name", "another CA", "expired"])
@pytest.mark.parametrize("strange", ["a", "b"])
def test_a_stranger_gets_and_gives_nothing(pki: Path, tmp_path: Path, who: str, strange: str) -> None:
    async def test() -> None:
        sides = {host: encryption(pki, host) for host in "ab"}
        if who == "another name":
            init_pki(tmp_path, ["a", "b", "c"])
            sides = {host: encryption(tmp_path, host) for host in "ab"}
            sides[strange] = Encryption(identity(tmp_path, "c"), sides[strange].name)
        elif who == "another CA":
            init_pki(tmp_path, ["a", "b"])
            sides[strange] = encryption(tmp_path, strange)
        else:
            expired(tmp_path, "a", "b")
            sides = {host: encryption(tmp_path, host) for host in "ab"}
        ends = await both(Wire(), sides["a"], sides["b"])
        honest = ends[0 if strange == "b" else 1]
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(ends[strange == "b"], b"memory")
        assert await everything(honest) == b""

    play(test)


def test_a_cut_is_the_end_of_both(pki: Path) -> None:
    async def test() -> None:
        wire = Wire()
        near, far = await both(wire, encryption(pki, "a"), encryption(pki, "b"))
        await asyncio.get_running_loop().sock_sendall(near, b"x")
        assert await asyncio.get_running_loop().sock_recv(far, 1) == b"x"
        # Its own descriptor is the tunnel's now: the middle is what breaks.
        far.close()
        assert await everything(near) == b""

    play(test)


@pytest.mark.parametrize("colo", [True, False])
def test_a_guest_is_copied_through_it(tmp_path: Path, pki: Path, colo: bool) -> None:
    """By libxl's streams, with their failover; the services may go meanwhile."""

    async def test() -> None:
        for host in "ab":
            (tmp_path / host).mkdir()
        rig = Rig(tmp_path, colo, encryption={host: encryption(pki, host) for host in "ab"})
        try:
            await rig.up()
            await rig.primary.request_checkpoint()
            await rig.until(lambda: "a Committed" in rig.steps, "a commit")
            if colo:
                await rig.until(lambda: rig.runs("a") and rig.runs("b"), "both to run")
                await rig.checkpoint("two")
            else:
                await protect(rig, "two")
            rig.deaf = {"a", "b"}
            rig.kill("a", "")
            await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
            await rig.secondary.failover()
            guest = rig.named("b", "web")
            assert guest is not None
            assert guest["memory"] == "two"
        finally:
            await rig.down()

    play(test)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.mark.parametrize("tls", [True, False])
def test_live_copies(tmp_path: Path, pki: Path, tls: bool) -> None:
    """libxl-live: the guest's memory, and its configuration before it, can be read on the way without TLS only."""

    async def test() -> None:
        port = free_port()
        rig = xen_rig.Rig(tmp_path, port, encryption={host: encryption(pki, host) for host in "ab"} if tls else {})
        listener = Listener(port)
        listener.between(rig.primary)
        try:
            await rig.up()
            for memory in ("what nobody may read", "the next of it"):
                rig.remember(memory)
                await rig.checkpoint()
                assert rig.primary.progress == ""
                assert rig.svm()["memory"] == memory
                assert (memory.encode() in listener.seen) is not tls
            assert (b"Xen saved domain" in listener.seen) is not tls
        finally:
            await rig.down()

    play(test)


@pytest.mark.vm
@pytest.mark.parametrize("tls", [True, False])
def test_a_qemu(tmp_path: Path, pki: Path, tls: bool) -> None:
    """The engine qemu, with real QEMUs: memory that is filled in ahead, and the rest behind it."""
    kernel = image.find_kernel()
    if kernel is None:
        pytest.skip("no linux-image-cloud-amd64 of Debian 12: run deploy/install-deps.sh test")

    async def test() -> None:
        port = free_port()
        rig = qemu_rig.Rig(
            kernel, tmp_path, port, encryption={host: encryption(pki, host) for host in "ab"} if tls else {}
        )
        listener = Listener(port)
        listener.between(rig.primary)
        try:
            await rig.up()
            await rig.checkpoint()
            await rig.until(lambda: rig.primary.filled, "the next copy")
            await rig.checkpoint()
            await rig.until(lambda: rig.svm_ticks() > 3, "the SVM to count where the PVM was")
            assert len(listener.seen) > 10 * MIB
            assert (b"Linux version 6.1" in listener.seen) is not tls
        finally:
            await rig.down()

    play(test)


@pytest.mark.parametrize("host", ["a", "b"])
def test_hosts_that_differ_in_it(tmp_path: Path, pki: Path, host: str) -> None:
    """Said before anything is sent."""

    async def test() -> None:
        for one in "ab":
            (tmp_path / one).mkdir()
        rig = Rig(tmp_path, True, encryption={host: encryption(pki, host)})
        try:
            await rig.up()
            rig.set_state(State.SYNCING)
            await rig.primary.request_checkpoint()
            await rig.until(lambda: any(isinstance(event, Failed) for _, event in rig.events), "Failed")
            [failed] = {event for _, event in rig.events if isinstance(event, Failed)}
            assert "encrypt_copies in [peer] must be the same on both" in failed.reason
            assert not rig.processes("a")
        finally:
            await rig.down()

    play(test)
