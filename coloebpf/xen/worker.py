"""The process that calls libxl: `python -m coloebpf.xen.worker`, with a socket of SOCK_SEQPACKET as its stdin.

One order a packet, in JSON: {"do": NAME, ...}, and one answer: {"answer": ...} or {"error": SENTENCE}. A descriptor
that an order needs comes with its packet. `copy` tells of its steps before it answers, {"step": "stopped"} and {"step":
"written"}, and then waits for the order `go`: what the service has to do while the guest stands still is done by then.
Without a service there is nobody to wait for: at the socket's end the guest goes on, and a restored one is destroyed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from coloebpf.errors import XenError
from coloebpf.xen import stream
from coloebpf.xen.guest import placed
from coloebpf.xen.hold import Hold
from coloebpf.xen.libxl import Domain, LibXl

PACKET = 1 << 17  # bytes; the largest is a guest's configuration
LOOK_S = 0.005  # between two looks whether the guest stands still already
KEPT_LOOK_S = 0.02  # ... whether a copy that is kept going is wanted now


class Xen(Protocol):
    """What LibXl does."""

    def domains(self) -> list[Domain]: ...
    def domain(self, domid: int) -> Domain | None: ...
    def configuration(self, domid: int) -> str: ...
    def suspend(self, domid: int, fd: int) -> None: ...
    def resume(self, domid: int) -> None: ...
    def pause(self, domid: int) -> None: ...
    def unpause(self, domid: int) -> None: ...
    def destroy(self, domid: int) -> None: ...
    def rename(self, domid: int, old: str, new: str) -> None: ...
    def restore(self, config: str, fd: int) -> int: ...


class Gone(Exception):
    """The service has ended."""


class Worker:
    """Serves one service until that ends."""

    def __init__(self, xen: Xen, service: socket.socket) -> None:
        self._xen, self._service = xen, service
        self._fd: int | None = None  # came with the order

    def run(self) -> None:
        """Returns when the service has ended."""
        with contextlib.suppress(Gone):
            while True:
                order = self._next()
                try:
                    answer = self._do(**order)
                except (XenError, OSError) as e:
                    self._say(error=str(e))
                else:
                    self._say(answer=answer)
                finally:
                    if self._fd is not None:
                        os.close(self._fd)
                        self._fd = None

    def _do(self, do: str, **arguments: Any) -> object:
        match do:
            case "domains":
                return [asdict(domain) for domain in self._xen.domains()]
            case "configuration":
                return self._xen.configuration(**arguments)
            case "copy":
                self._copy(**arguments)
                return None
            case "restore":
                return self._restore(**arguments)
            case "unpause":
                domain = self._xen.domain(**arguments)
                if domain is None or domain.paused:  # Xen refuses it for one that runs
                    self._xen.unpause(**arguments)
                return None
            case "resume" | "pause" | "destroy" | "rename":
                getattr(self._xen, do)(**arguments)
                return None
        raise XenError(f"the worker knows no order {do!r}")

    # ---- copies ----------------------------------------------------------------------------------------------------

    def _copy(self, domid: int, library: str = "", hold: str = "") -> None:
        """Raises XenError if it came to nothing; the guest goes on in any case. `library`, `hold`: see hold.py."""
        stream.write_head(self._taken(), self._xen.configuration(domid))
        over = threading.Event()
        kept = Hold(Path(hold), Path(library)) if hold else None
        if kept is not None:
            kept.preload()
        watch = threading.Thread(target=self._watch, args=(domid, over, kept), daemon=True)
        watch.start()
        try:
            self._xen.suspend(domid, self._taken())
            over.set()
            watch.join()  # "stopped" does not come behind "written"
            self._say(step="written")
            if self._next()["do"] != "go":
                raise XenError("the copy was given up")
        finally:
            over.set()
            if self._stands_still(domid, unsure=True):
                self._xen.resume(domid)

    def _watch(self, domid: int, over: threading.Event, hold: Hold | None) -> None:
        """Tells when the guest stands still; libxl itself says nothing before all is written."""
        while hold is not None and hold.kept and not over.wait(KEPT_LOOK_S):
            if self._ended():
                hold.end()
        while not over.wait(LOOK_S):
            if self._stands_still(domid):
                with contextlib.suppress(Gone):
                    self._say(step="stopped")
                return

    def _stands_still(self, domid: int, unsure: bool = False) -> bool:
        try:
            domain = self._xen.domain(domid)
        except XenError:
            return unsure
        return domain is not None and domain.suspended

    def _restore(self, name: str, uuid: str, bridges: list[str]) -> int:
        config = placed(stream.read_head(self._taken()), name, uuid, bridges)
        domid = self._xen.restore(config, self._taken())
        if self._ended():
            self._xen.destroy(domid)
            raise Gone
        return domid

    # ---- the service -----------------------------------------------------------------------------------------------

    def _taken(self) -> int:
        if self._fd is None:
            raise XenError("the order came without its connection")
        return self._fd

    def _next(self) -> dict[str, Any]:
        try:
            data, fds, _, _ = socket.recv_fds(self._service, PACKET, 1)
        except OSError as e:
            raise Gone from e
        if not data:
            raise Gone
        if fds:
            [self._fd] = fds
        order: dict[str, Any] = json.loads(data)
        return order

    def _ended(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            return not self._service.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False

    def _say(self, **what: object) -> None:
        try:
            self._service.send(json.dumps(what).encode())
        except OSError as e:
            raise Gone from e


def serve(make: Callable[[], Xen]) -> None:
    """With the socket that is this process's stdin. The first packet says whether libxl can be had."""
    with socket.socket(fileno=os.dup(0)) as service:
        try:
            xen = make()
        except XenError as e:
            service.send(json.dumps({"error": str(e)}).encode())
            return
        service.send(json.dumps({"answer": "ready"}).encode())
        Worker(xen, service).run()


if __name__ == "__main__":
    serve(LibXl)
