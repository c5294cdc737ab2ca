"""When to ask for a checkpoint: pure functions over what is known of a pair at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from coloebpf.model import State

MS = 1_000_000  # ns

Mode = Literal["lockstep", "periodic"]
# Why a checkpoint is asked for; labels of metrics. "retry": the one before failed after the SVM was touched.
TRIGGERS = ("divergence", "timeout", "high_water", "interval", "periodic", "operator", "initial", "retry")


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
