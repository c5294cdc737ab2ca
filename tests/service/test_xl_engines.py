"""Engines libxl-colo and libxl-remus, both sides, with real relays and a stand-in for xl that keeps to libxl's stream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    Failed,
    Overwriting,
    Ready,
    Replacing,
    SecondaryGone,
    Suspended,
)
from tests.service.xen_rig import SOON_S
from tests.service.xl_rig import Rig

Test = Callable[[Rig], Awaitable[None]]
ORDER = ["a Overwriting", "b Replacing", "a Suspended", "a Committed"]
Play = Callable[..., None]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a test with a PVM and both engines."""

    def run(test: Test, colo: bool = True, state: State = State.SYNCING) -> None:
        async def all_of_it() -> None:
            for host in "ab":
                (tmp_path / host).mkdir()
            rig = Rig(tmp_path, colo, state)
            try:
                await rig.up()
                await test(rig)
            finally:
                await rig.down()

        asyncio.run(all_of_it())

    return run


def test_checkpoints_in_place(play: Play) -> None:
    """The SVM has the PVM's memory as of each standstill, in one domain; the PVM need not have been started paused."""

    async def test(rig: Rig) -> None:
        for memory in ("one", "two", "three"):
            await rig.checkpoint(memory)
            svm = rig.named("b", "web--incoming")
            assert svm is not None
            assert svm["memory"] == memory
        assert len(rig.xen["b"].domains()) == 1
        assert rig.runs("a")

    play(test)


def test_order_of_a_checkpoint(play: Play) -> None:
    """Nothing proves anything before the secondary clears, that is before the SVM is touched; the commit is told while
    the PVM stands still, so that nothing it sends later can be taken for older."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        seen: dict[str, tuple[bool, bool]] = {}

        def look(step: str) -> None:
            svm = rig.named("b", "web--incoming")
            assert svm is not None
            seen[step] = (rig.runs("a"), svm["suspended"])

        rig.on_step = look
        rig.steps.clear()
        await rig.checkpoint("two")
        assert [step for step in rig.steps if step in ORDER][:4] == ORDER
        assert not seen["a Overwriting"][1], "the SVM was suspended already"
        assert not seen["b Replacing"][1], "the SVM was suspended already"
        assert not seen["a Suspended"][0], "the PVM ran"
        assert not seen["a Committed"][0], "the PVM ran"

    play(test)


def test_the_first_copy(play: Play) -> None:
    """Frames for the SVM wait from the PVM's standstill until the SVM runs, and its translations are cleared before."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        await rig.until(lambda: "release tapA" in rig.steps, "what waits to go on")
        steps = [step for step in rig.steps if step in ("hold tapA", "release tapA", "b Replacing", "a Committed")]
        assert sorted(steps[:2]) == ["b Replacing", "hold tapA"]
        assert sorted(steps[2:]) == ["a Committed", "release tapA"]

    play(test)


def test_libxl_begins_one_by_itself(play: Play) -> None:
    """After 5 s: the same order as for one that was asked for."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        rig.steps.clear()
        rig.remember("two")
        await rig.until(lambda: "a Committed" in rig.steps, "libxl's own checkpoint")
        assert [step for step in rig.steps if step in ORDER][:4] == ORDER
        events = [event for host, event in rig.events if isinstance(event, Overwriting | Suspended)]
        assert events[-2:] == [Overwriting(requested=False), Suspended(requested=False)]
        await rig.until(lambda: rig.runs("b"), "the SVM to run")
        svm = rig.named("b", "web--incoming")
        assert svm is not None
        assert svm["memory"] == "two"

    play(test)


def test_failover(play: Play) -> None:
    """A cut of the stream alone makes nobody the guest; the engine's word does."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        rig.deaf = {"a", "b"}
        rig.kill("a", "")  # the host loses its power
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        await asyncio.sleep(0.3)
        assert rig.named("b", "web") is None, "libxl has taken over without a word of ours"
        assert rig.runs("b")
        rig.state["b"] = State.LOCKSTEP
        await rig.secondary.failover()
        guest = rig.named("b", "web")
        assert guest is not None
        assert guest["memory"] == "one"
        assert not guest["suspended"]
        assert not guest["paused"]
        assert ("b", DomainGone) not in [(host, type(event)) for host, event in rig.events]

    play(test)


