"""Engine qemu on the secondary: the SVM runs, and a standby takes in the PVM's next state beside it.

Here: what the pair and the other host's engine see of it, and the beginning and the end of a protection.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Sequence

from coloebpf.control import PairState
from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import Emit, EngineEvent, Ready, Say
from coloebpf.service.engines.qemu_disks import Disks
from coloebpf.service.engines.qemu_following import Following
from coloebpf.service.engines.qemu_primary import TEND_S, WANTED
from coloebpf.service.engines.qemu_process import Process
from coloebpf.service.engines.qemu_replicas import Replicas, Standby
from coloebpf.service.engines.qemu_taps import Taps
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.engines.standby import Door
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks
from coloebpf.vifs import SvmVifs

RETRY_S = 1.0  # between two tries to start a standby, after one that failed

logger = logging.getLogger("coloebpf.qemu")


class QemuSecondary:
    """See coloebpf.service.engine.Engine. `nics`: their numbers, in the order of their taps; `state`: the pair's.

    `vifs`: which of its devices the SVM is behind.
    """

    name = "qemu"
    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        nics: Sequence[int],
        vms: Vms,
        vifs: SvmVifs,
        emit: Emit,
        tell: Say,
        state: Callable[[], PairState],
        index: Callable[[str], int] = socket.if_nametoindex,
    ) -> None:
        self._vms, self._emit_to, self._say_to, self._pair = vms, emit, tell, state
        self._tasks = Tasks(lambda error: logger.error("a task of the engine failed", exc_info=error))
        self._disks, taps = Disks(vms.name, vms.config), Taps(nics, vms, vifs, index)
        self._replicas = Replicas(vms, self._disks, taps, self._emit, tell, state, self._tasks)
        self._following = Following(self._replicas, vms, self._disks, taps, self._emit, tell, state, self._tasks)
        self._door = Door(vms.name, vms.config.listen, self._replicas.awaited, self._replicas.take, vms.encryption)
        self._round = 0  # number of the disks' copies that were begun last; 0: none
        self._beginning: asyncio.Task[None] | None = None  # of those copies
        self._before: int | None = None  # number of the standby that was there when the link came up, until asked

    @property
    def svm(self) -> Process | None:
        return self._replicas.svm

    @property
    def standby(self) -> Standby | None:
        return self._replicas.standby

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready at once. Raises EngineError if it can't listen."""
        self._door.open()
        await self._replicas.adopt()
        self._tasks.spawn(self._tend())
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Raises EngineError: only the primary's can be asked."""
        raise EngineError("the primary makes the checkpoints")

    async def failover(self) -> None:
        """The SVM is the guest: the standby, if it has the whole state, else the one that runs. Raises EngineError."""
        await self._replicas.promote()
        self._round = 0
        await self._disks.end()

    async def stop(self) -> None:
        """See Engine. The SVM goes on; a standby ends with its copy, for there may be no next service."""
        self._replicas.stopped = True
        await self._door.close()
        await self._tasks.end()
        await self._replicas.stop()
        await self._disks.close()

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        match word:
            case "ask":
                # It was another service's, or its copy has broken. One that the primary had not heard of when it asked
                # was taken since: the memory's connection may overtake the link.
                over = (number, self._before)
                self._before = None
                standby = self.standby
                if standby is not None and standby.number in over and standby.taken and not standby.trial:
                    self._replicas.discard()
                self._replicas.offer()
            case "disks":
                self._copy_disks(number, json.loads(detail))
            case _:
                self._following.heard(word, number)

    def peer_up(self) -> None:
        """See Talking. The primary asks, and has given up what it had begun before."""
        self._before = self.standby.number if self.standby is not None else None

    # ---- a protection ----------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            state = self._pair().state
            pause = TEND_S
            if state is State.SYNCING:
                self._replicas.mine = False  # whoever was the guest here: another protection begins
            ready = self._disks.there or not self._vms.config.disks
            if state in WANTED and ready and not self._replicas.mine and self.standby is None:
                try:
                    await self._replicas.begin_standby()
                except EngineError as e:
                    say(logger, logging.WARNING, "there is no standby", pair=self._vms.name, error=e)
                    pause = RETRY_S
            elif state is State.UNPROTECTED:
                self._replicas.mine = False
                self._replicas.end()
                self._round = 0
                await self._disks.end()
            await asyncio.sleep(pause)

    def _copy_disks(self, number: int, sizes: list[int]) -> None:
        """A protection begins. The primary says so until it has heard the answer, which may be lost."""
        if self._pair().state is not State.SYNCING:
            return
        if number == self._round and self._beginning is not None and not self._beginning.done():
            return
        if number == self._round and self._disks.there:
            self._tell_export(number)
            return
        if self._beginning is not None:
            self._beginning.cancel()
        self._round = number
        self._beginning = self._tasks.spawn(self._begin_disks(number, sizes, self._beginning))

    async def _begin_disks(self, number: int, sizes: list[int], before: asyncio.Task[None] | None) -> None:
        """Empty copies, which nobody reads from before they are whole."""
        if before is not None:
            await asyncio.wait((before,))
        self._replicas.end()
        await self._replicas.ended()
        try:
            await self._disks.begin(sizes)
        except (EngineError, OSError) as e:
            say(logger, logging.ERROR, "there is no place for the guest's disks", pair=self._vms.name, error=e)
            self._say_to("nodisks", number, str(e))
            return
        self._tell_export(number)

    def _tell_export(self, number: int) -> None:
        listen = self._vms.config.disk_listen
        assert listen is not None
        self._say_to("exported", number, f"{listen.host} {listen.port}")

    def _emit(self, event: EngineEvent) -> None:
        if not self._replicas.stopped:
            self._emit_to(event)
