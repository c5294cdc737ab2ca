"""What QEMU's block replication does when libxl drives it, and what engine libxl-colo adds; QEMU is the real one, Debian's."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.errors import DiskError
from coloebpf.model import State
from coloebpf.service import disk_notes
from coloebpf.service.disk_notes import Part
from tests.service.replicating import DOMID, OLD, PVM, SVM, Replication

pytestmark = [pytest.mark.vm, pytest.mark.real_time]

Test = Callable[[Replication], Awaitable[None]]
Play = Callable[[Test], None]
COMMIT_S = 60.0


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Runs a test with a pair of QEMUs that replicate."""

    def run(test: Test) -> None:
        async def all_of_it() -> None:
            pair = Replication(tmp_path)
            try:
                await pair.start()
                await test(pair)
            finally:
                pair.end()

        asyncio.run(all_of_it())

    return run


async def both_write(pair: Replication) -> None:
    """Since the last checkpoint; the SVM's view is its own."""
    await pair.a.write(0, PVM)
    await pair.b.write(1, SVM)


def test_the_overlays_between_two_checkpoints(play: Play) -> None:
    """They grow, a checkpoint empties them, and both images have the PVM's writes."""

    async def test(pair: Replication) -> None:
        before = pair.secondary.usage(True, State.LOCKSTEP)
        await both_write(pair)
        grown = pair.secondary.usage(True, State.LOCKSTEP)
        assert grown.active > before.active
        assert grown.hidden > before.hidden
        await pair.checkpoint()
        after = pair.secondary.usage(True, State.LOCKSTEP)
        assert after.active < grown.active
        assert after.hidden < grown.hidden
        assert await pair.primary.failure(DOMID) == ""
        for qemu in (pair.a, pair.b):
            await pair.quit(qemu)
        assert [(pair.image(host, 0), pair.image(host, 1)) for host in "ab"] == [(PVM, OLD)] * 2

    play(test)


def test_a_write_that_does_not_reach_the_secondary(play: Play) -> None:
    """QEMU swallows it, and takes checkpoints; libxl asks and does not look. The engine does."""

    async def test(pair: Replication) -> None:
        await pair.b.do("nbd-server-stop")
        await pair.a.write(0, PVM)
        await pair.a.do("xen-colo-do-checkpoint")
        assert "has not reached the other host's disk" in await pair.primary.failure(DOMID)
        assert pair.primary.errors == 1
        pair.a.end()
        assert "nobody can say" in await pair.primary.failure(DOMID)

    play(test)


def test_taking_over(play: Play) -> None:
    """The image becomes what the SVM has seen: without the PVM's later writes, with the SVM's own; and stays it."""

    async def test(pair: Replication) -> None:
        await both_write(pair)
        await pair.secondary.take_over(DOMID)
        await pair.a.write(2, PVM)  # a primary that does not know yet
        await pair.libxl_takes_over()
        async with asyncio.timeout(COMMIT_S):
            await pair.secondary.committed(DOMID)
        note = disk_notes.read(pair.secondary.disk)
        assert note is not None
        assert note.part is Part.COMMITTED
        await pair.b.write(3, SVM)
        await pair.quit(pair.b)
        assert [pair.image("b", block) for block in range(4)] == [OLD, SVM, OLD, SVM]
        pair.secondary.disk.prepare()

    play(test)


def test_taking_over_by_libxl_alone(play: Play) -> None:
    """The image has the PVM's writes, which the SVM's memory knows nothing of; its own are in the overlays. The commands
    that `which` names bring them together."""

    async def test(pair: Replication) -> None:
        await both_write(pair)
        await pair.libxl_takes_over()
        await pair.b.write(3, SVM)
        disk_notes.write(pair.secondary.disk, Part.TAKEN_OVER)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await pair.secondary.committed(DOMID)
        assert pair.secondary.usage(True, State.LOCKSTEP).uncommitted
        await pair.quit(pair.b)
        assert [pair.image("b", block) for block in (0, 1, 3)] == [PVM, OLD, OLD]
        for command in disk_notes.by_hand(pair.secondary.disk).splitlines():
            subprocess.run(command.split(), check=True, capture_output=True)
        assert [pair.image("b", block) for block in (0, 1, 3)] == [OLD, SVM, SVM]
        pair.secondary.disk.prepare()

    play(test)


def test_a_second_protection_by_the_same_qemu(play: Play) -> None:
    """libxl can't make its node again, takes the dead one, and nothing is replicated, nor is there an error."""

    async def test(pair: Replication) -> None:
        await pair.detach()
        assert "Duplicate" in await pair.attach()
        await pair.a.do("xen-set-replication", enable=True, primary=True)
        await pair.a.write(0, PVM)
        assert await pair.primary.failure(DOMID) == ""
        assert pair.image("b", 0) == OLD
        pair.primary.heard(f"- {pair.primary.disk.line()}")
        with pytest.raises(DiskError, match="has replicated its disk before"):
            await pair.primary.begin(DOMID, True, lambda: True)

    play(test)