def test_failover_while_the_primary_lives(play: Play) -> None:
    """The stream ends, and the primary's xl lets its guest go on: the dataplane keeps that one silent."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        rig.state["a"] = State.HALTED
        await rig.secondary.failover()
        assert rig.named("b", "web") is not None
        await rig.until(lambda: not rig.processes("a"), "the primary's xl to end")
        assert rig.runs("a")
        await rig.until(lambda: rig.events[-1] == ("a", Ready()), "Ready, for the next protection")

    play(test)


def test_failover_in_the_middle_of_a_checkpoint(play: Play) -> None:
    """The primary dies when the SVM is suspended already: it goes on with what it had."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        hold = rig.xen["a"].home / "hold.suspend"
        hold.touch()
        rig.remember("two")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: "b Replacing" in rig.steps[-4:] and not rig.runs("b"), "the SVM to be suspended")
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        await rig.secondary.failover()
        guest = rig.named("b", "web")
        assert guest is not None
        assert guest["memory"] == "one"
        assert not guest["suspended"]

    play(test)


def test_no_svm_no_failover(play: Play) -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(EngineError, match="there is no SVM"):
            await rig.secondary.failover()

    play(test)


def test_the_secondarys_xl_dies(play: Play) -> None:
    """Both sides are told; the PVM goes on, and can be protected again."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        (rig.xen["b"].home / "fail.apply").touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(event, SecondaryGone) for _, event in rig.events), "SecondaryGone")
        await rig.until(lambda: any(isinstance(event, DomainGone) for _, event in rig.events), "DomainGone")
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")
        (rig.xen["b"].home / "fail.apply").unlink()
        rig.set_state(State.PASSTHROUGH)
        await rig.until(lambda: not rig.processes("ab"), "the end of all processes")
        rig.set_state(State.SYNCING)
        await rig.checkpoint("two")

    play(test)


def test_the_primarys_xl_dies(play: Play) -> None:
    """Killed in the middle of a checkpoint, it leaves the PVM suspended: the engine lets it go on."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        hold = rig.xen["a"].home / "hold.suspend"
        hold.touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: not rig.runs("a"), "the PVM to stand still")
        rig.kill("a", "remus")
        await rig.until(lambda: any(isinstance(event, SecondaryGone) for _, event in rig.events), "SecondaryGone")
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")
        assert rig.named("b", "web") is None, "a second guest"

    play(test)


def test_the_guest_is_destroyed(play: Play) -> None:
    """libxl's documented way to force a failover: this host's guest is gone, and the other one may speak."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        rig.xen["a"].destroy(rig.domid)
        await rig.until(lambda: any(isinstance(event, DomainGone) for host, event in rig.events if host == "a"), "it")
        assert not any(isinstance(event, SecondaryGone) for _, event in rig.events)

    play(test)


def test_end_of_the_protection(play: Play) -> None:
    """No SVM, no process, and a guest that runs; and another protection after it."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        rig.set_state(State.UNPROTECTED)
        await rig.until(lambda: not rig.processes("ab") and not rig.xen["b"].domains(), "the end")
        assert rig.runs("a")
        await rig.until(lambda: rig.events[-1] == ("a", Ready()), "Ready")
        rig.set_state(State.SYNCING)
        await rig.checkpoint("two")

    play(test)


@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("colo", [True, False])
def test_a_service_ends_and_another_begins(play: Play, host: str, colo: bool) -> None:
    """The stream outlives it, and what waited for the one before goes on with the next."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one") if colo else await protect(rig, "one")
        if host == "a":
            await rig.primary.stop()
        else:
            await rig.secondary.stop()
        await asyncio.sleep(0.3)
        if host == "a":
            rig.primary = rig.make_primary()
            await rig.primary.start()
            await rig.until(lambda: rig.events[-1] == ("a", Ready()), "Ready") if colo else None
        else:
            rig.secondary = rig.make_secondary()
            await rig.secondary.start()
            rig.secondary.peer_up()
        await rig.checkpoint("two") if colo else await protect(rig, "two")
        assert not any(isinstance(event, SecondaryGone | Failed | DomainGone) for _, event in rig.events), rig.events

    play(test, colo)


def test_a_checkpoint_waits_for_the_next_service(play: Play) -> None:
    """libxl begins one by itself while the primary's service is away: the SVM is not touched before the next is there."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        await rig.primary.stop()
        await rig.until(lambda: not rig.runs("a"), "libxl to begin one")
        await asyncio.sleep(0.5)
        assert rig.runs("b"), "the SVM was touched"
        rig.steps.clear()
        rig.primary = rig.make_primary()
        await rig.primary.start()
        await rig.until(lambda: "a Committed" in rig.steps, "a commit")
        assert [step for step in rig.steps if step in ORDER][:4] == ORDER
        await rig.until(lambda: rig.runs("a") and rig.runs("b"), "both to run")

    play(test)


