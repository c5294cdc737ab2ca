"""What an engine is: it makes the SVM a copy of the PVM when asked, and tells how far it is (docs/design.md)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from coloebpf.service.disks import Usage


@dataclass(frozen=True)
class Ready:
    """The engine can be asked for checkpoints now; on the primary the first one makes the SVM."""


@dataclass(frozen=True)
class Overwriting:
    """On the primary: the SVM is about to be touched, and its output proves nothing from here on. The PVM may run."""

    requested: bool = True


@dataclass(frozen=True)
class Suspended:
    """The PVM stands still: what it sent before belongs to this checkpoint, and the old SVM proves nothing any more.

    `requested` False: the engine began it by itself, so the secondary could not prepare for it.
    """

    requested: bool = True


@dataclass(frozen=True)
class Committed:
    """The secondary has the whole state as of the last Suspended."""


@dataclass(frozen=True)
class Failed:
    """The checkpoint did not come about. `fatal`: nor will another, the engine has come to its end."""

    reason: str
    fatal: bool = False


@dataclass(frozen=True)
class SecondaryGone:
    """On the primary: the PVM lives, or reboots, and has no SVM that could go on for it."""

    reason: str


@dataclass(frozen=True)
class DomainGone:
    """This host's own guest is gone: destroyed, crashed, shut down."""

    reason: str


@dataclass(frozen=True)
class Replacing:
    """On the secondary: the SVM's vif is exchanged with the pair's next epoch, which should begin now.

    If the pair is in no state for it the epoch stays, and the engine goes back.
    """


EngineEvent = Ready | Overwriting | Suspended | Committed | Failed | SecondaryGone | DomainGone | Replacing
Emit = Callable[[EngineEvent], None]


class Engine(Protocol):
    """One guest's engine on one host. It calls the `emit` of its constructor on the event loop, in the order of events.

    An engine with `signals_suspended` False tells Suspended and Committed together, when the checkpoint is whole: it
    needs the careful order (the secondary clears its translations before the engine is asked). With `copies` False the
    SVM stays what it is, for tests with guests that nothing can copy: its TCP numbers go on being translated.

    `hands_over` says why an operator can't make the SVM the guest while the PVM lives, and what to do instead; "" if
    that can be done.
    """

    name: str
    signals_suspended: bool
    copies: bool
    hands_over: str

    async def start(self) -> None:
        """Ready follows when it can be asked. Raises EngineError if it can't be started."""

    async def request_checkpoint(self) -> None:
        """Asks for one; the caller waits for Committed or Failed. Raises EngineError if it can't be asked."""

    async def failover(self) -> None:
        """Primary: gives up the secondary. Secondary: makes the SVM the guest. Raises EngineError if it can't."""

    async def stop(self) -> None:
        """Lets go of everything that is this engine's; the guest goes on. Tells nothing afterwards."""


@runtime_checkable
class Inquiring(Protocol):
    """An engine that hears nothing of its guest before it is ready, and can ask."""

    async def guest_lives(self) -> bool:
        """Whether this host's own guest is still there. Raises EngineError if nobody can say."""


@runtime_checkable
class Showing(Protocol):
    """An engine whose checkpoints may take long enough for somebody to ask."""

    @property
    def progress(self) -> str:
        """How far the one under way is; "" if none is."""


@runtime_checkable
class Storing(Protocol):
    """An engine whose guest may have a replicated disk."""

    def disk_usage(self) -> Usage | None:
        """How it is with it on this host; None: there is none."""


Say = Callable[[str, int, str], object]  # a word, a number, more words: to the other host's engine, if there is a link


@runtime_checkable
class Talking(Protocol):
    """An engine that talks to the other host's; what it says is nobody else's business."""

    def heard(self, word: str, number: int, detail: str) -> None:
        """The other one has said something; in the order in which it did."""

    def peer_up(self) -> None:
        """There is a link again; what was said before may be lost."""
