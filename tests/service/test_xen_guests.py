"""What libxl, a guest or an operator does to domains, and what the engines make of it (the table of docs/xen.md)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import Committed, DomainGone, EngineEvent, Failed, Ready, SecondaryGone
from coloebpf.service.engines.xl_primary import XlPrimary
from coloebpf.service.engines.xl_secondary import XlSecondary
from tests.service import xen_rig, xl_rig
from tests.service.fake_xenstored import FakeXenstored
from tests.service.xen_rig import guest

REBOOTS = "the guest web reboots, and the SVM is what it was before"
Rig = xen_rig.Rig | xl_rig.Rig


class Hosts:
    """A rig, and the xenstored of each of its hosts. What is done here, xenstored tells of, as on a real host."""

    def __init__(self, rig: Rig, work_dir: Path) -> None:
        self.rig = rig
        self.stores = {host: FakeXenstored(work_dir / host / "xenstored") for host in "ab"}

    async def up(self) -> None:
        for store in self.stores.values():
            await store.start()
        await self.rig.up()
        await self.rig.until(lambda: all(watcher.up for watcher in self.rig.watchers.values()), "the watchers")

    async def down(self) -> None:
        await self.rig.down()
        for store in self.stores.values():
            await store.stop()

    def told(self, host: str, kind: type[EngineEvent]) -> list[EngineEvent]:
        return [event for where, event in self.rig.events if where == host and isinstance(event, kind)]

    async def hears(self, host: str, event: EngineEvent, times: int = 1) -> None:
        await self.rig.until(lambda: self.rig.events.count((host, event)) >= times, f"{event}")

    # ---- deeds -----------------------------------------------------------------------------------------------------

    def domain(self, host: str, name: str) -> int:
        [found] = [domain.domid for domain in self.rig.xen[host].domains() if domain.name == name]
        return found

    def destroy(self, host: str, name: str) -> None:
        domid = self.domain(host, name)
        self.rig.xen[host].destroy(domid)
        self.stores[host].fire("@releaseDomain")

    def ends(self, host: str, name: str, **how: bool) -> None:
        """By itself: it has crashed, or was shut down."""
        self.rig.xen[host].write(self.domain(host, name), ended=True, **how)
        self.stores[host].fire("@releaseDomain")

    def create(self, host: str, config: dict[str, Any]) -> int:
        domid = self.rig.xen[host].create(config, "fresh")
        self.stores[host].come(domid, config["c_info"]["name"], config["nics"][0]["mac"])
        return domid

    def rename(self, host: str, old: str, new: str) -> None:
        domid = self.domain(host, old)
        self.rig.xen[host].rename(domid, old, new)
        self.stores[host].write(f"/local/domain/{domid}/name", new)

    def reboot(self, host: str) -> None:
        """As xl does: the old domain says why it has ended, and is destroyed; the new one has its UUID."""
        self.ends(host, "web", reboots=True)


Test = Callable[[Hosts], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def live(tmp_path: Path) -> Play:
    """Runs a test with a pair of the engine libxl-live."""
    return lambda test: _run(lambda: Hosts(xen_rig.Rig(tmp_path, xl_rig._free_port()), tmp_path), test)


@pytest.fixture
def relayed(tmp_path: Path) -> Play:
    """Runs a test with a pair whose guest xl copies: COLO, or Remus."""
    for host in "ab":
        (tmp_path / host).mkdir()
    return lambda test, colo=True: _run(lambda: Hosts(xl_rig.Rig(tmp_path, colo), tmp_path), test)


def _run(make: Callable[[], Hosts], test: Test) -> None:
    async def all_of_it() -> None:
        hosts = make()
        try:
            await hosts.up()
            await test(hosts)
        finally:
            await hosts.down()

    asyncio.run(all_of_it())


# ---- the guest on the primary ------------------------------------------------------------------------------------------


@pytest.fixture(params=["live", "relayed"])
def play(request: pytest.FixtureRequest) -> Play:
    """Runs a test with either."""
    run: Play = request.getfixturevalue(request.param)
    return run


def test_libxl_is_asked_when_something_has_changed(play: Play) -> None:
    """Not five times a second: what nobody tells of is not seen before the net's time, an hour here."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        await asyncio.sleep(1.0)  # what belongs to the beginning
        rig.xen["a"].destroy(rig.domid)
        await asyncio.sleep(1.0)
        assert not hosts.told("a", DomainGone)
        hosts.stores["a"].fire("@releaseDomain")
        await hosts.hears("a", DomainGone("the guest web is gone"))

    play(test)