def test_an_unfit_guest(play: Play) -> None:
    """It is refused with what is wrong, before anything was begun."""

    async def test(rig: Rig) -> None:
        config = rig.xen["a"].read(rig.domid)["config"]
        config["c_info"]["type"] = "pvh"
        rig.xen["a"].write(rig.domid, config=config)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(event, Failed) for _, event in rig.events), "Failed")
        [failed] = [event for _, event in rig.events if isinstance(event, Failed)]
        assert failed.fatal
        assert "not HVM" in failed.reason
        assert not rig.processes("a")

    play(test)


def test_a_secondary_that_does_not_tell_what_its_vm_wrote(play: Play) -> None:
    """As libxenguest 4.17 does, unmended: the SVM would stay what it is, with each checkpoint more of a mixture."""

    async def test(rig: Rig) -> None:
        (rig.xen["b"].home / "blind").touch()
        await rig.checkpoint("one")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(event, Failed) for _, event in rig.events), "Failed")
        [failed] = [event for _, event in rig.events if isinstance(event, Failed)]
        assert failed.fatal
        assert "libxenguest does not tell" in failed.reason
        await rig.until(lambda: not rig.processes("a") and rig.runs("a"), "the PVM to go on alone")

    play(test)


@pytest.mark.parametrize(("host", "said"), [("a", "no sch_plug"), ("b", "the other host: no sch_plug")])
def test_a_host_that_lacks_something(play: Play, host: str, said: str) -> None:
    """Whoever says `protect` hears it on the primary, of either host; when it is mended it can be said again."""

    async def test(rig: Rig) -> None:
        rig.lacks[host] = "no sch_plug"
        rig.set_state(State.SYNCING)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: any(isinstance(event, Failed) for _, event in rig.events), "Failed")
        assert next(event for _, event in rig.events if isinstance(event, Failed)) == Failed(said, fatal=True)
        assert not rig.processes("a")
        rig.set_state(State.UNPROTECTED)
        rig.lacks[host] = ""
        rig.set_state(State.SYNCING)
        await rig.checkpoint("one")

    play(test, state=State.UNPROTECTED)


# ---- Remus -------------------------------------------------------------------------------------------------------------


async def protect(rig: Rig, memory: str) -> None:
    """Until the secondary has that."""
    rig.remember(memory)
    if not rig.processes("a"):
        await rig.primary.request_checkpoint()

    def there() -> bool:
        svm = rig.named("b", "web--incoming")
        return svm is not None and svm["memory"] == memory

    await rig.until(there, f"the secondary to have {memory!r}")
    seen = rig.steps.count("a Committed")
    await rig.until(lambda: rig.steps.count("a Committed") > seen, "a commit")


def test_remus_commits_what_is_whole(play: Play) -> None:
    """Each Suspended is followed by the Committed of the same checkpoint, when the secondary has all of it."""

    async def test(rig: Rig) -> None:
        for memory in ("one", "two"):
            await protect(rig, memory)
        steps = [step for step in rig.steps if step in ("a Suspended", "a Committed", "whole")]
        for number, step in enumerate(steps):
            assert step == ("a Suspended", "whole", "a Committed")[number % 3], steps

    play(test, colo=False)


def test_remus_stands_still_before_it_is_told(play: Play) -> None:
    """libxl lets the PVM go on when it has written a checkpoint: not before what was sent so far is marked as older."""

    async def test(rig: Rig) -> None:
        ran: list[bool] = []

        def look(step: str) -> None:
            if step == "a Suspended":
                ran.append(rig.runs("a"))

        rig.on_step = look
        await protect(rig, "one")
        await protect(rig, "two")
        assert ran
        assert not any(ran)

    play(test, colo=False)


