"""The engine qemu when a QEMU, a service or a link dies in the middle: who goes on, and from where."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from asyncio.selector_events import BaseSelectorEventLoop
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    EngineEvent,
    Failed,
    Inquiring,
    Ready,
    SecondaryGone,
    Suspended,
)
from coloebpf.service.engines import qemu_checkpoints, qmp
from coloebpf.service.engines.qemu_filling import Filling
from coloebpf.service.engines.qemu_mirror import Mirrors
from coloebpf.service.engines.qemu_pvm import Pvm
from coloebpf.service.engines.qmp import Qmp
from tests.service.qemu_rig import INDEX, Rig
from tests.service.test_qemu_engine import PATIENCE_S, Test, disk, patience, play

__all__ = ["disk", "patience", "play"]  # fixtures

pytestmark = [pytest.mark.vm, pytest.mark.real_time]

Play = Callable[[Test], None]


def kinds(rig: Rig, host: str, since: int) -> list[type[EngineEvent]]:
    return [type(event) for _, where, event in rig.heard[since:] if where == host]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def held(rig: Rig) -> bool:
    """The next copy waits for somebody to ask for it."""
    copy = rig.primary.copy
    return copy is not None and copy.filling is not None and copy.filling.held and not copy.stood


async def protected(rig: Rig) -> None:
    """A first commit, and the next copy ready."""
    await rig.checkpoint()
    await rig.until(lambda: held(rig), "the next copy")


async def goes_on(rig: Rig) -> None:
    """The PVM runs, and another checkpoint comes about."""
    await rig.pvm_runs()
    await rig.until(lambda: held(rig), "the next copy")
    await rig.checkpoint()
    svm = rig.secondary.svm
    assert svm is not None
    await rig.until(lambda: rig.svm_ticks() > 3, "the SVM to run")
    assert rig.vifs.now == rig.vifs.vif == INDEX[("tapA", "tapB")[svm.slot]]


def standby_pid(rig: Rig) -> int:
    assert rig.secondary.standby is not None
    return rig.secondary.standby.vm.pid


def svm_pid(rig: Rig) -> int:
    assert rig.secondary.svm is not None
    return rig.secondary.svm.pid


def test_a_standby_that_dies_while_it_is_filled_is_replaced(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        before, old = len(rig.heard), standby_pid(rig)
        kill(old)
        await rig.until(lambda: rig.secondary.standby is not None and standby_pid(rig) != old, "a new standby")
        await goes_on(rig)
        assert not any(isinstance(event, Failed) and event.fatal for _, _, event in rig.heard[before:])

    play(test)


def test_a_late_question_does_not_end_the_standby_that_is_filled(play: Play) -> None:
    """It was asked before this one was heard of. Nor does a second offer begin it anew."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        standby, copy, before = rig.secondary.standby, rig.primary.copy, len(rig.heard)
        assert standby is not None
        rig.secondary.heard("ask", standby.number - 1, "")
        rig.primary.heard("standby", standby.number, f"127.0.0.1 1 {standby.token}")
        await rig.primary.request_checkpoint()
        await rig.until(lambda: Committed in kinds(rig, "a", before), "the commit")
        assert kinds(rig, "a", before)[:2] == [Suspended, Committed]
        assert rig.secondary.svm is standby.vm
        await rig.until(lambda: rig.primary.copy is not copy and held(rig), "the next copy")
        following = rig.secondary.standby
        assert following is not None
        assert following.taken
        rig.secondary.heard("ask", following.number, "")
        assert rig.secondary.standby is None

    play(test)


