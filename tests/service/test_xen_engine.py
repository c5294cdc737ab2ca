"""The engine libxl-live, both sides, with a stand-in for libxl: checkpoints, and what is left when somebody dies in one."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coloebpf.control import PairState
from coloebpf.model import State
from coloebpf.service.engine import Committed, DomainGone, Failed, Ready, SecondaryGone, Suspended
from tests.service.xen_rig import Rig, guest

Test = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., None]:
    """Runs a test with a PVM and both engines."""

    def run(test: Test, **rig_with: Any) -> None:
        async def all_of_it() -> None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            rig = Rig(tmp_path, port, **rig_with)
            try:
                await rig.up()
                await test(rig)
            finally:
                await rig.down()

        asyncio.run(all_of_it())

    return run


def test_each_checkpoint_is_a_new_domain(play: Callable[[Test], None]) -> None:
    """It has the PVM's memory as of its standstill, a name and a UUID of its own, and the old one is gone."""

    async def test(rig: Rig) -> None:
        uuids = set()
        for number, slot in enumerate((0, 1, 0)):
            rig.remember(f"memory {number}")
            await rig.checkpoint()
            svm = rig.svm()
            assert svm["memory"] == f"memory {number}"
            assert svm["config"]["nics"][0]["bridge"] == ("tapA-x", "tapB-x")[slot]
            assert "ifname" not in svm["config"]["nics"][0]
            assert "domid" not in svm["config"]["c_info"]
            uuids.add(svm["config"]["c_info"]["uuid"])
            await rig.until(lambda: rig.names() == [f"web--{slot}"], "the old one's end")  # noqa: B023
            assert rig.vifs.now == rig.vifs.vif == (11, 12)[slot]
            assert not rig.pvm()["suspended"]
        assert len(uuids | {guest()["c_info"]["uuid"]}) == 4

    play(test)


def test_order_of_a_checkpoint(play: Callable[[Test], None]) -> None:
    """Frames are kept before the epoch changes; both sides' epochs change while the PVM stands still; it goes on before
    the copy is whole; the SVM runs when that is committed, and only then gets what was kept."""

    async def test(rig: Rig) -> None:
        resumed: list[tuple[str, bool]] = []
        release = rig.tell("b", "hold.restore")  # the copy is not whole before

        def look(step: str) -> None:
            resumed.append((step, not rig.pvm()["suspended"]))
            if step == "switch":
                assert rig.primary.progress == "0 MiB of the guest's memory have arrived"
            if step == "a Suspended":
                asyncio.get_running_loop().call_later(0, asyncio.ensure_future, goes_on())

        async def goes_on() -> None:
            await rig.until(lambda: not rig.pvm()["suspended"], "the PVM to go on")
            release()

        rig.on_step = look
        seen = len(rig.steps)
        await rig.checkpoint()
        await rig.until(lambda: "release tapA" in rig.steps, "the kept frames")
        steps = [step for step in rig.steps[seen:] if step not in ("ask", "standby")]
        order = ["b Replacing", "whole", "a Committed", "go", "release tapA"]
        assert "hold tapA" in rig.steps[:seen] or steps.index("hold tapA") < steps.index("switch")
        assert [step for step in steps if step in order] == order
        assert steps.index("switch") < steps.index("a Suspended") < steps.index("whole")
        assert ("switch", False) in resumed
        assert ("a Suspended", False) in resumed
        assert ("whole", True) in resumed
        assert rig.orders("b")[-1].startswith("unpause")
        assert rig.primary.progress == ""

    play(test)


