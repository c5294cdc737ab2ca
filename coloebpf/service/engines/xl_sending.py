"""`xl remus`: begun with a relay for its stream, and seen to its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket

from coloebpf.errors import EngineError
from coloebpf.service.engines.xen_relay import OnMark, OnOver, Relay, arrives, launch
from coloebpf.service.engines.xen_stream import Stream

END_S = 10.0  # for xl, whose stream was ended, to let the PVM go on


class Sending:
    """One at a time. One that an earlier service has begun ends by itself when its relay does."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._xl: asyncio.subprocess.Process | None = None

    @property
    def alive(self) -> bool:
        """xl was begun here and has not been seen to its end."""
        return self._xl is not None

    async def begin(self, domid: int, net: socket.socket, on_mark: OnMark, on_cut: OnOver, on_over: OnOver) -> Relay:
        """The relay, which has `net`, its connection to the other host. Raises EngineError."""
        stream, endpoint = self._stream, self._stream.endpoint
        if endpoint is not None:
            await self._note_endpoint(domid, endpoint.host, endpoint.port)
        self._xl = await launch(stream.home, stream.sending())
        try:
            relay = await arrives(stream.home, self._xl, stream.step_timeout_s, on_mark, on_cut, on_over)
            relay.start(net, stream.colo, endpoint=endpoint and [endpoint.host, endpoint.port])
        except BaseException:
            self._xl = None
            raise
        return relay

    async def end(self) -> None:
        """Returns when xl has ended: by itself, for its relay is gone, or killed."""
        xl, self._xl = self._xl, None
        if xl is None:
            return
        try:
            async with asyncio.timeout(END_S):
                await xl.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(xl.pid, signal.SIGKILL)
            await xl.wait()

    async def _note_endpoint(self, domid: int, host: str, port: int) -> None:
        """Where libxl finds its proxy (libxl_nic.c): without a port it crashes."""
        keys = f"/libxl/{domid}/device/vif/0/colo_checkpoint_"
        words = (self._stream.xenstore_write, f"{keys}host", host, f"{keys}port", str(port))
        try:
            process = await asyncio.create_subprocess_exec(*words, stderr=asyncio.subprocess.PIPE)
        except OSError as e:
            raise EngineError(f"{words[0]} can't be run: {e.strerror}") from e
        _, said = await process.communicate()
        if process.returncode:
            raise EngineError(f"xenstore does not take {keys}port: {said.decode(errors='replace').strip()}")