@pytest.mark.parametrize("step", ["switch", "switched", "Suspended"])
def test_a_standby_that_dies_in_a_checkpoint_leaves_the_old_svm(play: Play, step: str) -> None:
    """What was switched comes back, with the epoch and so the old translations."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        svm, epoch, vif = svm_pid(rig), rig.vifs.word.epoch, rig.vifs.now
        before = len(rig.heard)
        rig.once(step, lambda: kill(standby_pid(rig)))
        await rig.primary.request_checkpoint()
        await rig.until(lambda: Failed in kinds(rig, "a", before), "the failure")
        assert Committed not in kinds(rig, "a", before)
        await rig.until(lambda: rig.vifs.word.epoch == epoch, "the way back")
        assert (svm_pid(rig), rig.vifs.now) == (svm, vif)
        assert await rig.status(rig.secondary.svm) == "running"
        await goes_on(rig)

    play(test)


def test_without_its_svm_the_primary_is_told(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        kill(svm_pid(rig))
        await rig.until(lambda: SecondaryGone in kinds(rig, "a", before), "the primary to hear")
        assert DomainGone in kinds(rig, "b", before)
        await rig.primary.failover()
        await rig.pvm_runs()

    play(test)


@pytest.mark.parametrize("step", ["switch", "switched", "Suspended", "whole"])
def test_the_pvm_dies_in_a_checkpoint(play: Play, step: str) -> None:
    """The secondary takes over with the standby if that is whole, else with the SVM that ran; never with half a one."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        old, before = svm_pid(rig), len(rig.heard)
        rig.once(step, lambda: kill(rig.pvm_pid))
        await rig.primary.request_checkpoint()
        await rig.until(lambda: DomainGone in kinds(rig, "a", before), "the primary to notice")
        await rig.secondary.failover()
        svm = rig.secondary.svm
        assert svm is not None
        whole = any(word.startswith("a whole") for word in rig.said[-4:])
        assert (svm.pid != old) == whole
        assert whole or step != "whole"
        assert rig.vifs.now == INDEX[("tapA", "tapB")[svm.slot]]
        assert await rig.status(svm) == "running"
        ticks = rig.svm_ticks()
        await rig.until(lambda: rig.svm_ticks() > ticks, "the guest to go on")

    play(test)


def ends_by_itself(rig: Rig) -> None:
    """The copy under way, soon: nothing holds it any more."""
    assert rig.primary.copy is not None
    assert rig.primary.copy.relay is not None
    rig.primary.copy.relay.open(0)


def test_a_copy_that_ends_by_itself_is_a_checkpoint(play: Play) -> None:
    """Nobody has asked; it counts from the PVM's standstill all the same."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        ends_by_itself(rig)
        await rig.until(lambda: Committed in kinds(rig, "a", before), "the commit")
        told = [event for _, host, event in rig.heard[before:] if host == "a"]
        assert told[:2] == [Suspended(requested=False), Committed()]
        await goes_on(rig)

    play(test)


def test_a_copy_that_ends_by_itself_behind_a_gate_that_is_shut_is_let_through(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU answers nothing before it has written the rest, and a checkpoint was asked for that waits for its answer."""
    prepare = Filling.prepare

    async def test(rig: Rig) -> None:
        await protected(rig)
        copy, before = rig.primary.copy, len(rig.heard)

        async def late(filling: Filling) -> None:
            assert copy is not None
            assert copy.relay is not None
            while not copy.stood:
                copy.relay.open(0, 16 << 10)
                await asyncio.sleep(0.002)
            await prepare(filling)

        monkeypatch.setattr(Filling, "prepare", late)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool({Failed, Committed} & set(kinds(rig, "a", before))), "an end")
        assert kinds(rig, "a", before)[:2] == [Suspended, Committed]

    play(test)


