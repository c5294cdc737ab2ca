"""One copy of the PVM's memory on its way into a standby: fast at first, then held a moment before its end.

A live migration ends by itself when nothing is left to send, and stops the PVM for that. So the relay's gate is shut
when little is left. What the PVM writes meanwhile is found only by another look at its dirty pages, so that little is
refreshed from time to time, where that can be done: see looks_again().
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engines.qemu_relay import Relay
from coloebpf.service.engines.qmp import Qmp

MIB = 1 << 20
UNLIMITED = 1 << 40  # bytes per second: the relay says how fast
# downtime-limit. With the first, QEMU ends after its first pass; with the second it looks at the dirty pages again, and
# ends when less is left than passes in a millisecond; with the third, whatever is left.
ONE_PASS_MS, LEAST_MS, AT_ONCE_MS = 0, 1, 2_000_000
TCG_LOOKS = (9, 0)  # the first QEMU without KVM that can look twice
FD = "coloebpf"  # QEMU's name for its end of the relay
HELD_BYTES = 512 << 10  # shut when so little is left
ONE_PASS_HELD_BYTES = 3 * MIB  # in the first pass: before the firmware, which comes last and is no zeros
LEAST_BYTES = 16 << 10  # let pass between two looks
NEAR_BYTES = 8 * MIB  # look often from there on
READY_BYTES = 4 * MIB  # of the first pass: a copy that is asked for need not wait for less
NEAR_PACE, END_PACE = 64 * MIB, 16 * MIB  # bytes per second: a look takes 1 ms and comes each LOOK_S
FAR_LOOK_S, LOOK_S = 0.02, 0.004
SHARE = 8  # what is left is let pass in such parts: zeros take nearly no bytes, and a look may come late
BUSY_PASSES = 6  # a guest that writes faster than that is held with whatever is left
REFRESH_S = 1.0
RUNNING = ("setup", "active", "device", "pre-switchover")

CAPABILITIES = [{"capability": "events", "state": True}]


@dataclass(frozen=True)
class Progress:
    """`left`: bytes known to be left; `passes`: looks at the dirty pages so far."""

    status: str
    left: int
    passes: int


async def progress(qmp: Qmp) -> Progress:
    """Of the migration under way or the last one. Raises EngineError."""
    told: dict[str, Any] = await qmp.do("query-migrate")
    ram = told.get("ram", {})
    return Progress(told.get("status", "none"), ram.get("remaining", UNLIMITED), ram.get("dirty-sync-count", 0))


async def looks_again(qmp: Qmp) -> bool:
    """Whether QEMU can look at the dirty pages again while the guest runs. Raises EngineError.

    Without KVM, QEMU before 9.0 then misses some of the guest's later writes (mended by its commit 03bfc2188f), and the
    copy is not the guest. With one pass the only other look is made when the guest stands still.
    """
    if (await qmp.do("query-kvm"))["enabled"]:
        return True
    version = (await qmp.do("query-version"))["qemu"]
    return (version["major"], version["minor"]) >= TCG_LOOKS


class Filling:
    """`held`: nothing moves, and little is left."""

    def __init__(self, qmp: Qmp, relay: Relay, pace: int) -> None:
        self._qmp, self._relay, self._pace = qmp, relay, pace
        self._until = 2  # passes before it may be held: the first one takes long, so much is new after it
        self._now = Progress("none", UNLIMITED, 0)
        self._again = False  # it can be refreshed
        self.held = False

    async def begin(self) -> None:
        """Raises EngineError."""
        self._again = await looks_again(self._qmp)
        limit = LEAST_MS if self._again else ONE_PASS_MS
        await self._qmp.do("migrate-set-capabilities", capabilities=CAPABILITIES)
        await self._qmp.do("migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=limit, announce_rounds=0)
        await self._qmp.give(self._relay.near.fileno(), FD)
        self._relay.start()
        await self._qmp.do("migrate", uri=f"fd:{FD}")

    async def look(self, wanted: bool) -> float:
        """Goes on with it. Returns after how many seconds to look again. Raises EngineError if it has failed."""
        if self.held and not self._again:
            return REFRESH_S
        if self.held:
            self._until = self._now.passes + 1  # a refresh
            self.held = False
            self._relay.open(END_PACE, self._part)
            return LOOK_S
        self._now = now = await progress(self._qmp)
        if now.status not in RUNNING:
            if now.status == "completed":
                return LOOK_S  # by itself: the events tell
            raise EngineError(f"the copy to the secondary is {now.status}")
        if self._near_its_end:
            self._relay.shut()
            self.held = True
            return REFRESH_S
        if wanted:
            self._relay.open(0)
        else:
            near = min(self._pace, NEAR_PACE if now.left > 4 * HELD_BYTES else END_PACE)
            self._relay.open(self._pace if self._far else near, self._part)
        return FAR_LOOK_S if self._far else LOOK_S

    @property
    def _far(self) -> bool:
        return self._now.left > NEAR_BYTES and self._now.passes < 2

    @property
    def _near_its_end(self) -> bool:
        now = self._now
        if not self._again:
            return now.passes == 1 and now.left <= ONE_PASS_HELD_BYTES
        return now.passes >= self._until and (now.left <= HELD_BYTES or now.passes >= self._until + BUSY_PASSES)

    @property
    def _part(self) -> int:
        """Bytes. However late the next look comes, something is left then."""
        return max(self._now.left // SHARE, LEAST_BYTES)

    @property
    def ready(self) -> bool:
        """What is left can be moved while the PVM stands still."""
        return self.held or self._now.passes >= 2 or (self._now.passes == 1 and self._now.left <= READY_BYTES)

    async def prepare(self) -> None:
        """Whatever is left moves once the gate is open, and the PVM stands still for it. Raises EngineError."""
        self._relay.shut()  # not before
        await self._qmp.do("migrate-set-parameters", downtime_limit=AT_ONCE_MS)
