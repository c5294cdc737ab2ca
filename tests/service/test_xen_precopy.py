"""The engine libxl-live with copies that are kept going until they are wanted; libxl is a stand-in (fake_xen.py)."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.model import State
from coloebpf.service.engine import Committed, Failed, Suspended
from coloebpf.service.engines import xen_primary
from coloebpf.xen.hold import Hold
from tests.service.fake_xen import FakeXen
from tests.service.xen_rig import Rig, guest

Test = Callable[[Rig], Awaitable[None]]
LIBRARY = Path("/precopy.so")  # nobody loads it here
SOON_S = 30


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Test], None]:
    """Runs a test with a pair whose first copy is there."""

    def run(test: Test) -> None:
        async def all_of_it() -> None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            rig = Rig(tmp_path, port, precopy=LIBRARY)
            try:
                await rig.up()
                await rig.checkpoint()
                await test(rig)
            finally:
                await rig.down()

        asyncio.run(all_of_it())

    return run


async def ahead(rig: Rig) -> None:
    """Returns when a copy that nobody wants yet is under way."""
    copies = rig.orders("a").count(f"suspend {rig.domid}")
    if rig.primary.copy is None or not rig.primary.copy.kept:
        await rig.until(lambda: rig.orders("a").count(f"suspend {rig.domid}") > copies, "a copy ahead")
    await rig.until(lambda: rig.primary.copy is not None and rig.primary.copy.kept, "it to be kept going")


def test_a_copy_goes_on_until_it_is_wanted(play: Callable[[Test], None]) -> None:
    """The guest runs meanwhile, and what it has at the request is what the SVM gets."""

    async def test(rig: Rig) -> None:
        for number in range(3):
            await ahead(rig)
            await rig.until(lambda: len(rig.names()) == 2, "its domain")
            seen = len(rig.events)
            await asyncio.sleep(0.3)
            assert not rig.pvm()["suspended"]
            assert rig.primary.progress == "0 MiB of the guest's memory have arrived, ahead of the next checkpoint"
            assert rig.events[seen:] == []
            rig.remember(f"memory {number}")
            await rig.checkpoint()
            assert rig.svm()["memory"] == f"memory {number}"
            assert [event for _, event in rig.events[seen:] if isinstance(event, Suspended)] == [Suspended()]
        assert not [event for _, event in rig.events if isinstance(event, Failed)]

    play(test)


def test_a_request_in_the_moment_it_begins(play: Callable[[Test], None]) -> None:
    """What it was told before libxl knew of it counts."""

    async def test(rig: Rig) -> None:
        for pause in range(8):  # turns of the loop
            while rig.primary.copy is None or not rig.primary.copy.kept:
                await asyncio.sleep(0)
            for _ in range(pause):
                await asyncio.sleep(0)
            await rig.checkpoint()
        assert not [event for _, event in rig.events if isinstance(event, Failed)]

    play(test)


def test_one_that_breaks_is_begun_anew(play: Callable[[Test], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody wanted it, so nothing has failed."""

    async def test(rig: Rig) -> None:
        monkeypatch.setattr(xen_primary, "AHEAD_AGAIN_S", 0.5)
        await ahead(rig)
        rig.kill("a", "copy")
        await rig.until(lambda: rig.primary.copy is None, "its end")
        await rig.until(lambda: rig.names() == ["web--0"], "the half domain's end")
        await ahead(rig)
        rig.primary.peer_up()
        rig.secondary.peer_up()
        await rig.until(lambda: rig.primary.copy is None, "its end")
        rig.remember("in between")
        await rig.checkpoint()
        assert rig.svm()["memory"] == "in between"
        assert not rig.pvm()["suspended"]
        assert not [event for _, event in rig.events if isinstance(event, Failed)]
        assert rig.orders("a").count("resume 1") == 2, "the guest was stopped for those that broke"

    play(test)


def test_failover_beside_one(play: Callable[[Test], None]) -> None:
    """The SVM that runs is the guest; the half copy ends."""

    async def test(rig: Rig) -> None:
        rig.remember("last")
        await ahead(rig)
        await rig.checkpoint()
        await ahead(rig)
        rig.remember("lost")
        await rig.secondary.failover()
        await rig.until(lambda: rig.names() == ["web"], "one guest")
        assert (rig.svm()["memory"], rig.svm()["paused"]) == ("last", False)

    play(test)


def test_the_protection_ends_beside_one(play: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await ahead(rig)
        word = rig.vifs.word
        rig.state, rig.vifs.word = State.UNPROTECTED, type(word)(State.UNPROTECTED, word.epoch)
        await rig.until(lambda: not rig.names() and not rig.workers("a", "copy"), "the copies' end")
        assert not rig.pvm()["suspended"]

    play(test)


def test_the_service_is_restarted_beside_one(play: Callable[[Test], None]) -> None:
    async def test(rig: Rig) -> None:
        await ahead(rig)
        await rig.primary.stop()
        assert not rig.workers("a")
        assert rig.orders("a").count("resume 1") == 1, "the guest was stopped for it"
        rig.primary = rig.make_primary()
        await rig.primary.start()
        rig.primary.peer_up()
        rig.secondary.peer_up()
        await ahead(rig)
        rig.remember("two")
        await rig.checkpoint()
        assert rig.svm()["memory"] == "two"

    play(test)


def test_a_library_that_does_nothing(play: Callable[[Test], None]) -> None:
    """The guest stood still unasked: a checkpoint as good as any, and no more copies ahead."""

    async def test(rig: Rig) -> None:
        await ahead(rig)
        (rig.xen["a"].home / "deaf").touch()
        before = rig.events.count(("a", Committed()))
        rig.kill("a", "copy")
        await rig.until(lambda: rig.primary.copy is None, "its end")
        rig.primary._not_before_s = 0.0
        await rig.until(lambda: rig.events.count(("a", Committed())) == before + 1, "the commit")
        assert ("a", Suspended(requested=False)) in rig.events
        await asyncio.sleep(1)
        assert rig.primary.copy is None
        await rig.checkpoint()

    play(test)


def test_a_worker_whose_service_is_killed(tmp_path: Path) -> None:
    """It ends, and has not stopped the guest."""
    xen = FakeXen(tmp_path / "xen")
    domid = xen.create(guest(), "memory")
    hold = Hold(tmp_path / "hold", LIBRARY)
    mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    near, far = socket.socketpair()
    with near, far, its:
        worker = subprocess.Popen([sys.executable, "-m", "tests.service.fake_xen", str(xen.home)], stdin=its.fileno())
        with mine:
            assert json.loads(mine.recv(100)) == {"answer": "ready"}
            order = {"do": "copy", "domid": domid, "hold": str(hold.path), "library": str(LIBRARY)}
            socket.send_fds(mine, [json.dumps(order).encode()], [far.fileno()])
            while not (xen.home / "log").exists():
                assert worker.poll() is None
        its.close()
        assert worker.wait(SOON_S) == 0
    assert (xen.home / "log").read_text() == f"suspend {domid}\n"
