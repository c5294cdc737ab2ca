"""The client of xenstored and the watcher on it, with a stand-in for xenstored that speaks its protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.errors import XenError
from coloebpf.xen.store import Store
from coloebpf.xen.watcher import Watch, Watcher
from tests.service.fake_xenstored import FakeXenstored
from tests.service.xen_rig import HOUR_S, SOON_S

MAC = "02:C0:10:00:00:01"
Test = Callable[[FakeXenstored, Path], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[[Test], None]:
    """Runs a test with a xenstored."""

    def run(test: Test) -> None:
        async def all_of_it() -> None:
            xenstored = FakeXenstored(tmp_path / "socket")
            await xenstored.start()
            try:
                async with asyncio.timeout(SOON_S):
                    await test(xenstored, tmp_path / "socket")
            finally:
                await xenstored.stop()

        asyncio.run(all_of_it())

    return run


async def until(there: Callable[[], bool]) -> None:
    while not there():
        await asyncio.sleep(0.01)


# ---- the client --------------------------------------------------------------------------------------------------------


def test_reading(play: Callable[[Test], None]) -> None:
    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        xenstored.come(5, "web")
        store = await Store.connect(socket, lambda path: None)
        assert await store.read("/local/domain/5/name") == "web"
        assert await store.read("/local/domain/6/name") is None
        assert await store.children("/local/domain") == ["5"]
        assert await store.children("/vm") == []
        both = await asyncio.gather(store.read("/local/domain/5/name"), store.read("/local"))
        assert list(both) == ["web", ""]
        await store.close()

    play(test)


def test_watching(play: Callable[[Test], None]) -> None:
    """An event at once, and one for each change, until it is not wanted any more."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        events: list[str] = []
        store = await Store.connect(socket, events.append)
        await store.watch("/local/domain/5/name")
        xenstored.come(5, "web--incoming")
        xenstored.rename(5, "web")
        xenstored.end(5)
        await until(lambda: len(events) == 4)
        assert events == ["/local/domain/5/name"] * 4
        await store.unwatch("/local/domain/5/name")
        xenstored.come(5, "again")
        assert await store.read("/local/domain/5/name") == "again"
        assert len(events) == 4
        await store.close()

    play(test)


def test_a_refusal_is_told_with_xenstoreds_word(play: Callable[[Test], None]) -> None:
    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        store = await Store.connect(socket, lambda path: None)
        with pytest.raises(XenError, match="xenstored refuses UNWATCH @releaseDomain: EINVAL"):
            await store.unwatch("@releaseDomain")
        await store.close()

    play(test)


def test_a_xenstored_that_ends(play: Callable[[Test], None]) -> None:
    """Whoever waits hears of it, and whoever asks later too."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        store = await Store.connect(socket, lambda path: None)
        xenstored.deaf = True
        asking = asyncio.create_task(store.read("/local"))
        await until(lambda: bool(xenstored.requests))
        await xenstored.stop()
        for question in (asking, store.read("/local")):
            with pytest.raises(XenError, match="xenstored is gone"):
                await question
        with pytest.raises(XenError, match=r"no xenstored answers at .*socket: No such file"):
            await Store.connect(socket, lambda path: None)
        await xenstored.start()

    play(test)


# ---- the watcher -------------------------------------------------------------------------------------------------------


async def up(watcher: Watcher, watch: Watch) -> None:
    """Until nothing more comes of its own beginning."""
    watch.due()
    await until(lambda: watcher.up)
    while watch.due():
        await watch.wait(0.5)


def test_each_change_of_a_domain_is_a_reason_to_look(play: Callable[[Test], None]) -> None:
    """And none of its devices'."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, HOUR_S)
        watch, other = watcher.watch(), watcher.watch()
        await up(watcher, watch)
        for change in (
            lambda: xenstored.come(5, "web--incoming"),
            lambda: xenstored.rename(5, "web"),
            lambda: xenstored.fire("@releaseDomain"),  # it has crashed
            lambda: xenstored.end(5),
        ):
            change()
            await until(watch.due)
            assert other.due()
            while watch.due():  # what belongs to it
                await watch.wait(0.5)
        xenstored.write("/local/domain/0/backend/vif/5/0/state", "4")
        xenstored.write("/local/domain/5/device/vif/0/state", "4")
        await watch.wait(0.5)
        assert not watch.due()
        await watch.end()
        await other.end()

    play(test)


def test_it_waits_no_longer_than_until_a_change(play: Callable[[Test], None]) -> None:
    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, HOUR_S)
        watch = watcher.watch()
        await up(watcher, watch)
        asyncio.get_running_loop().call_later(0.1, xenstored.come, 5, "web")
        await watch.wait(HOUR_S)
        assert watch.due()
        await watch.end()

    play(test)


def test_other_circumstances_are_a_reason_too(play: Callable[[Test], None]) -> None:
    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, HOUR_S)
        watch = watcher.watch()
        await up(watcher, watch)
        assert watch.due("syncing")
        assert not watch.due("syncing")
        assert watch.due("lockstep")
        watch.again()
        assert watch.due("lockstep")
        await watch.end()

    play(test)


def test_a_net_under_it(play: Callable[[Test], None]) -> None:
    """Events may be lost, so there is a look now and then."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, 1.0)
        watch = watcher.watch()
        await up(watcher, watch)
        await until(watch.due)
        await watch.end()

    play(test)


def test_without_a_xenstored_it_is_always_time(play: Callable[[Test], None], caplog: pytest.LogCaptureFixture) -> None:
    """Until it is there again; what has changed meanwhile is looked for then."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        await xenstored.stop()
        watcher = Watcher(socket, HOUR_S)
        watch = watcher.watch()
        for _ in range(3):
            assert watch.due()
            await watch.wait(0.1)
        assert not watcher.up
        await until(lambda: "no xenstored answers" in caplog.text)
        await xenstored.start()
        await up(watcher, watch)
        assert not watch.due()
        await xenstored.stop()
        await until(lambda: not watcher.up)
        assert watch.due()
        assert watch.due()
        xenstored.come(7, "web")
        await xenstored.start()
        await up(watcher, watch)
        xenstored.rename(7, "other")
        await until(watch.due)
        await watch.end()

    play(test)


def test_domains_by_the_addresses_of_their_nics(play: Callable[[Test], None]) -> None:
    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, HOUR_S)
        watch = watcher.watch()
        assert await watch.domids({MAC.lower()}) == []
        await up(watcher, watch)
        xenstored.come(5, "other", "02:c0:10:00:00:02")
        xenstored.come(6, "web", MAC)
        assert await watch.domids({MAC.lower()}) == [6]
        await watch.end()

    play(test)


def test_the_last_watch_ends_the_connection(play: Callable[[Test], None]) -> None:
    """The other pairs' go on; one that comes later begins anew."""

    async def test(xenstored: FakeXenstored, socket: Path) -> None:
        watcher = Watcher(socket, HOUR_S)
        watch, other = watcher.watch(), watcher.watch()
        await up(watcher, watch)
        await watch.end()
        assert watcher.up
        await other.end()
        assert not watcher.up
        await until(lambda: not xenstored.connections)
        third = watcher.watch()
        await up(watcher, third)
        await third.end()

    play(test)
