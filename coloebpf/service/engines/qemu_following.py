"""The secondary's steps of a checkpoint: client frames go to the standby, its state gets whole, and it is the SVM.

The order of both sides, and what becomes of whom when somebody dies in the middle of it: docs/qemu.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coloebpf.control import PairState
from coloebpf.errors import EngineError
from coloebpf.service.engine import Emit, Replacing, Say
from coloebpf.service.engines.qemu_disks import Disks
from coloebpf.service.engines.qemu_process import Process
from coloebpf.service.engines.qemu_replicas import Replicas, Standby
from coloebpf.service.engines.qemu_taps import Taps
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.tasks import Tasks


class Following:
    """Of one pair; `replicas` are its VMs."""

    def __init__(
        self,
        replicas: Replicas,
        vms: Vms,
        disks: Disks,
        taps: Taps,
        emit: Emit,
        tell: Say,
        state: Callable[[], PairState],
        tasks: Tasks,
    ) -> None:
        vms.on_event = self._event
        self._replicas, self._vms, self._disks, self._taps, self._emit, self._say_to, self._pair, self._tasks = (
            replicas, vms, disks, taps, emit, tell, state, tasks,
        )  # fmt: skip
        self._settled: int | None = None  # number of the standby that has become the SVM last

    def heard(self, word: str, number: int) -> None:
        """The primary says how far it is with the copy into the standby of that number."""
        standby = self._replicas.standby
        known = standby if standby is not None and standby.number == number else None
        match word:
            case "switch" if known:
                self._switch(known)
            case "switch" if number == self._settled:
                self._say_to("switched", number, "")  # the copy has ended by itself before anybody could say so
            case "switch":
                self._say_to("lost", number, "there is no such standby")
            case "cut" if known:
                self._tasks.spawn(self._cut(known))
            case "go" if self._replicas.paused:
                self._replicas.let_run()
            case "discard" if known:
                self._replicas.discard()

    def _switch(self, standby: Standby) -> None:
        """Client frames go to the standby from here on, in the PVM's numbers; they wait in its tap."""
        if self._on_trial(standby):
            self._say_to("switched", standby.number, "")

    def _on_trial(self, standby: Standby) -> bool:
        if not standby.trial and not self._try(standby):
            self._replicas.lost(standby, "the secondary follows no primary")
        return standby.trial

    def _try(self, standby: Standby) -> bool:
        before = self._pair().epoch
        self._taps.offer(standby.vm.slot)
        self._emit(Replacing())
        standby.trial = self._pair().epoch != before
        if not standby.trial:
            self._taps.withdraw()
        return standby.trial

    def _event(self, vm: Process, name: str, data: Mapping[str, Any]) -> None:
        standby = self._replicas.standby
        if standby is None or standby.vm is not vm or name != "MIGRATION":
            return
        if data.get("status") == "failed":
            self._replicas.lost(standby, "the standby could not load the state")
        elif data.get("status") == "completed" and self._on_trial(standby):  # it may have ended before we were told
            standby.loaded = True
            self._settle(standby)

    async def _cut(self, standby: Standby) -> None:
        """The PVM stands still, and does so until it hears of it: what it writes later is none of this copy's."""
        try:
            await self._disks.hold()
            await self._disks.cut()
        except EngineError as e:
            self._replicas.lost(standby, str(e))
            return
        standby.cut = True
        self._say_to("cut", standby.number, "")
        self._settle(standby)

    def _settle(self, standby: Standby) -> None:
        """Memory and disks are whole: there is no way back, and none is needed."""
        replicas, disks = self._replicas, bool(self._vms.config.disks)
        if replicas.standby is not standby or not standby.loaded or (disks and not standby.cut):
            return
        self._taps.settle()
        self._settled = standby.number
        replicas.replace(standby)
        if disks:
            self._tasks.spawn(self._merge())
        self._say_to("whole", standby.number, "")
        replicas.expect_go()

    async def _merge(self) -> None:
        await self._replicas.ended()  # the old SVM reads what would be merged
        self._disks.settle()