def test_remus_waits_for_the_secondarys_word(play: Play) -> None:
    """Without it nothing is committed, and no further checkpoint begins: a later commit would be of both."""

    async def test(rig: Rig) -> None:
        await protect(rig, "one")
        rig.deaf = {"a"}
        rig.steps.clear()
        await rig.until(lambda: "a Suspended" in rig.steps, "another checkpoint")
        await asyncio.sleep(0.5)
        assert "a Committed" not in rig.steps
        assert rig.steps.count("a Suspended") == 1
        rig.deaf = set()
        rig.secondary.peer_up()
        await rig.until(lambda: "a Committed" in rig.steps, "the commit")

    play(test, colo=False)


def test_remus_failover(play: Play) -> None:
    """The SVM begins to run as of the last checkpoint."""

    async def test(rig: Rig) -> None:
        await protect(rig, "one")
        assert not rig.runs("b"), "Remus runs no SVM"
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        await rig.secondary.failover()
        guest = rig.named("b", "web")
        assert guest is not None
        assert guest["memory"] == "one"
        assert not guest["paused"]
        assert ("b", Replacing()) not in rig.events
        assert ("a", Committed()) in rig.events

    play(test, colo=False)


def test_remus_a_checkpoint_that_is_over_before_it_is_told(play: Play) -> None:
    """A small one fits into xl's pipe, so the PVM runs again already: what it sends then is not in this checkpoint.

    The commit that lets it leave must be of one that has it, seen by a failover in that moment.
    """

    async def test(rig: Rig) -> None:
        await protect(rig, "one")
        ran: list[bool] = []

        def step(what: str) -> None:
            if what == "a Suspended" and not ran and rig.runs("a"):
                ran.append(True)
                rig.remember("two")  # and the client was sent something that rests on it, held as of this checkpoint
            elif what == "a Committed" and ran and not rig.deaf:
                rig.deaf = {"a", "b"}
                rig.kill("a", "")

        rig.on_step = step
        (rig.xen["a"].home / "small").touch()
        await rig.until(lambda: bool(rig.deaf), "a commit after the PVM went on too early")
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        await rig.secondary.failover()
        guest = rig.named("b", "web")
        assert guest is not None
        assert guest["memory"] == "two"

    play(test, colo=False)


def test_remus_small_checkpoints_only(play: Play) -> None:
    """Output leaves by them too: by the one behind."""

    async def test(rig: Rig) -> None:
        (rig.xen["a"].home / "small").touch()
        await protect(rig, "one")
        rig.steps.clear()
        await rig.until(lambda: rig.steps.count("a Committed") > 2, "commits")
        steps = [step for step in rig.steps if step in ("a Suspended", "a Committed")]
        assert all(one != other for one, other in itertools.pairwise(steps)), steps

    play(test, colo=False)


def test_remus_failover_before_xl_has_read_what_was_committed(play: Play) -> None:
    """All of the last checkpoint is here, as was told; the end of the stream must not come before xl has read it."""

    async def test(rig: Rig) -> None:
        await protect(rig, "one")
        stands, hold = rig.xen["a"].home / "hold.suspend", rig.xen["b"].home / "hold.apply"
        hold.touch()
        rig.steps.clear()
        await rig.until(lambda: rig.steps.count("a Committed") > 2, "the secondary's xl to read no more")
        stands.touch()
        await rig.until(lambda: not rig.runs("a"), "the PVM to stand still")
        memory = "two" * 500_000  # more than a socket's receiver takes, and less than its sender does
        rig.remember(memory)
        rig.steps.clear()
        stands.unlink()
        await rig.until(lambda: "a Committed" in rig.steps, "a commit of what xl has not read")
        rig.deaf = {"a", "b"}
        rig.kill("a", "")
        await rig.until(lambda: rig.secondary.relay is not None and bool(rig.secondary.relay.cut), "the cut")
        failover = asyncio.create_task(rig.secondary.failover())
        await asyncio.sleep(0.5)
        assert not failover.done()
        hold.unlink()
        await failover
        guest = rig.named("b", "web")
        assert guest is not None
        assert guest["memory"] == memory

    play(test, colo=False)


