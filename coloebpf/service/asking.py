"""How a primary asks for a checkpoint: in the order that the engine needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coloebpf.errors import PairError
from coloebpf.service.engine import Engine
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
    """Of one pair. `stop_proving`: from then on the dataplane takes the SVM's output for no proof; raises PairError."""

    def __init__(
        self, number: int, engine: Engine, send: Callable[[Message], bool], stop_proving: Callable[[], None]
    ) -> None:
        self._number, self._engine = number, engine
        self._send, self._stop_proving = send, stop_proving
        self._prepared = Reply()

    async def ask(self, request: int) -> None:
        """Raises EngineError or PairError; what was begun by then leads on to the next checkpoint."""
        if not self._engine.signals_suspended:
            await self._prepare(request)
        await self._engine.request_checkpoint()

    async def _prepare(self, request: int) -> None:
        """The careful order: first nothing proves anything any more, then the secondary forgets its translations."""
        self._stop_proving()
        self._prepared.expect(request)
        self._send(Prepare(self._number, request))
        if not await self._prepared.within(PREPARE_S):
            raise PairError(f"the secondary has not prepared in {PREPARE_S:g} s")

    def prepared(self, request: int) -> None:
        """The secondary's answer to a request."""
        self._prepared.came(request)
