"""The service's side of `coloebpf status`, `checkpoint` and the like: a line of JSON asks, a line of JSON answers.

    {"command": "status"}                     -> {"ok": true, "result": {...}}
    {"command": "failover", "pair": "web"}    -> {"ok": true, "result": "..."} or {"ok": false, "error": "..."}

A UNIX socket for root and its group alone (0660). A connection may ask again and again, one question at a time.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from coloebpf.errors import ColoError, ConfigError, ServiceError
from coloebpf.service.log import say
from coloebpf.service.status import Status

log = logging.getLogger(__name__)

MAX_REQUEST = 4096  # bytes of a line; the longest that makes sense has some 100
MAX_CONNECTIONS = 16  # at once: a few `top`s and a command
IDLE_S = 30.0  # between two questions, and for the other side to take an answer
COMMAND_S = 60.0  # for a command, unless its pair needs longer; a checkpoint of a large guest takes seconds
MODE = 0o660
PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred of unix(7): pid, uid, gid

STATUS = "status"
ORDERS = ("checkpoint", "failover", "handover", "protect", "unprotect")


class StatusSource(Protocol):
    """What can be asked."""

    def status(self) -> Status:
        """The service as it is now; called on the event loop."""

    def snapshot(self) -> dict[str, Any]:
        """The dataplane's (coloebpf.snapshot); called in a worker thread. Raises BpfError if it can't be read."""


class Commands(Protocol):
    """What can be ordered. Each returns, when it is done, a sentence that says so, and raises ColoError if it can't be.

    `pair`: a name of the configuration, or any other text that somebody typed.
    """

    def longest_s(self, pair: str) -> float:
        """For so long a command of the pair may take; 0: no longer than any."""

    async def checkpoint(self, pair: str) -> str:
        """One checkpoint, to its commit."""

    async def failover(self, pair: str) -> str:
        """Lets the secondary take over. A primary falls silent for it; a secondary does it if its primary is gone."""

    async def handover(self, pair: str) -> str:
        """On a primary in lock-step: lets the secondary take over. Refused in any other case."""

    async def protect(self, pair: str) -> str:
        """Begins the protection; on a primary, to the first commit."""

    async def unprotect(self, pair: str) -> str:
        """Ends it; the guest goes on, uncompared."""


class ControlSocket:
    """Answers at `path` from start() to stop()."""

    def __init__(
        self, path: Path, source: StatusSource, commands: Commands, idle_s: float = IDLE_S, command_s: float = COMMAND_S
    ) -> None:
        self._path, self._source, self._commands = path, source, commands
        self._idle_s, self._command_s = idle_s, command_s
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Raises ServiceError if another service answers at the path, or nothing can be made there."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            listener = _listen(self._path)
        except OSError as error:
            raise ServiceError(
                f"can't listen at {self._path} ({error.strerror}): see [host] control_socket in the configuration"
            ) from error
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=MAX_REQUEST)

    async def stop(self) -> None:
        """Ends all connections and removes the socket."""
        if self._server is None:
            return
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()
        self._path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(TimeoutError, ConnectionError):
                if len(self._connections) > MAX_CONNECTIONS:
                    await self._say(
                        writer, _refused(f"the service answers {MAX_CONNECTIONS} connections at once; wait")
                    )
                    return
                while (line := await self._line(reader, writer)) is not None:
                    answer = await self._answer(line, writer.get_extra_info("socket"))
                    await self._say(writer, answer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()  # close() would wait for a reader that takes nothing

    async def _line(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
        """The next request; None at the connection's end."""
        async with asyncio.timeout(self._idle_s):
            try:
                return await reader.readuntil(b"\n")
            except asyncio.IncompleteReadError:
                return None
            except asyncio.LimitOverrunError:
                await self._say(writer, _refused(f"a request has at most {MAX_REQUEST} bytes"))
                return None

    async def _say(self, writer: asyncio.StreamWriter, answer: dict[str, Any]) -> None:
        async with asyncio.timeout(self._idle_s):
            writer.write(json.dumps(answer).encode() + b"\n")
            # Not until the buffer is below its mark, as drain() has it: an abort would lose what is still in there.
            writer.transport.set_write_buffer_limits(0)
            await writer.drain()

    async def _answer(self, line: bytes, connection: socket.socket) -> dict[str, Any]:
        try:
            request = _request(line)
            if request["command"] == STATUS:
                return {"ok": True, "result": await self._status()}
            return {"ok": True, "result": await self._order(request["command"], request["pair"], connection)}
        except ColoError as error:
            return _refused(str(error))
        except Exception:  # one request's mistake must not end the service
            log.exception("a request at the control socket failed")
            return _refused("the service made a mistake, see its log: journalctl -u coloebpf")

    async def _status(self) -> dict[str, Any]:
        result: dict[str, Any] = {"service": self._source.status().as_dict(), "dataplane": None, "dataplane_error": ""}
        try:
            result["dataplane"] = await asyncio.to_thread(self._source.snapshot)
        except (ColoError, OSError) as error:
            result["dataplane_error"] = str(error)
        return result

    async def _order(self, command: str, pair: str, connection: socket.socket) -> str:
        orders: dict[str, Callable[[str], Awaitable[str]]] = {name: getattr(self._commands, name) for name in ORDERS}
        pid, uid, _ = PEER_CREDENTIALS.unpack(
            connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER_CREDENTIALS.size)
        )
        say(log, logging.INFO, "ordered", command=command, pair=pair, uid=uid, pid=pid)
        limit_s = max(self._command_s, self._commands.longest_s(pair))
        try:
            async with asyncio.timeout(limit_s):
                return await orders[command](pair)
        except TimeoutError:
            raise ServiceError(
                f"{command} of {pair} was not done after {limit_s:g} s; coloebpf status shows how far it is"
            ) from None


def _refused(why: str) -> dict[str, Any]:
    return {"ok": False, "error": why}


def _request(line: bytes) -> dict[str, str]:
    """Raises ConfigError for what is no request."""
    try:
        request = json.loads(line)
    except ValueError as error:  # UnicodeDecodeError too
        raise ConfigError(f"a request is a line of JSON: {error}") from error
    except RecursionError as error:
        raise ConfigError("a request is a flat object") from error
    if not isinstance(request, dict) or not isinstance(command := request.get("command"), str):
        raise ConfigError('a request is an object with a "command"')
    if command not in (STATUS, *ORDERS):
        raise ConfigError(f"there is no command {command!r}; there are {', '.join((STATUS, *ORDERS))}")
    if command in ORDERS and not isinstance(request.get("pair"), str):
        raise ConfigError(f'{command} needs a "pair"')
    return request


def _listen(path: Path) -> socket.socket:
    """A listening socket at `path`, in place of one that a service left which is gone. Raises OSError, ServiceError."""
    if answers(path):
        raise ServiceError(f"another coloebpf service answers at {path}: stop it first (systemctl stop coloebpf)")
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    before = os.umask(0o777 & ~0o600)  # from its first moment on nobody else may connect
    try:
        listener.bind(str(path))
        path.chmod(MODE)
        listener.listen(MAX_CONNECTIONS)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(before)
    return listener


def answers(path: Path) -> bool:
    """A service listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
                return False
            raise
        return True
