"""One copy of the PVM's memory on its way into a standby: fast at first, then held a moment before its end.

A live migration ends by itself when nothing is left to send, and stops the PVM for that. So the relay's gate is shut
when little is left. What the PVM writes meanwhile is found only by the next look at its dirty pages, so that little is
refreshed from time to time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engines.qemu_relay import Relay
from coloebpf.service.engines.qmp import Qmp

MIB = 1 << 20
UNLIMITED = 1 << 40  # bytes per second: the relay says how fast
NEVER_MS, AT_ONCE_MS = 0, 2_000_000  # downtime-limit: only when nothing is left; whatever is left
FD = "coloebpf"  # QEMU's name for its end of the relay
HELD_BYTES = 512 << 10  # shut when so little is left
LEAST_BYTES = 16 << 10  # let pass between two looks
NEAR_BYTES = 8 * MIB  # look often from there on
READY_BYTES = 4 * MIB  # of the first pass: a copy that is asked for need not wait for less
NEAR_PACE, END_PACE = 64 * MIB, 16 * MIB  # bytes per second: a look takes 1 ms and comes each LOOK_S
FAR_LOOK_S, LOOK_S = 0.02, 0.004
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


class Filling:
    """`held`: nothing moves, and little is left."""

    def __init__(self, qmp: Qmp, relay: Relay, pace: int) -> None:
        self._qmp, self._relay, self._pace = qmp, relay, pace
        self._until = 2  # passes before it may be held: the first one takes long, so much is new after it
        self._now = Progress("none", UNLIMITED, 0)
        self.held = False

    async def begin(self) -> None:
        """Raises EngineError."""
        await self._qmp.do("migrate-set-capabilities", capabilities=CAPABILITIES)
        await self._qmp.do(
            "migrate-set-parameters", max_bandwidth=UNLIMITED, downtime_limit=NEVER_MS, announce_rounds=0
        )
        await self._qmp.give(self._relay.near.fileno(), FD)
        self._relay.start()
        await self._qmp.do("migrate", uri=f"fd:{FD}")

    async def look(self, wanted: bool) -> float:
        """Goes on with it. Returns after how many seconds to look again. Raises EngineError if it has failed."""
        if self.held:
            self._until = self._now.passes + 1  # a refresh
            self.held = False
            self._relay.open(END_PACE, self._half)
            return LOOK_S
        self._now = now = await progress(self._qmp)
        if now.status not in RUNNING:
            if now.status == "completed":
                return LOOK_S  # by itself: the events tell
            raise EngineError(f"the copy to the secondary is {now.status}")
        if now.passes >= self._until and (now.left <= HELD_BYTES or now.passes >= self._until + BUSY_PASSES):
            self._relay.shut()
            self.held = True
            return REFRESH_S
        if now.left > NEAR_BYTES and now.passes < 2:
            self._relay.open(0 if wanted else self._pace)
            return FAR_LOOK_S
        # However late the next look comes, something is left then.
        pace = min(self._pace, NEAR_PACE if now.left > 4 * HELD_BYTES else END_PACE)
        self._relay.open(0 if wanted else pace, self._half)
        return LOOK_S

    @property
    def _half(self) -> int:
        return max(self._now.left // 2, LEAST_BYTES)

    @property
    def ready(self) -> bool:
        """What is left can be moved while the PVM stands still."""
        return self.held or self._now.passes >= 2 or (self._now.passes == 1 and self._now.left <= READY_BYTES)

    async def prepare(self) -> None:
        """Whatever is left moves once the gate is open, and the PVM stands still for it. Raises EngineError."""
        self._relay.shut()  # not before
        await self._qmp.do("migrate-set-parameters", downtime_limit=AT_ONCE_MS)
