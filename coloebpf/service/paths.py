"""The paths on which two hosts hear each other, and which of them are alive."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from coloebpf.model import Role

NEVER_NS = -(1 << 62)  # before any moment of the clock


@dataclass(frozen=True)
class Watch:
    """A pair to watch. `fwds`: NIC's number -> (forward device, VLAN id or 0). `leased`: as the pair's arbiter is."""

    pair: int
    role: Role
    fwds: Mapping[int, tuple[str, int]]
    leased: bool


@dataclass(frozen=True)
class Paths:
    """Which paths are alive."""

    mgmt: bool
    fwd: Mapping[int, bool] = field(default_factory=dict)  # pair -> at least one of its NICs' forward links

    @property
    def lost(self) -> frozenset[int]:
        """Pairs of which neither path is."""
        return frozenset(pair for pair, alive in self.fwd.items() if not alive and not self.mgmt)


def verdict(now_ns: int, last_mgmt_ns: int, last_fwd_ns: Mapping[int, int], timeout_ns: int) -> Paths:
    """A path is alive if something was heard on it in the last `timeout_ns`; `last_fwd_ns` by pair."""
    since = now_ns - timeout_ns
    return Paths(last_mgmt_ns > since, {pair: last > since for pair, last in last_fwd_ns.items()})
