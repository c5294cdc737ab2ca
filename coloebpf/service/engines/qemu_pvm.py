"""The guest's own QEMU, as the primary's engine sees it: whether it is there, stands still, and how it goes on."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from coloebpf.errors import EngineError
from coloebpf.service.engines.qmp import Qmp

CONNECT_S = 2.0
CONT_S = 1.0  # for QEMU to be done with a migration that has completed
NOT_YET = "Migration is not finalized yet"  # QEMU's words for that
STOPPED = ("paused", "postmigrate", "finish-migrate")  # what a checkpoint may leave behind


async def lives(monitor: Path) -> bool:
    """One that hangs does: its monitor can be reached. Raises EngineError if nobody can say."""
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_unix_connection(monitor)
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except TimeoutError:
        return True
    except OSError as e:
        raise EngineError(f"nobody can look at {monitor}: {e.strerror}") from e
    writer.close()
    return True


class Pvm(Qmp):
    """Its monitor."""

    async def stands_still(self) -> bool:
        """Raises EngineError."""
        return (await self.do("query-status"))["status"] in STOPPED

    async def go_on(self) -> None:
        """If it stands still. Raises EngineError."""
        if await self.stands_still():
            await self.cont()

    async def cont(self) -> None:
        """QEMU tells of a migration's end a moment before it takes this: seen once in some 20 on a busy machine."""
        end = time.monotonic() + CONT_S
        while True:
            try:
                await self.do("cont")
                return
            except EngineError as e:
                if NOT_YET not in str(e) or time.monotonic() > end:
                    raise
            await asyncio.sleep(0.001)