def test_a_copy_that_fails_leaves_the_old_svm(play: Callable[[Test], None]) -> None:
    """The PVM has gone on; the SVM that runs is the one from before, and the next checkpoint goes through."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint()
        old = rig.secondary.svm
        mend = rig.tell("b", "fail.restored")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(e, Failed) for _, e in rig.events), "a failure")
        assert ("a", Suspended()) in rig.events
        assert rig.secondary.svm is old
        assert rig.vifs.now == 11
        await rig.until(lambda: "release tapB" in rig.steps, "that nothing waits for it any more")
        assert not rig.pvm()["suspended"]
        mend()
        await rig.checkpoint()
        await rig.until(lambda: rig.names() == ["web--1"], "the old one's end")

    play(test)


def test_a_copying_worker_that_is_killed(play: Callable[[Test], None]) -> None:
    """A PVM that stands still goes on all the same, and the checkpoint has failed."""

    async def test(rig: Rig) -> None:
        release = rig.tell("a", "hold.suspend")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.pvm()["suspended"], "the standstill")
        rig.kill("a", "copy")
        release()
        await rig.until(lambda: any(isinstance(e, Failed) for _, e in rig.events), "a failure")
        await rig.until(lambda: not rig.pvm()["suspended"], "the PVM to go on")
        await rig.checkpoint()

    play(test)


def test_a_libxl_that_hangs_while_the_pvm_stands_still(play: Callable[..., None]) -> None:
    """It is given up after step_timeout_s, and the PVM goes on."""

    async def test(rig: Rig) -> None:
        release = rig.tell("a", "hold.suspend")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(e, Failed) for _, e in rig.events), "a failure")
        [failed] = [e for _, e in rig.events if isinstance(e, Failed)]
        assert "PVM's rest" in failed.reason
        await rig.until(lambda: not rig.pvm()["suspended"], "the PVM to go on")
        release()

    play(test, step_timeout_s=2)


def test_the_primarys_service_ends_in_the_middle(play: Callable[[Test], None]) -> None:
    """The PVM goes on; the next service makes the next checkpoint."""

    async def test(rig: Rig) -> None:
        release = rig.tell("a", "hold.suspend")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.pvm()["suspended"], "the standstill")
        stopping = asyncio.ensure_future(rig.primary.stop())
        await asyncio.sleep(0.1)
        release()
        await stopping
        assert not rig.pvm()["suspended"]
        rig.primary = rig.make_primary()
        await rig.primary.start()
        await rig.until(lambda: rig.events.count(("a", Ready())) == 2, "Ready")
        await rig.checkpoint()

    play(test)


def test_a_pvm_that_a_killed_service_has_left_standing(play: Callable[[Test], None]) -> None:
    """Nothing was there any more to let it go on, not even the worker; the next service does."""

    async def test(rig: Rig) -> None:
        await rig.primary.stop()
        rig.xen["a"].write(rig.domid, suspended=True)
        rig.state = State.LOCKSTEP
        rig.primary = rig.make_primary()
        await rig.primary.start()
        await rig.until(lambda: not rig.pvm()["suspended"], "the PVM to go on")

    play(test)


def test_a_receiver_that_is_killed_leaves_an_orphan(play: Callable[[Test], None]) -> None:
    """It is cleared before the next copy, by its name or, if it has none yet, by its UUID."""

    async def test(rig: Rig) -> None:
        rig.tell("b", "hold.restore")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.names() == ["web--0"], "a half copy")
        [orphan] = rig.xen["b"].domains()
        config = rig.xen["b"].read(orphan.domid)["config"]
        config["c_info"]["name"] = ""
        rig.xen["b"].write(orphan.domid, config=config)
        rig.kill("b", "restore0")
        (rig.xen["b"].home / "hold.restore").unlink()
        await rig.until(lambda: any(isinstance(e, Failed) for _, e in rig.events), "a failure")
        await rig.checkpoint()
        await rig.until(lambda: rig.names() == ["web--0"], "the orphan's end")

    play(test)


def test_the_secondarys_service_is_restarted(play: Callable[[Test], None]) -> None:
    """The next one finds the SVM, and a copy that the other had begun is gone."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint()
        await rig.secondary.stop()
        rig.xen["b"].create(guest("web--1"), "half", paused=True)
        rig.xen["b"].create(guest("other"), "somebody else's")
        rig.secondary = rig.make_secondary()
        await rig.secondary.start()
        rig.primary.peer_up()
        rig.secondary.peer_up()
        assert rig.secondary.svm is not None
        await rig.checkpoint()
        await rig.until(lambda: rig.names() == ["other", "web--1"], "the old ones' end")

    play(test)


def test_failover(play: Callable[[Test], None]) -> None:
    """The SVM runs, gets the guest's name, and what was half there is gone."""

    async def test(rig: Rig) -> None:
        rig.remember("last")
        await rig.checkpoint()
        rig.tell("b", "hold.restore")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.names() == ["web--0", "web--1"], "a half copy")
        rig.vifs.word = PairState(State.PROMOTED, rig.vifs.word.epoch)
        await rig.secondary.failover()
        (rig.xen["b"].home / "hold.restore").unlink()
        await rig.until(lambda: rig.names() == ["web"], "one guest")
        assert (rig.svm()["memory"], rig.svm()["paused"]) == ("last", False)
        assert rig.vifs.now == 11

    play(test)


