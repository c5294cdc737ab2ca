"""/metrics over HTTP, on the service's event loop, for scrapers that may be slow or hostile.

Not prometheus_client's own server: that starts a thread for each connection and waits for each of them for ever. Here
requests are bounded in size, number and time, answers are made in a worker thread, and at most once a second.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric

from coloebpf.errors import ColoError, ServiceError
from coloebpf.service import metrics, metrics_dataplane
from coloebpf.service.log import say
from coloebpf.service.status import Status

log = logging.getLogger(__name__)

MAX_HEADER = 8192  # bytes of a request; Prometheus sends some 300
MAX_CONNECTIONS = 16  # scrapers at once; a Prometheus pair and a curious operator are three
TIMEOUT_S = 10.0  # for a request and its answer; Prometheus gives up after 10 s too
FRESH_S = 0.5  # a scrape takes some ms of reading maps for each NIC: a page so young is given out again
PATH = "/metrics"
OPENMETRICS = "application/openmetrics-text;version=1.0.0"  # the one format besides Prometheus' own


class _Families:
    """As a registry wants its collectors."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


class Page:
    """The text of /metrics. `snapshot` is called in a worker thread, `status` on the event loop."""

    def __init__(
        self,
        status: Callable[[], Status],
        snapshot: Callable[[], metrics_dataplane.Snapshot],
        clock: Callable[[], float],
        fresh_s: float = FRESH_S,
    ) -> None:
        self._status, self._snapshot, self._clock, self._fresh_s = status, snapshot, clock, fresh_s
        self._lock = asyncio.Lock()  # one reading at a time, whoever asks
        self._registry: CollectorRegistry | None = None
        self._texts: dict[str, tuple[str, bytes]] = {}  # of that registry, by format
        self._made = 0.0

    async def text(self, accept: str) -> tuple[str, bytes]:
        """Content type and body in the format that the header `accept` prefers."""
        wanted = OPENMETRICS if OPENMETRICS.partition(";")[0] in accept else ""
        async with self._lock:
            if self._registry is None or self._clock() - self._made >= self._fresh_s:
                status = self._status()
                self._registry = await asyncio.to_thread(self._read, status)
                self._made = self._clock()
                self._texts.clear()
            if wanted not in self._texts:
                encode, kind = choose_encoder(wanted)
                self._texts[wanted] = kind, await asyncio.to_thread(encode, self._registry)
            return self._texts[wanted]

    def _read(self, status: Status) -> CollectorRegistry:
        registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=registry)
        try:
            snapshot: metrics_dataplane.Snapshot | None = self._snapshot()
        except (ColoError, OSError) as error:
            say(log, logging.WARNING, "the dataplane can't be read for /metrics", error=error)
            snapshot = None
        registry.register(_Families(metrics.families(status, snapshot)))
        return registry


class MetricsServer:
    """Serves `page` at `host`:`port` from start() to stop()."""

    def __init__(self, page: Page, host: str, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self._page, self._host, self._port, self._timeout_s = page, host, port, timeout_s
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """Where it listens; of interest if 0 was asked for."""
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Raises ServiceError if the address can't be listened at."""
        try:
            self._server = await asyncio.start_server(self._accept, self._host, self._port, limit=MAX_HEADER)
        except OSError as error:
            raise ServiceError(
                f"can't serve metrics at {self._host}:{self._port} ({error.strerror}): "
                "free the address, or change [host] metrics_listen"
            ) from error

    async def stop(self) -> None:
        """Ends all connections."""
        if self._server is not None:
            self._server.close()
            for task in list(self._connections):
                task.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)
            await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            if len(self._connections) <= MAX_CONNECTIONS:
                with suppress(TimeoutError, ConnectionError):
                    async with asyncio.timeout(self._timeout_s):
                        await self._serve(reader, writer)
        finally:
            self._connections.discard(task)
            # What a slow reader has not taken by now it does not get: close() would wait for it without an end.
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = b""
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            status, kind, body = await self._answer(request)
        except asyncio.IncompleteReadError:
            return
        except asyncio.LimitOverrunError:
            status, kind, body = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "text/plain", b"too long\n"
        writer.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        if not request.startswith(b"HEAD "):
            writer.write(body)
        writer.write_eof()
        await writer.drain()
        while await reader.read(MAX_HEADER):  # to the other side's end: an abort before it could cost it the answer
            pass

    async def _answer(self, request: bytes) -> tuple[HTTPStatus, str, bytes]:
        lines = request.decode("latin-1").split("\r\n")
        words = lines[0].split(" ")
        if len(words) != 3 or not words[2].startswith("HTTP/1."):
            return HTTPStatus.BAD_REQUEST, "text/plain", b"this is not HTTP/1\n"
        if words[0] not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"only GET and HEAD\n"
        if words[1].partition("?")[0] != PATH:
            return HTTPStatus.NOT_FOUND, "text/plain", f"metrics are at {PATH}\n".encode()
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        kind, body = await self._page.text(headers.get("accept", ""))
        return HTTPStatus.OK, kind, body
