"""The exporter over a lab's primary: `python -m tests.service.exporter PIN_DIR PORT`, in the host's network namespace."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from coloebpf.control import Control
from coloebpf.service.metrics_server import MetricsServer, Page
from coloebpf.service.status import Status
from tests.service import samples


def status() -> Status:
    told = samples.status()
    told.time = time.time()
    told.pairs[0].number = 0  # the lab's
    return told


async def serve(control: Control, port: int) -> None:
    server = MetricsServer(Page(status, control.snapshot, time.monotonic), "127.0.0.1", port)
    await server.start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with Control.open(Path(sys.argv[1])) as opened:
        asyncio.run(serve(opened, int(sys.argv[2])))