def test_a_service_comes_in_the_middle_of_the_first_checkpoint(play: Play) -> None:
    """libxl unpauses the PVM behind it, which must be paused for that, though this service has not seen it yet."""

    async def test(rig: Rig) -> None:
        hold = rig.xen["a"].home / "hold.suspend"
        hold.touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: not rig.runs("a"), "the PVM to stand still")
        await rig.primary.stop()
        hold.unlink()
        await rig.until(lambda: rig.named("b", "web--incoming") is not None, "the SVM")
        await asyncio.sleep(0.3)  # for the secondary's READY, which is kept back on the primary
        rig.primary = rig.make_primary()
        await rig.primary.start()
        await rig.until(lambda: rig.runs("a") and rig.runs("b"), "both to run")
        await rig.until(lambda: rig.primary.pvm.domid is not None, "the guest to be found")
        await rig.checkpoint("two")
        assert not any(isinstance(event, SecondaryGone | Failed) for _, event in rig.events), rig.events

    play(test)


def test_xl_ends_before_the_svm_runs(play: Play) -> None:
    """What was kept for the SVM is not kept for ever."""

    async def test(rig: Rig) -> None:
        (rig.xen["b"].home / "hold.apply").touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: "hold tapA" in rig.steps, "frames to be kept")
        rig.kill("b", "migrate-receive")
        await rig.until(lambda: "release tapA" in rig.steps, "it to end")

    play(test)


def test_the_svm_crashes(play: Play) -> None:
    """Seen on Xen: its domain stays, and neither xl nor the stream says a word."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        [svm] = rig.xen["b"].domains()
        rig.xen["b"].write(svm.domid, ended=True)
        await rig.until(lambda: any(isinstance(event, SecondaryGone) for _, event in rig.events), "SecondaryGone")
        [gone] = [event for _, event in rig.events if isinstance(event, SecondaryGone)]
        assert gone.reason == "the SVM has crashed, or was shut down"
        await rig.until(lambda: rig.runs("a"), "the PVM to go on")

    play(test)


@pytest.mark.parametrize("end", ["xl is killed", "xl is killed, and the service is another", "the SVM has crashed"])
def test_the_stream_ends_before_libxl_has_unpaused_the_pvm(play: Play, end: str) -> None:
    """Lock-step has begun, so the guest runs, whatever becomes of the stream."""

    async def test(rig: Rig) -> None:
        hold = rig.xen["a"].home / "hold.unpause"
        hold.touch()
        await rig.primary.request_checkpoint()
        await rig.until(lambda: "a Committed" in rig.steps, "a commit")
        if "another" in end:
            await asyncio.sleep(0.3)  # for the relay to pass the secondary's READY on
            await rig.primary.stop()
            rig.primary = rig.make_primary()
            await rig.primary.start()
            await rig.until(lambda: rig.primary.pvm.domid is not None, "the guest to be found")
        assert not rig.runs("a")
        if "crashed" in end:
            await rig.until(lambda: rig.runs("b"), "the SVM to run")
            [svm] = rig.xen["b"].domains()
            rig.xen["b"].write(svm.domid, ended=True)
        else:
            rig.kill("a", "remus")
        await rig.until(lambda: not rig.processes("a"), "the end of xl")
        hold.unlink()
        await rig.until(lambda: rig.runs("a"), "the PVM to run")
        assert any(isinstance(event, SecondaryGone) for _, event in rig.events)

    play(test)


@pytest.mark.parametrize("again", [False, True], ids=["ended", "ended and begun again"])
def test_a_protection_that_ends_while_it_is_asked_what_became_of_the_guest(play: Play, again: bool) -> None:
    """xl has died, and libxl takes its time to say that the guest lives: what it says is about nothing any more."""

    async def test(rig: Rig) -> None:
        await rig.checkpoint("one")
        asked, answer = asyncio.Event(), asyncio.Event()
        lives = rig.primary.pvm.lives

        async def slowly() -> bool:
            asked.set()
            await answer.wait()
            return await lives()

        rig.primary.pvm.lives = slowly  # type: ignore[method-assign]
        rig.deaf = {"a", "b"}
        rig.kill("a", "remus")
        async with asyncio.timeout(SOON_S):
            await asked.wait()
        seen = len(rig.events)
        rig.set_state(State.UNPROTECTED)
        await rig.until(lambda: ("a", Ready()) in rig.events[seen:], "Ready")
        if again:
            rig.deaf = set()
            await rig.until(lambda: not rig.xen["b"].domains(), "the SVM's end")
            rig.set_state(State.SYNCING)
            await rig.checkpoint("two")
        answer.set()
        await asyncio.sleep(0.5)
        assert not [event for host, event in rig.events[seen:] if host == "a" and isinstance(event, SecondaryGone)]

    play(test)
