"""What a primary remembers for its rules, and for those who ask how its checkpoints went."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

from coloebpf.model import State
from coloebpf.service.comparer import Finding
from coloebpf.service.rules import Mode, PairView, Timings, Wish
from coloebpf.service.status import Durations

CAUSES = ("divergence", "timeout", "high_water")  # what the traffic asks for, and a storm is made of
NS_PER_S = 1_000_000_000
MAX_TOLD = 100  # divergences that a reason names


@dataclass(frozen=True)
class Done:
    """A checkpoint that committed. Times: CLOCK_MONOTONIC, ns."""

    wish: Wish
    requested_ns: int
    committed_ns: int
    released: int = 0  # packets that left by it


@dataclass
class Pending:
    """A checkpoint that was asked for. `number`: of the request, for the secondary's answer.

    `held_ns`: since when output may be held because of it; the first copy holds nothing before the PVM stands still.
    """

    number: int
    wish: Wish
    since_ns: int
    held_ns: int


@dataclass
class Ledger:
    """All that `PairView` is made of, kept up to date by events. `commits`: by trigger."""

    times: Timings
    mode: Mode = "lockstep"
    mode_reason: str = ""
    since_mode_ns: int = 0
    pending: Pending | None = None
    last: Done | None = None
    failed: str = ""
    failures: int = 0
    commits: dict[str, int] = field(default_factory=dict)
    durations: Durations = field(default_factory=Durations)
    _last_request_ns: int = 0
    _last_commit_ns: int = 0
    _last_cause_ns: int = 0
    _number: int = 0
    _divergences: list[str] = field(default_factory=list)
    _late: int = 0
    _high_water: bool = False
    _operator: bool = False
    _recent: deque[int] = field(default_factory=deque)
    _waiting: list[asyncio.Future[None]] = field(default_factory=list)

    def begin(self, now_ns: int) -> None:
        """Nothing is known of before: as after a commit now."""
        self._last_commit_ns = self.since_mode_ns = now_ns

    def found(self, finding: Finding, now_ns: int) -> None:
        """The traffic gives a cause."""
        self._last_cause_ns = now_ns
        if finding.kind == "high_water":
            self._high_water = True
        elif finding.kind == "timeout":
            self._late += 1
        elif len(self._divergences) < MAX_TOLD:
            self._divergences.append(finding.reason)

    def room_is_low(self) -> None:
        """The host's memory for held packets or flows is running out; another pair may be the cause."""
        self._high_water = True

    def asked(self) -> asyncio.Future[None]:
        """An operator wants one; done when one has committed."""
        self._operator = True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        return future

    def view(self, now_ns: int, state: State) -> PairView:
        """For the rules."""
        return PairView(
            now_ns=now_ns, state=state, timings=self.times,
            pending_request_ns=self.pending.held_ns if self.pending else 0,
            last_commit_ns=self._last_commit_ns, last_request_ns=self._last_request_ns,
            divergences=tuple(self._divergences), late_packets=self._late, high_water=self._high_water,
            operator=self._operator, failed=self.failed, mode=self.mode, since_mode_ns=self.since_mode_ns,
            recent_requests_ns=tuple(self._recent), last_cause_ns=self._last_cause_ns,
        )  # fmt: skip

    def change_mode(self, mode: Mode, reason: str, now_ns: int) -> None:
        self.mode, self.mode_reason, self.since_mode_ns = mode, reason, now_ns

    def requested(self, wish: Wish, now_ns: int) -> Pending:
        """A request goes out."""
        self._number += 1
        self.pending = Pending(self._number, wish, now_ns, now_ns)
        self._last_request_ns = now_ns
        if wish.trigger in CAUSES:
            self._recent.append(now_ns)
            while len(self._recent) > self.times.storm_count:
                self._recent.popleft()
        return self.pending

    def holds(self, now_ns: int) -> None:
        """The first copy begins to hold output."""
        if self.pending is not None:
            self.pending.held_ns = now_ns

    def unasked(self, now_ns: int) -> None:
        """The engine has begun one by itself."""
        if self.pending is None:
            self.pending = Pending(0, Wish("interval", "the engine's own"), now_ns, now_ns)

    def committed(self, now_ns: int, released: int = 0) -> Done:
        """It came about."""
        self.unasked(now_ns)  # else it was given up, and has come after all
        assert self.pending is not None
        pending = self.pending
        self.pending, self.failed = None, ""
        self._last_commit_ns = now_ns
        self._divergences, self._late, self._high_water, self._operator = [], 0, False, False
        self.commits[pending.wish.trigger] = self.commits.get(pending.wish.trigger, 0) + 1
        self.last = Done(pending.wish, pending.since_ns, now_ns, released)
        self.durations.observe((now_ns - pending.since_ns) / NS_PER_S)
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        self._waiting.clear()
        return self.last

    def gave_up(self, error: Exception) -> None:
        """It did not come about. The causes stay."""
        self.failed = self.pending.wish.trigger if self.pending else self.failed or "interval"
        self.pending, self._operator = None, False
        self.failures += 1
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)
        self._waiting.clear()