def test_without_a_xenstored_nothing_is_missed(play: Play) -> None:
    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        await hosts.stores["a"].stop()
        await rig.until(lambda: not rig.watchers["a"].up, "the watcher to know")
        rig.xen["a"].destroy(rig.domid)
        await hosts.hears("a", DomainGone("the guest web is gone"))
        await hosts.stores["a"].start()

    play(test)


def test_the_guest_is_destroyed(play: Play) -> None:
    """libxl's documented way to force a failover."""

    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        hosts.destroy("a", "web")
        await hosts.hears("a", DomainGone("the guest web is gone"))
        assert not hosts.told("a", SecondaryGone)
        assert not await hosts.rig.primary.guest_lives()

    play(test)


def test_the_guest_crashes_or_is_shut_down(play: Play) -> None:
    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        hosts.ends("a", "web")
        await hosts.hears("a", DomainGone("the guest web is gone"))

    play(test)


def test_the_guest_reboots(play: Play) -> None:
    """It is not gone, so the SVM may not take over with a state from before; and the next protection is of the new one."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        rig.remember("before")
        await rig.checkpoint()
        hosts.reboot("a")
        await hosts.hears("a", SecondaryGone(REBOOTS))
        hosts.destroy("a", "web")
        await asyncio.sleep(0.5)
        assert not hosts.told("a", DomainGone)
        ready = rig.events.count(("a", Ready()))
        set_state(rig, State.PASSTHROUGH)
        await rig.primary.failover()
        rig.domid = hosts.create("a", guest())
        await hosts.hears("a", Ready(), ready + 1)
        await all_is_over(rig)
        set_state(rig, State.SYNCING)
        rig.remember("after")
        await rig.checkpoint()
        assert "after" in [rig.xen["b"].read(domain.domid)["memory"] for domain in rig.xen["b"].domains()]

    play(test)


def set_state(rig: Rig, state: State) -> None:
    """Of the pair on both hosts."""
    if isinstance(rig, xl_rig.Rig):
        rig.set_state(state)
    else:
        rig.state = state
        rig.vifs.word = type(rig.vifs.word)(state, rig.vifs.word.epoch)


async def all_is_over(rig: Rig) -> None:
    """No process of the last protection is left."""
    if isinstance(rig, xl_rig.Rig):
        await rig.until(lambda: not rig.processes("a"), "the primary's xl to end")
        set_state(rig, State.UNPROTECTED)
        await rig.until(lambda: not rig.processes("b"), "the secondary's xl to end")


def test_a_reboot_that_nobody_saw(play: Play) -> None:
    """The service stood still meanwhile, say: the UUID tells that it is the guest of before, started anew."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        await rig.checkpoint()
        rig.xen["a"].write(rig.domid, ended=True)
        rig.domid = hosts.create("a", guest())
        await hosts.hears("a", SecondaryGone(REBOOTS))
        assert not hosts.told("a", DomainGone)

    play(test)


