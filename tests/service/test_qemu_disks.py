"""The engine qemu with a guest that writes to its disk, and complains if it does not read what its memory says."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from coloebpf.errors import EngineError
from coloebpf.service.engine import Committed, DomainGone, Failed
from coloebpf.service.engines.qemu_disks import Disks
from tests.service.qemu_rig import Rig
from tests.service.test_qemu_engine import patience, play
from tests.service.test_qemu_failures import Play, goes_on, kill, kinds, protected, standby_pid, svm_pid

__all__ = ["patience", "play"]  # fixtures

pytestmark = [pytest.mark.vm, pytest.mark.real_time]


@pytest.fixture
def disk() -> bool:
    return True


async def ticks_on(rig: Rig, more: int = 8) -> None:
    """The SVM counts, writes and reads; svm_ticks() looks for what it has to complain of."""
    await rig.until(lambda: rig.svm_ticks() > 0, "the SVM to run")
    begin = rig.svm_ticks()
    await rig.until(lambda: rig.svm_ticks() > begin + more, "the SVM to write and read")


def test_the_svm_has_the_disk_that_its_memory_expects(play: Play) -> None:
    """Through some checkpoints, and after a failover; the layers are merged behind them."""

    async def test(rig: Rig) -> None:
        for _ in range(4):
            await protected(rig)
            await ticks_on(rig)
        await rig.until(lambda: len(list((rig.dirs["b"] / "data").glob("layer?.qcow2"))) <= 4, "layers to be merged")
        kill(rig.pvm_pid)
        await rig.until(lambda: any(isinstance(e, DomainGone) for _, _, e in rig.heard), "the primary to notice")
        await rig.secondary.failover()
        await ticks_on(rig, 16)

    play(test)


@pytest.mark.parametrize("step", ["switched", "cut", "whole"])
def test_the_pvm_dies_in_a_checkpoint(play: Play, step: str) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        rig.once(step, lambda: kill(rig.pvm_pid))
        await rig.primary.request_checkpoint()
        await rig.until(lambda: DomainGone in kinds(rig, "a", before), "the primary to notice")
        await asyncio.sleep(0.1)
        await rig.secondary.failover()
        await ticks_on(rig, 16)

    play(test)


@pytest.mark.parametrize("step", ["switched", "Suspended", "cut"])
def test_a_standby_dies_in_a_checkpoint(play: Play, step: str) -> None:
    """The old SVM goes on with its own disk, whatever layers there are by then."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        svm, before = svm_pid(rig), len(rig.heard)
        rig.once(step, lambda: kill(standby_pid(rig)))
        await rig.primary.request_checkpoint()
        await rig.until(lambda: bool({Failed, Committed} & set(kinds(rig, "a", before))), "an end")
        assert kinds(rig, "a", before)[-1] is Failed
        assert svm_pid(rig) == svm
        await ticks_on(rig)
        await goes_on(rig)
        await ticks_on(rig)

    play(test)


def test_a_copy_that_breaks_ends_the_protection(play: Play) -> None:
    """The daemon that takes the writes dies, or hangs with the whole host: the guest's own disk goes on."""

    async def test(rig: Rig) -> None:
        await protected(rig)
        before = len(rig.heard)
        [daemon] = [pid for pid in rig.qemus() if b"storage" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill(daemon, signal.SIGKILL)
        await rig.until(lambda: Failed in kinds(rig, "a", before), "the failure")
        failed = next(event for _, _, event in rig.heard[before:] if isinstance(event, Failed))
        assert failed.fatal
        await rig.primary.failover()
        await rig.pvm_runs()
        ticks = rig.pvm_ticks()
        await rig.until(lambda: rig.pvm_ticks() > ticks + 20, "the PVM to go on")

    play(test)


def test_the_next_services_go_on(play: Play) -> None:
    async def test(rig: Rig) -> None:
        await protected(rig)
        await rig.primary.stop()
        await rig.secondary.stop()
        rig.primary, rig.secondary = rig.make_primary(), rig.make_secondary()
        before = len(rig.heard)
        await rig.secondary.start()
        await rig.primary.start()
        await rig.until(lambda: rig.primary.pvm is not None, "the PVM")
        await rig.checkpoint()
        await ticks_on(rig)
        assert Failed not in kinds(rig, "a", before)

    play(test)


def test_a_lost_answer_is_given_again_and_one_of_another_round_is_not_heard(play: Play) -> None:
    """Copies that were begun are not begun anew under the first ones."""

    async def test(rig: Rig) -> None:
        rig.lost.add("exported")
        record = rig.dirs["b"] / "web" / "disks.json"
        await rig.primary.request_checkpoint()
        await rig.until(lambda: "exported" not in rig.lost, "the first copies")
        daemon = record.read_text()
        rig.primary.heard("exported", 0, "127.0.0.1 1")
        rig.primary.heard("nodisks", 0, "none of this round")
        await rig.until(lambda: Committed in kinds(rig, "a", 0), "the commit")
        rounds = {word for word in rig.said if word.startswith("b disks")}
        assert len(rounds) == 1
        assert record.read_text() == daemon
        assert Failed not in kinds(rig, "a", 0)

    play(test)


def test_a_lost_refusal_is_given_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, tries = Disks.begin, 0

    async def first_fail(disks: Disks, sizes: Sequence[int]) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2:
            raise EngineError("no room")
        await begin(disks, sizes)

    async def test(rig: Rig) -> None:
        rig.lost.add("nodisks")
        monkeypatch.setattr(Disks, "begin", first_fail)
        await rig.primary.request_checkpoint()
        await rig.until(lambda: Failed in kinds(rig, "a", 0), "the refusal")
        assert tries == 2
        failed = next(event for _, _, event in rig.heard if isinstance(event, Failed))
        assert (failed.reason, failed.fatal) == ("no room", True)

    play(test)
