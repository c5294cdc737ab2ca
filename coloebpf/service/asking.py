"""How a primary asks for a checkpoint: in the order that the engine needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coloebpf.errors import PairError
from coloebpf.service.peer.messages import Message, Prepare

PREPARE_S = 1.0  # for the secondary's answer: one write into a map and a message, or its host is in trouble


class Reply:
    """An answer of the other side that somebody waits for."""

    def __init__(self) -> None:
        self._wanted: int | None = None
        self._event = asyncio.Event()

    def expect(self, wanted: int) -> None:
        """Call it before asking."""
        self._wanted = wanted
        self._event.clear()

    def came(self, what: int) -> bool:
        """True if it is the one that is waited for."""
        if what == self._wanted:
            self._event.set()
        return what == self._wanted

    async def within(self, seconds: float) -> bool:
        """False if it has not come by then; later it is none any more."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return False
        finally:
            self._wanted = None
        return True


class Asker:
    """Of one pair. It does everything at once, without a task in between: each turn of the event loop costs time.

    `stop_proving(then)`: from now on the dataplane takes the SVM's output for no proof; `then` is called as soon as
    that is so, before anybody is told; raises PairError. `go(request)`: asks the engine. `give_up(request, why)`: it
    did not come to that.
    """

    def __init__(
        self,
        number: int,
        send: Callable[[Message], bool],
        stop_proving: Callable[[Callable[[], object]], None],
        go: Callable[[int], object],
        give_up: Callable[[int, PairError], None],
    ) -> None:
        self._number, self._send, self._stop_proving = number, send, stop_proving
        self._go, self._give_up = go, give_up
        self._waiting: int | None = None
        self._timer: asyncio.TimerHandle | None = None

    def prepare(self, request: int) -> None:
        """The careful order: first nothing proves anything any more, then the secondary forgets its translations."""
        self.stop()
        try:
            self._stop_proving(lambda: self._send(Prepare(self._number, request)))
        except PairError as e:
            asyncio.get_running_loop().call_soon(self._give_up, request, e)  # the caller has not finished asking
            return
        self._waiting = request
        self._timer = asyncio.get_running_loop().call_later(PREPARE_S, self._late)

    def prepared(self, request: int) -> None:
        """The secondary's answer to a request."""
        if request == self._waiting:
            self._go(request)
            self.stop()

    def stop(self) -> None:
        """Waits for no answer any more."""
        self._waiting = None
        if self._timer is not None:
            self._timer.cancel()

    def _late(self) -> None:
        request = self._waiting
        self.stop()
        if request is not None:
            self._give_up(request, PairError(f"the secondary has not prepared in {PREPARE_S:g} s"))