def test_another_guest_of_the_same_name(play: Play) -> None:
    """It has a UUID of its own: the one that was protected is gone."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        await rig.checkpoint()
        rig.xen["a"].write(rig.domid, ended=True)
        config = guest()
        config["c_info"]["uuid"] = "99999999-2222-3333-4444-555555555555"
        hosts.create("a", config)
        await hosts.hears("a", DomainGone("the guest web is gone"))
        await hosts.hears("a", Ready(), 2)

    play(test)


def test_a_copy_that_was_left_is_not_the_guest(play: Play) -> None:
    """Of a time when this host was the secondary: libxl gives it the guest's UUID."""

    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        hosts.create("a", guest("web--incoming"))
        hosts.destroy("a", "web")
        await hosts.hears("a", DomainGone("the guest web is gone"))
        assert not await hosts.rig.primary.guest_lives()

    play(test)


def test_the_guest_gets_another_name(play: Play) -> None:
    """It is the guest all the same, in the middle of a protection."""

    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        for old, new in (("web", "shop"), ("shop", "web--old")):
            hosts.rename("a", old, new)
            await asyncio.sleep(0.5)
            assert not hosts.told("a", DomainGone)
            assert await hosts.rig.primary.guest_lives()

    play(test)


def test_a_guest_by_its_nics(play: Play) -> None:
    """It got another name while no service ran; a copy that bears its address is no guest."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        hosts.destroy("a", "web")
        await hosts.hears("a", DomainGone("the guest web is gone"))
        for name in ("web--incoming", "shop"):
            config = guest(name)
            config["c_info"]["uuid"] = f"{len(name):08}-2222-3333-4444-555555555555"
            hosts.create("a", config)
        await hosts.hears("a", Ready(), 2)
        assert await rig.primary.guest_lives()

    play(test)


def test_xl_needs_the_guests_own_name(relayed: Play) -> None:
    """It would give the SVM the other one too."""

    async def test(hosts: Hosts) -> None:
        hosts.rename("a", "web", "shop")
        primary = hosts.rig.primary
        assert isinstance(primary, XlPrimary)
        await hosts.rig.until(lambda: primary.pvm.name == "shop", "that to be seen")
        await primary.request_checkpoint()
        await hosts.rig.until(lambda: bool(hosts.told("a", Failed)), "a refusal")
        [failed] = hosts.told("a", Failed)
        assert isinstance(failed, Failed)
        assert failed.fatal
        assert "xl rename shop web" in failed.reason

    relayed(test)


# ---- the SVM on the secondary ------------------------------------------------------------------------------------------


def test_the_svm_of_live_copies_is_destroyed_or_crashes(live: Play) -> None:
    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        hosts.ends("b", "web--0")
        await hosts.hears("b", DomainGone("the SVM is gone"))
        await hosts.hears("a", SecondaryGone("the SVM is gone"))

    live(test)


@pytest.mark.parametrize(
    ("deed", "reason"), [("destroy", "the SVM is gone"), ("ends", "the SVM has crashed, or was shut down")]
)
def test_the_svm_of_libxls_colo_is_destroyed_or_crashes(relayed: Play, deed: str, reason: str) -> None:
    """Both hosts know at once, and not when libxl finds out at its next checkpoint; the PVM goes on."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        assert isinstance(rig, xl_rig.Rig)
        await rig.checkpoint("one")
        await svm_seen(hosts)
        getattr(hosts, deed)("b", "web--incoming")
        await hosts.hears("b", DomainGone(reason))
        await hosts.hears("a", SecondaryGone(reason))
        await rig.until(lambda: not rig.processes("ab"), "the end of all processes")
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")
        assert rig.named("b", "web") is None, "a second guest"
        assert len(hosts.told("b", DomainGone)) == 1

    relayed(test)


async def svm_seen(hosts: Hosts) -> None:
    """xenstored tells that it has come."""
    hosts.stores["b"].come(hosts.domain("b", "web--incoming"), "web--incoming")
    secondary = hosts.rig.secondary
    assert isinstance(secondary, XlSecondary)
    await hosts.rig.until(lambda: secondary.svm.seen, "the SVM to be seen")