def test_failover_between_whole_and_go(play: Callable[[Test], None]) -> None:
    """The copy that is whole is the guest, not the one before."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint()
        rig.remember("later")
        rig.lost = {"go"}
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.steps.count("whole") == 2, "the copy")
        await rig.secondary.failover()
        assert rig.svm()["memory"] == "later"
        assert not rig.svm()["paused"]
        await rig.until(lambda: rig.names() == ["web"], "one guest")

    play(test)


def test_nobody_says_go(play: Callable[[Test], None]) -> None:
    """A primary whose service has died behind the commit: the SVM runs all the same."""

    async def test(rig: Rig) -> None:
        rig.lost = {"go"}
        await rig.checkpoint()

    play(test)


def test_without_sch_plug(play: Callable[[Test], None]) -> None:
    """Frames are lost, as on fwd; the checkpoint goes through."""

    async def test(rig: Rig) -> None:
        rig.ports.broken = True
        await rig.checkpoint()

    play(test)


def test_the_guest_is_gone(play: Callable[[Test], None]) -> None:
    """On either host that is told."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint()
        rig.xen["b"].write(rig.secondary.svm.domid if rig.secondary.svm else 0, ended=True)
        await rig.until(lambda: ("b", DomainGone("the SVM is gone")) in rig.events, "DomainGone")
        await rig.until(lambda: ("a", SecondaryGone("the SVM is gone")) in rig.events, "SecondaryGone")
        rig.xen["a"].destroy(rig.domid)
        await rig.until(lambda: ("a", DomainGone("the guest web is gone")) in rig.events, "DomainGone")
        assert not await rig.primary.guest_lives()

    play(test)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["c_info"].update(type="pvh"), 'the guest is pvh, not HVM (type = "hvm")'),
        (lambda c: c["b_info"].update({"type.hvm": {}}), "PV drivers"),
        (lambda c: c["nics"][0].update(nictype="vif"), "type=ioemu,model=e1000"),
        (lambda c: c["nics"][0].pop("script"), "script=vif-coloebpf"),
        (lambda c: c["nics"][0].update(bridge="xenbr0"), "vif 0 is behind xenbr0, not behind tapA-x or tapB-x"),
        (lambda c: c["nics"][0].update(bridge="tapB-x"), "not behind the port that is compared: start it with bridge=tapA-x"),
        (lambda c: c["nics"].append(c["nics"][0]), "has 2 NICs, the pair 1"),
        (lambda c: c.update(disks=[{"vdev": "hda", "readwrite": 1}]), "can write its disk hda"),
    ],
)  # fmt: skip
def test_a_guest_that_can_not_be_copied(
    play: Callable[[Test], None], change: Callable[[dict[str, Any]], None], says: str
) -> None:
    """It is refused with the reason, and runs on; mended, it can be protected."""

    async def test(rig: Rig) -> None:
        config = json.loads(json.dumps(guest()))
        change(config)
        rig.xen["a"].write(rig.domid, config=config)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(e, Failed) for _, e in rig.events), "a refusal")
        [failed] = [e for _, e in rig.events if isinstance(e, Failed)]
        assert failed.fatal
        assert says in failed.reason
        assert ("a", Suspended()) not in rig.events
        rig.xen["a"].write(rig.domid, config=guest())
        await rig.checkpoint()

    play(test)


def test_the_protection_ends(play: Callable[[Test], None]) -> None:
    """No copy is left on the secondary, and the next protection begins anew."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint()
        word = rig.vifs.word
        rig.state, rig.vifs.word = State.UNPROTECTED, PairState(State.UNPROTECTED, word.epoch)
        await rig.until(lambda: not rig.names(), "the copies' end")
        rig.state, rig.vifs.word = State.SYNCING, PairState(State.SYNCING, word.epoch)
        await rig.checkpoint()
        assert rig.events.count(("a", Committed())) == 2

    play(test)


def test_a_former_primary_becomes_a_secondary(play: Callable[[Test], None]) -> None:
    """Its old guest is ended when the protection begins: the real one runs on the other host."""

    async def test(rig: Rig) -> None:
        await rig.until(lambda: rig.secondary.standby is not None, "a standby")
        rig.state, rig.vifs.word = State.UNPROTECTED, PairState(State.UNPROTECTED, 0)
        await rig.until(lambda: rig.secondary.standby is None and rig.primary._standby is None, "no standby")
        rig.xen["b"].create(guest(), "of yesterday")
        rig.state, rig.vifs.word = State.SYNCING, PairState(State.SYNCING, 0)
        await rig.checkpoint()
        assert rig.names() == ["web--0"]

    play(test)