def test_a_command_that_fails_while_a_copy_is_filled_ends_that_copy_alone(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has asked for a checkpoint gets it from the next one."""
    look, tries = Filling.look, 0

    async def first_fails(filling: Filling, wanted: bool) -> float:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise EngineError("no answer")
        return await look(filling, wanted)

    async def test(rig: Rig) -> None:
        await protected(rig)
        copy, before = rig.primary.copy, len(rig.heard)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: rig.primary.copy is not copy, "its end")
        monkeypatch.setattr(Filling, "look", first_fails)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: tries > 1 and len(kinds(rig, "a", before)) >= 4, "another end")
        assert kinds(rig, "a", before)[:4] == [Suspended, Committed, Suspended, Committed]

    play(test)


def test_a_copy_that_ends_by_itself_may_be_the_svm_before_its_switch(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`switch` comes last of all: there is nothing to switch any more, and the standby is not lost."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        before, said = len(rig.heard), len(rig.said)
        heard = rig.secondary.heard

        def late(word: str, number: int, detail: str) -> None:
            if word == "switch":
                asyncio.get_running_loop().call_later(0.5, heard, word, number, detail)
            else:
                heard(word, number, detail)

        monkeypatch.setattr(rig.secondary, "heard", late)
        ends_by_itself(rig)
        await rig.until(lambda: len(kinds(rig, "a", before)) >= 2, "the commit")
        told = [event for _, host, event in rig.heard[before:] if host == "a"]
        assert told[:2] == [Suspended(requested=False), Committed()]
        assert not any(word.startswith("a lost") for word in rig.said[said:])
        monkeypatch.setattr(rig.secondary, "heard", heard)
        await goes_on(rig)

    play(test)


def test_a_copy_that_ends_by_itself_and_fails_is_told(play: Play) -> None:
    """Whoever has heard that the PVM stands still holds its output until an end of that."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        rig.follows = False
        ends_by_itself(rig)
        await rig.until(lambda: Failed in kinds(rig, "a", before), "the failure")
        assert kinds(rig, "a", before)[:2] == [Suspended, Failed]
        await rig.pvm_runs()

    play(test)


@pytest.mark.parametrize("who", ["standby", "svm"])
def test_a_qemu_that_hangs_holds_up_nobody_for_long(play: Play, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """A standby that loads nothing fails the checkpoint; the PVM need not wait for that."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        monkeypatch.setattr(qemu_checkpoints, "WHOLE_S", 1.0 if who == "standby" else PATIENCE_S)
        before, pid = len(rig.heard), standby_pid(rig) if who == "standby" else svm_pid(rig)
        os.kill(pid, signal.SIGSTOP)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool({Failed, Committed} & set(kinds(rig, "a", before))), "an end")
        assert kinds(rig, "a", before)[-1] is (Failed if who == "standby" else Committed)
        await rig.pvm_runs()
        monkeypatch.setattr(qemu_checkpoints, "WHOLE_S", PATIENCE_S)
        await goes_on(rig)

    play(test)


def test_a_pvm_that_hangs_fails_the_checkpoint(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        monkeypatch.setattr(qmp, "TIMEOUT_S", 1.0)
        monkeypatch.setattr(qemu_checkpoints, "UNDO_S", 1.0)
        os.kill(rig.pvm_pid, signal.SIGSTOP)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: Failed in kinds(rig, "a", before), "the failure")
        os.kill(rig.pvm_pid, signal.SIGCONT)
        assert Committed not in kinds(rig, "a", before)
        monkeypatch.setattr(qmp, "TIMEOUT_S", PATIENCE_S)
        await goes_on(rig)

    play(test)


def test_a_pvm_that_was_not_let_go_on_is_tried_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    cont, tries = Pvm.cont, 0

    async def fails_twice(pvm: Pvm) -> None:
        """In the checkpoint, and when that is undone."""
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise EngineError("no answer")
        await cont(pvm)

    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        monkeypatch.setattr(Pvm, "cont", fails_twice)
        rig.once("Suspended", lambda: setattr(rig, "linked", False))  # no other copy lets it go on
        await rig.primary.request_checkpoint()
        await rig.until(lambda: Failed in kinds(rig, "a", before), "the failure")
        await rig.until(lambda: tries == 3, "another try")
        await rig.pvm_runs()

    play(test)


@pytest.mark.parametrize("step", ["switched", "Suspended", "whole"])
def test_a_primary_service_that_ends_in_a_checkpoint_leaves_a_running_pvm(play: Play, step: str) -> None:
    """As far as it is in its power; what is left standing the next service lets go on."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        ended: list[asyncio.Task[None]] = []
        rig.once(step, lambda: ended.append(asyncio.get_running_loop().create_task(rig.primary.stop())))
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool(ended) and ended[0].done(), "the engine to end")
        rig.primary = rig.make_primary()
        await rig.primary.start()
        rig.primary.peer_up()
        rig.secondary.peer_up()
        await rig.until(lambda: rig.primary.pvm is not None, "the PVM")
        await rig.pvm_runs()
        await rig.primary.request_checkpoint()
        before = len(rig.heard)
        await rig.until(lambda: Committed in kinds(rig, "a", before), "a commit")

    play(test)


def test_a_connection_to_the_pvm_that_came_to_nothing_is_not_in_the_way(
    play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU's monitor serves one client at a time."""
    adopt = Mirrors.adopt
    tries: list[Qmp] = []  # kept, so that none is closed by being forgotten

    async def first_fails(mirrors: Mirrors, qmp: Qmp) -> bool:
        tries.append(qmp)
        if len(tries) == 1:
            raise EngineError("no answer")
        return await adopt(mirrors, qmp)

    async def test(rig: Rig) -> None:
        await rig.primary.stop()
        monkeypatch.setattr(Mirrors, "adopt", first_fails)
        rig.primary = rig.make_primary()
        await rig.primary.start()
        await rig.until(lambda: rig.primary.pvm is not None, "the PVM")
        assert len(tries) == 2

    play(test)


def test_the_next_service_of_the_secondary_goes_on_with_the_svm(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        svm = svm_pid(rig)
        await rig.secondary.stop()
        rig.secondary = rig.make_secondary()
        await rig.secondary.start()
        rig.primary.peer_up()
        assert svm_pid(rig) == svm
        await goes_on(rig)
        assert len(rig.qemus()) <= 2

    play(test)


def test_a_service_of_the_secondary_that_ends_leaves_its_svm_alone(play: Play) -> None:
    """There may be no next one that would end the standby, or one that is just being started."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        old, svm = standby_pid(rig), svm_pid(rig)
        await rig.secondary.stop()
        assert rig.qemus() == [svm]
        rig.secondary = rig.make_secondary()
        await rig.secondary.start()
        starts = rig.dirs["b"] / "web" / f"{1 - rig.secondary.svm.slot if rig.secondary.svm else 0}.json"
        await rig.until(lambda: starts.exists() and str(old) not in starts.read_text(), "the start of a standby")
        await rig.secondary.stop()
        assert rig.qemus() == [svm]

    play(test)


def test_an_svm_that_does_not_take_over_at_once_is_told_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else has the guest. One that is gone is not waited for."""
    do, tries = Qmp.do, 0

    async def first_fail(qmp: Qmp, command: str, /, **arguments: object) -> Any:
        nonlocal tries
        if command == "cont":
            tries += 1
            if tries <= 2:
                raise EngineError("no answer")
        return await do(qmp, command, **arguments)

    async def test(rig: Rig) -> None:
        await protected(rig)
        kill(rig.pvm_pid)
        await rig.until(lambda: any(isinstance(e, DomainGone) for _, _, e in rig.heard), "the primary to notice")
        monkeypatch.setattr(Qmp, "do", first_fail)
        await rig.secondary.failover()
        assert tries == 3
        assert await rig.status(rig.secondary.svm) == "running"
        kill(svm_pid(rig))
        with pytest.raises(EngineError):
            await rig.secondary.failover()

    play(test)


def test_a_connection_that_can_not_be_taken_in_is_not_the_last_one(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, tries = BaseSelectorEventLoop.sock_accept, 0

    async def first_fails(loop: BaseSelectorEventLoop, listener: socket.socket) -> tuple[socket.socket, Any]:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return await accept(loop, listener)

    async def test(rig: Rig) -> None:
        await protected(rig)
        assert tries > 1

    monkeypatch.setattr(BaseSelectorEventLoop, "sock_accept", first_fails)
    play(test)


def test_a_service_that_comes_back_can_say_that_its_guest_is_gone(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        assert isinstance(rig.primary, Inquiring)
        assert await rig.primary.guest_lives()
        await rig.primary.stop()
        kill(rig.pvm_pid)
        rig.primary = rig.make_primary()
        await rig.primary.start()
        async with asyncio.timeout(PATIENCE_S):
            while await rig.primary.guest_lives():
                await asyncio.sleep(0.01)

    play(test)


def test_the_roles_change(play: Play) -> None:
    """After a failover the SVM is a PVM, wherever it was started, and the host that was the primary fills standbys."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        kill(rig.pvm_pid)
        await rig.until(lambda: any(isinstance(e, DomainGone) for _, _, e in rig.heard), "the primary to notice")
        await rig.secondary.failover()
        guest = svm_pid(rig)
        await rig.primary.stop()
        await rig.secondary.stop()
        rig.exchange()
        before = len(rig.heard)
        await rig.secondary.start()
        await rig.primary.start()
        await rig.until(lambda: rig.primary.pvm is not None, "the guest")
        await rig.checkpoint()
        await rig.until(lambda: rig.svm_ticks() > 3, "the SVM to run")
        assert kinds(rig, "a", before)[-1] is Committed
        assert Path(f"/proc/{guest}").exists()

    play(test)


def test_a_disk_that_is_not_replicated_is_refused(play: Play) -> None:
    async def test(rig: Rig) -> None:
        pvm: Any = rig.primary.pvm
        await pvm.do("blockdev-add", driver="null-co", node_name="data", size=1 << 20, read_only=False)
        await pvm.do("device_add", driver="virtio-blk-pci", id="disk", drive="data", bus="slot9")
        before = len(rig.heard)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: kinds(rig, "a", before) == [Failed, Ready], "the refusal")
        refused = rig.heard[before][2]
        assert isinstance(refused, Failed)
        assert refused.fatal
        assert "is not replicated" in refused.reason

    play(test)


def test_the_end_of_a_protection_ends_the_svm(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        rig.state = State.UNPROTECTED
        before = len(rig.heard)
        rig.vifs.end()
        await rig.until(lambda: not rig.qemus(), "the QEMUs of the secondary to end")
        await rig.pvm_runs()
        await rig.until(lambda: kinds(rig, "a", before) == [Ready], "the word that another can begin")

    play(test)
