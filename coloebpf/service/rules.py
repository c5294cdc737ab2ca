"""When to ask for a checkpoint: pure functions over what is known of a pair at one moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from coloebpf.model import State

MS = 1_000_000  # ns

Mode = Literal["lockstep", "periodic"]
# Why a checkpoint is asked for; labels of metrics.
TRIGGERS = ("divergence", "timeout", "high_water", "interval", "periodic", "operator", "initial")


class PairTimes(Protocol):
    """The keys of a pair's configuration that the rules need (coloebpf.service.config.PairConfig has them), in ms."""

    @property
    def interval_min_ms(self) -> int: ...
    @property
    def interval_max_ms(self) -> int: ...
    @property
    def commit_timeout_ms(self) -> int: ...
    @property
    def storm_count(self) -> int: ...
    @property
    def storm_window_ms(self) -> int: ...
    @property
    def periodic_interval_ms(self) -> int: ...
    @property
    def calm_ms(self) -> int: ...


@dataclass(frozen=True)
class Timings:
    """A pair's limits, in ns."""

    interval_min_ns: int = 20 * MS  # between a commit (or a failed request) and the next request
    interval_max_ns: int = 4_000 * MS  # between a commit and the next request: below libxl's own 5 s
    commit_timeout_ns: int = 10_000 * MS  # a request that took longer is given up
    storm_count: int = 20  # requests for a cause in one window: the pair goes to periodic mode
    storm_window_ns: int = 2_000 * MS
    periodic_interval_ns: int = 100 * MS  # between a commit and the next request in periodic mode
    calm_ns: int = 10_000 * MS  # without a cause: back to lock-step mode

    @classmethod
    def of(cls, pair: PairTimes) -> Timings:
        """Those of a pair's configuration."""
        return cls(
            interval_min_ns=pair.interval_min_ms * MS,
            interval_max_ns=pair.interval_max_ms * MS,
            commit_timeout_ns=pair.commit_timeout_ms * MS,
            storm_count=pair.storm_count,
            storm_window_ns=pair.storm_window_ms * MS,
            periodic_interval_ns=pair.periodic_interval_ms * MS,
            calm_ns=pair.calm_ms * MS,
        )


@dataclass(frozen=True)
class PairView:
    """What is known of a pair on its primary. All times: CLOCK_MONOTONIC, ns; 0: never."""

    now_ns: int
    state: State
    timings: Timings = Timings()
    pending_request_ns: int = 0  # a request is under way since then
    last_commit_ns: int = 0
    last_request_ns: int = 0
    divergences: tuple[str, ...] = ()  # reasons, since the last commit
    late_packets: int = 0  # flows with a packet unproven for longer than compare_timeout, since the last commit
    high_water: bool = False  # slab, a flow's list, or the table of flows is nearly full, since the last commit
    operator: bool = False  # somebody asked for one
    failed: str = ""  # trigger of the request that failed, "" since the next commit
    mode: Mode = "lockstep"
    since_mode_ns: int = 0
    recent_requests_ns: tuple[int, ...] = ()  # those with a cause of the traffic's: divergence, timeout, high water
    last_cause_ns: int = 0  # when the traffic gave a cause for the last time, asked for or not


@dataclass(frozen=True)
class Wish:
    """A checkpoint is wanted. `trigger`: one of TRIGGERS; `reason`: for the log."""

    trigger: str
    reason: str


@dataclass(frozen=True)
class Decision:
    """What follows from a view.

    `not_before_ns`: when to look again, if nothing else happens by then; 0: no need. `mode_reason`: why `mode` is
    another than the view's, "" if it isn't. `overdue`: the request under way is to be given up.
    """

    request: Wish | None
    mode: Mode
    not_before_ns: int
    mode_reason: str = ""
    overdue: bool = False


def rule_initial(view: PairView) -> Wish | None:
    """There is no SVM yet, or it is none to rely on."""
    return Wish("initial", "the secondary has no copy yet")


def rule_again(view: PairView) -> Wish | None:
    """The checkpoint before failed after the SVM was touched: everything is held until one commits."""
    return Wish(view.failed or "initial", "the last one did not commit")


