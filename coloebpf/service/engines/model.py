"""The engine for tests: it copies nothing, and can be told to be slow, to fail, to hang and to die.

Whoever tests plays the guests, and lets the SVM go on after a commit as a copy of the PVM would.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    Emit,
    EngineEvent,
    Failed,
    Ready,
    SecondaryGone,
    Suspended,
)

COMMANDS = "fail, hang, go, die, lose_secondary, lose_domain, delay, show"
LINE_BYTES = 4096  # of a command on the socket


class Step(StrEnum):
    """Where in a checkpoint something goes wrong."""

    REQUEST = "request"  # the PVM has not been suspended yet
    SUSPENDED = "suspended"  # it has, and the secondary's copy is not whole


class ModelEngine:
    """See coloebpf.service.engine.Engine. `commit_delay_s`: from Suspended to Committed; `socket`: for commands().

    With `signals_suspended` False it tells Suspended and Committed together, as libxl's bare endpoint does.
    """

    name = "model"
    hands_over = ""

    def __init__(
        self,
        emit: Emit,
        commit_delay_s: float,
        socket: Path | None = None,
        *,
        signals_suspended: bool = True,
        copies: bool = True,
    ) -> None:
        self.signals_suspended, self.copies = signals_suspended, copies
        self.commit_delay_s = commit_delay_s
        self.requests = self.commits = 0
        self.failed_over = False
        self._emit, self._path = emit, socket
        self._failures: dict[Step, int] = dict.fromkeys(Step, 0)
        self._open: dict[Step, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None
        self._server: asyncio.Server | None = None
        self._dead = ""  # why, if it is
        self._running = False

    async def start(self) -> None:
        """Ready at once. Raises EngineError if the socket can't be made."""
        self._open = {step: asyncio.Event() for step in Step}
        for gate in self._open.values():
            gate.set()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            try:
                self._server = await asyncio.start_unix_server(self._serve, self._path, limit=LINE_BYTES)
            except OSError as e:
                raise EngineError(f"the model engine can't listen at {self._path}: {e.strerror}") from e
            self._path.chmod(0o600)
        self._running = True
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Suspended and Committed follow, if nothing else was told. Raises EngineError while one is under way."""
        self._check()
        if self._task is not None and not self._task.done():
            raise EngineError("a checkpoint is under way")
        self.requests += 1
        self._task = asyncio.create_task(self._checkpoint())

    async def failover(self) -> None:
        """Notes it; Ready follows, another SVM could be made. Raises EngineError if it is dead."""
        self._check()
        self._cancel()
        self.failed_over = True
        asyncio.get_running_loop().call_soon(self._tell, Ready())

    async def stop(self) -> None:
        """Tells nothing any more."""
        self._running = False
        self._cancel()
        if self._server is not None and self._path is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)

    # ---- what a test may tell it -----------------------------------------------------------------------------------

    def fail(self, at: Step = Step.SUSPENDED, times: int = 1) -> None:
        """The next `times` checkpoints fail at that step."""
        self._failures[at] = times

    def hang(self, at: Step = Step.SUSPENDED) -> None:
        """Checkpoints stop at that step until go()."""
        self._open[at].clear()

    def go(self) -> None:
        """What hangs goes on."""
        for gate in self._open.values():
            gate.set()

    def die(self, reason: str = "told to die") -> None:
        """A checkpoint under way never ends, and nothing can be asked any more."""
        self._cancel()
        self._dead = reason
        self._tell(Failed(reason, fatal=True))

    def lose_secondary(self, reason: str = "told so") -> None:
        """The SVM is gone."""
        self._cancel()
        self._tell(SecondaryGone(reason))

    def lose_domain(self, reason: str = "told so") -> None:
        """This host's own guest is gone."""
        self._cancel()
        self._tell(DomainGone(reason))

    def command(self, text: str | bytes) -> dict[str, Any]:
        """One command of the socket, a JSON object with "do" and what that needs; the answer has "ok" or "error"."""
        try:
            asked = json.loads(text)
            match asked:
                case {"do": "fail"}:
                    self.fail(Step(asked.get("at", Step.SUSPENDED)), int(asked.get("times", 1)))
                case {"do": "hang"}:
                    self.hang(Step(asked.get("at", Step.SUSPENDED)))
                case {"do": "go"}:
                    self.go()
                case {"do": "die"}:
                    self.die()
                case {"do": "lose_secondary"}:
                    self.lose_secondary()
                case {"do": "lose_domain"}:
                    self.lose_domain()
                case {"do": "delay", "ms": int(delay)} if delay >= 0:
                    self.commit_delay_s = delay / 1000
                case {"do": "show"}:
                    pass
                case _:
                    return {
                        "ok": False,
                        "error": "no such command: fail, hang, go, die, lose_secondary, lose_domain, delay, show",
                    }
        except (ValueError, TypeError) as e:
            return {"ok": False, "error": str(e)}
        return {"ok": True, "requests": self.requests, "commits": self.commits, "failed_over": self.failed_over}

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        if self._dead or not self._running:
            raise EngineError(f"the model engine {'died: ' + self._dead if self._dead else 'does not run'}")

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    def _tell(self, event: EngineEvent) -> None:
        if self._running:
            self._emit(event)

    async def _checkpoint(self) -> None:
        await self._open[Step.REQUEST].wait()
        if self._fails(Step.REQUEST):
            return
        if self.signals_suspended:
            self._tell(Suspended())
        await asyncio.sleep(self.commit_delay_s)
        await self._open[Step.SUSPENDED].wait()
        if self._fails(Step.SUSPENDED):
            return
        self.commits += 1
        if not self.signals_suspended:
            self._tell(Suspended())
        # The next request may come out of the handler of this event.
        self._task = None
        self._tell(Committed())

    def _fails(self, step: Step) -> bool:
        if not self._failures[step]:
            return False
        self._failures[step] -= 1
        self._task = None
        self._tell(Failed(f"told to fail at {step}"))
        return True

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):  # the client went away; a line was too long
            while line := await reader.readline():
                writer.write(json.dumps(self.command(line)).encode() + b"\n")
                await writer.drain()
        writer.close()