@pytest.mark.parametrize("between", [True, False])
def test_the_relay_is_killed(relayed: Play, between: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Between two checkpoints libxl aborts and leaves the SVM; in one it fails over without a word of ours. Either is
    told, has no voice, and ends with the next protection."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        assert isinstance(rig, xl_rig.Rig)
        await rig.checkpoint("one")
        await svm_seen(hosts)
        hold = rig.xen["a"].home / "hold.suspend"
        if not between:
            hold.touch()
            await rig.primary.request_checkpoint()
            await rig.until(lambda: not rig.runs("b"), "the SVM to be suspended")
        rig.kill("b", "xen.relay")
        await rig.until(lambda: bool(hosts.told("b", DomainGone)), "DomainGone")
        await rig.until(lambda: bool(hosts.told("a", SecondaryGone)), "SecondaryGone")
        hold.unlink(missing_ok=True)
        await rig.until(lambda: not rig.processes("ab"), "the end of all processes")
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")
        assert (rig.named("b", "web") is None) is between
        await rig.until(lambda: "what libxl has done to the SVM" in caplog.text, "its fate")
        set_state(rig, State.PASSTHROUGH)
        await rig.until(lambda: not rig.primary.progress, "the end")
        set_state(rig, State.SYNCING)
        await rig.checkpoint("two")
        assert [domain.name for domain in rig.xen["b"].domains()] == ["web--incoming"]

    relayed(test)


def test_somebody_gives_the_svm_the_guests_name(relayed: Play) -> None:
    """A second `web` while the first one lives: it ends as the SVM, and the dataplane keeps it silent."""

    async def test(hosts: Hosts) -> None:
        await hosts.rig.checkpoint()
        await svm_seen(hosts)
        hosts.rename("b", "web--incoming", "web")
        why = "libxl has made the SVM the guest, which nobody has asked for"
        await hosts.hears("b", DomainGone(why))
        await hosts.hears("a", SecondaryGone(why))

    relayed(test)


def test_libxl_destroys_the_svm_by_mistake(relayed: Play, caplog: pytest.LogCaptureFixture) -> None:
    """Any error of its own but one of the migration's channel."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        await rig.checkpoint()
        (rig.xen["b"].home / "fail.apply").touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool(hosts.told("b", DomainGone)), "DomainGone")
        await rig.until(lambda: bool(hosts.told("a", SecondaryGone)), "SecondaryGone")
        await rig.until(lambda: "destroyed it" in caplog.text or "the SVM is gone" in str(rig.events), "its fate")
        assert rig.xen["b"].domains() == []

    relayed(test)


@pytest.mark.parametrize("colo", [True, False])
def test_libxl_can_not_rename_the_svm_at_a_failover(
    relayed: Play, colo: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It goes on all the same, and so do we: the guest runs."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        assert isinstance(rig, xl_rig.Rig)
        rig.remember("one")
        await rig.primary.request_checkpoint()
        await hosts.hears("a", Committed())
        (rig.xen["b"].home / "fail.rename").touch()
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        await rig.secondary.failover()
        svm = rig.named("b", "web--incoming")
        assert svm is not None
        assert (svm["memory"], svm["paused"], svm["suspended"]) == ("one", False, False)
        assert "xl rename web--incoming web" in caplog.text

    relayed(test, colo)


def test_libxls_receiver_is_killed_in_the_middle_of_a_checkpoint(relayed: Play) -> None:
    """The SVM stands still with a part of a state: it is no guest."""

    async def test(hosts: Hosts) -> None:
        rig = hosts.rig
        assert isinstance(rig, xl_rig.Rig)
        await rig.checkpoint("one")
        rig.deaf = {"a", "b"}
        hold = rig.xen["a"].home / "hold.suspend"
        hold.touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: not rig.runs("b"), "the SVM to be suspended")
        rig.kill("b", "migrate-receive")
        await rig.until(lambda: rig.secondary.relay is None, "its end to be known")
        with pytest.raises(EngineError, match="there is no SVM"):
            await rig.secondary.failover()
        assert rig.named("b", "web") is None

    relayed(test)