def rule_operator(view: PairView) -> Wish | None:
    """Somebody asked for it."""
    return Wish("operator", "asked for by an operator") if view.operator else None


def rule_divergence(view: PairView) -> Wish | None:
    """The VMs' output differs: what differs is held until the SVM is a copy again."""
    if not view.divergences or view.mode == "periodic":
        return None
    kinds = ", ".join(sorted(set(view.divergences)))
    return Wish("divergence", f"{len(view.divergences)} flows differ ({kinds})")


def rule_timeout(view: PairView) -> Wish | None:
    """Output waits for its twin for longer than it may."""
    if not view.late_packets or view.mode == "periodic":
        return None
    return Wish("timeout", f"{view.late_packets} flows wait for the other VM for too long")


def rule_high_water(view: PairView) -> Wish | None:
    """There is soon no room to hold more. In periodic mode too: what finds no room is refused."""
    return Wish("high_water", "the room for held packets is running out") if view.high_water else None


def rule_interval(view: PairView) -> Wish | None:
    """The longest time between two checkpoints: none has too much to copy, and libxl's own clock never strikes."""
    if view.now_ns - view.last_commit_ns < view.timings.interval_max_ns:
        return None
    return Wish("interval", f"{view.timings.interval_max_ns // MS} ms since the last one")


def rule_periodic(view: PairView) -> Wish | None:
    """In periodic mode checkpoints come by the clock, as Remus has them."""
    if view.mode != "periodic" or view.now_ns - view.last_commit_ns < view.timings.periodic_interval_ns:
        return None
    return Wish("periodic", f"{view.timings.periodic_interval_ns // MS} ms since the last one, in periodic mode")


RULES: dict[State, tuple[Callable[[PairView], Wish | None], ...]] = {
    State.SYNCING: (rule_initial,),
    State.LOCKSTEP: (
        rule_operator, rule_divergence, rule_high_water, rule_timeout, rule_periodic, rule_interval,
    ),  # the first one names the checkpoint
    State.CHECKPOINTING: (rule_again,),
}  # fmt: skip


def mode_of(view: PairView) -> tuple[Mode, str]:
    """Lock-step or periodic mode, and why it changes ("": it doesn't).

    A storm is `storm_count` requests with a cause inside one window, all since the mode began. Only a whole `calm_ns`
    without a cause leads back, so the mode can't flap faster than that.
    """
    times = view.timings
    if view.mode == "lockstep":
        since = max(view.now_ns - times.storm_window_ns, view.since_mode_ns)
        count = sum(1 for at in view.recent_requests_ns if at >= since)
        if count >= times.storm_count:
            return "periodic", f"{count} requests within {times.storm_window_ns // MS} ms"
    elif view.now_ns - max(view.last_cause_ns, view.since_mode_ns) >= times.calm_ns:
        return "lockstep", f"no cause for a checkpoint in {times.calm_ns // MS} ms"
    return view.mode, ""


def decide(view: PairView) -> Decision:
    """What to do now. One request is under way at most; the next one keeps the least distance to the last commit."""
    if view.state not in RULES:
        return Decision(None, view.mode, 0)
    mode, why = mode_of(view)
    if mode != view.mode:
        view = replace(view, mode=mode)
    times = view.timings
    if view.pending_request_ns and view.state is State.SYNCING:
        return Decision(None, mode, 0, why)  # the first copy takes what it takes: nothing is held meanwhile
    if view.pending_request_ns:
        end = view.pending_request_ns + times.commit_timeout_ns
        return Decision(None, mode, end, why, overdue=view.now_ns >= end)
    wish = next(filter(None, (rule(view) for rule in RULES[view.state])), None)
    if wish is None:
        longest = times.periodic_interval_ns if mode == "periodic" else times.interval_max_ns
        return Decision(None, mode, view.last_commit_ns + longest, why)
    # An engine that fails at once is asked no faster than in periodic mode.
    least = max(times.interval_min_ns, times.periodic_interval_ns) if view.failed else times.interval_min_ns
    earliest = max(view.last_commit_ns, view.last_request_ns) + least
    if (view.last_commit_ns or view.last_request_ns) and view.now_ns < earliest:
        return Decision(None, mode, earliest, why)
    return Decision(wish, mode, 0, why)
