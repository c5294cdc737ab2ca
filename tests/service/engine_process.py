"""The part of a service that holds libxl's connection, as a process of its own that tests can kill.

    python -m tests.service.engine_process PORT STATE_FILE

Commands on stdin: `ask`, `stop`. One line an event on stdout, and one before and after each request. STATE_FILE plays
the dataplane's pinned state: "asked" is written before a request and removed after Committed, as the pair's Supervisor
does it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from coloebpf.errors import EngineError
from coloebpf.model import Role
from coloebpf.service.engine import Committed, EngineEvent
from coloebpf.service.engines.libxl_colo import LibxlColoEngine, kept_name
from coloebpf.service.fdstore import Notifier, taken_back

PAIR = "web"


async def alive() -> bool:
    return True


async def run(port: int, state: Path) -> None:
    def told(event: EngineEvent) -> None:
        if isinstance(event, Committed):
            state.write_text("")
        print(event, flush=True)

    # A busy test machine makes this process late; what that does is test_libxl_engine.py's, not this one's, matter.
    patience_ns = 10 * 10**9
    notifier = Notifier.from_environment()
    engine = LibxlColoEngine(PAIR, Role.PRIMARY, ("127.0.0.1", port), told, alive, notifier, late_ns=patience_ns)
    for kept in taken_back():
        assert kept.name == kept_name(PAIR)
        engine.adopt(kept.socket(), outstanding=state.exists() and state.read_text() == "asked")
    await engine.start()
    print("listening", engine.port, flush=True)
    notifier.ready()
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    while command := (await commands.readline()).decode().strip():
        if command == "stop":
            break
        state.write_text("asked")
        print("asking", flush=True)
        try:
            await engine.request_checkpoint()
            print("asked", flush=True)
        except EngineError as e:
            print("refused", e, flush=True)
    await engine.stop()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    asyncio.run(run(int(sys.argv[1]), Path(sys.argv[2])))
