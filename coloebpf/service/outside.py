"""What a pair's supervisor needs of the world: dataplane, link, heartbeats, arbiter, clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from coloebpf.control import PairState
from coloebpf.model import State
from coloebpf.service.arbiters.base import Arbiter
from coloebpf.service.config import PairConfig
from coloebpf.service.peer.messages import Message


class PairControl(Protocol):
    """The part of coloebpf.control.Control that a pair needs."""

    def state(self, pair: int) -> PairState: ...
    def set_state(self, pair: int, state: State) -> None: ...
    def deadline(self, pair: int) -> int: ...
    def set_deadline(self, pair: int, deadline_ns: int) -> None: ...
    def set_open_after(self, pair: int, ns: int) -> None: ...
    def suspend(self, pair: int) -> int: ...
    def commit(self, pair: int) -> int: ...
    def clear_translations(self, pair: int) -> int: ...
    def settle_translations(self, pair: int) -> None: ...
    def kick(self) -> int: ...


class PairAliases(Protocol):
    """The part of coloebpf.aliases.Aliases that a pair needs."""

    def keep(self) -> int: ...
    def texts(self) -> list[str]: ...
    def take(self, texts: Sequence[str], anew: bool) -> None: ...
    def end_idle(self) -> int: ...


class Witness(Protocol):
    """The part of coloebpf.service.heartbeat.Heartbeat that a pair needs."""

    def set_granting(self, pair: int, on: bool) -> None: ...
    def is_lost(self, pair: int) -> bool: ...
    async def wait_safe(self, pair: int) -> None: ...


@dataclass(frozen=True)
class Outside:
    """A supervisor's world. `send`: the link's, False without one. `announce`: tells the network where the guest is."""

    control: PairControl
    send: Callable[[Message], bool]
    witness: Witness
    arbiter: Arbiter
    clock: Callable[[], int]
    announce: Callable[[PairConfig], None]
    aliases: PairAliases
