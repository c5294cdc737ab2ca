"""The process between xl and the other host: `python -m coloebpf.xen.relay SOCKET`, one on each side of a guest.

On the primary `xl remus` starts it, as what takes the stream (stdin and stdout); on the secondary the service does, and
it starts `xl migrate-receive`. It passes the stream on (records.py), tells the service what it meets, and keeps back
what the service has to do something before. It outlives the service: what is kept back waits for the next one. To
libxl on the primary it is also the proxy that COLO connects to (libxl_wire.py).

The service connects to SOCKET (SOCK_SEQPACKET), and says in JSON: `start` (with the connection to the other host),
`go` of a mark, `checkpoint`, `end`, `kill`. It hears {"mark", "held"}, {"passed"}, {"cut"}, {"over", "code"}.
A connection that breaks ends xl on the primary only: libxl would take over on the secondary without asking anybody.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coloebpf.errors import WireError, XenError
from coloebpf.service.engines import libxl_wire as wire
from coloebpf.xen.records import CHUNK, Ended, Hop, Mark, back, forth

START_S = 60.0  # for the service's `start`; without it xl would wait for ever
INIT_S = 5.0  # for libxl's INIT behind its connect
TOLD_S = 1.0  # between two words on how much was passed
PACKET = 1 << 16
LOOK_S = 0.01  # between two looks at what xl has not read yet
SMALL_PIPE = 4096  # bytes, the least there is: what Remus' libxl can have written that nobody has read yet

# What waits for the service's `go`, by side and kind.
HELD_BY_PRIMARY = {True: {Mark.NEW, Mark.READY}, False: {Mark.STILL, Mark.NEXT}}
HELD_BY_SECONDARY = {True: {Mark.NEW}, False: set[Mark]()}


class Resettable:
    """A way into xl that can end with an error. At a plain end of file libxl 4.17 aborts instead of taking over, if it
    comes between two checkpoints (libxl_stream_read.c takes it for an END record, and stream_complete() asserts).

    `far`: what xl reads from.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._near = socket.create_connection(listener.getsockname())
            self.far, peer = listener.accept()
            while peer != self._near.getsockname():  # somebody else on this host was faster
                self.far.close()
                self.far, peer = listener.accept()
        self._near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        """Where to write."""
        return self._near.fileno()

    def reset(self, lives: Callable[[], bool]) -> None:
        """The end, when xl has read all that was written, however long it takes while it `lives`.

        For Remus' clients may have what rests on it: it was told as being here.
        """
        while self._unread() and lives():
            time.sleep(LOOK_S)
        self._near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._near.close()
        self.far.close()

    def _unread(self) -> int:
        """Bytes in either socket."""
        said = bytearray(4)
        fcntl.ioctl(self._near, termios.TIOCOUTQ, said)
        unsent = int.from_bytes(said, sys.byteorder)
        fcntl.ioctl(self.far, termios.FIONREAD, said)
        return unsent + int.from_bytes(said, sys.byteorder)


class Relay:
    """`exit_` is this process's own end."""

    def __init__(self, listener: socket.socket, exit_: Callable[[], object]) -> None:
        self._listener, self._exit = listener, exit_
        self._changed = threading.Condition()
        self._service: socket.socket | None = None
        self._net: socket.socket | None = None
        self._xl: subprocess.Popen[bytes] | None = None
        self._into: Resettable | None = None
        self._libxl: socket.socket | None = None  # its connection as COLO's client
        self._holds: set[Mark] = set()
        self._held: list[Mark] = []
        self._let: set[Mark] = set()  # of those held
        self._met: dict[str, int] = {}
        self._hops: list[Hop] = []
        self._cut = ""
        self._ending = False
        self._over = False

    # ---- the service -----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """One service after the other, until the process's end."""
        self._listener.settimeout(START_S)
        while True:
            try:
                service, _ = self._listener.accept()
            except TimeoutError:
                if self._net is None:
                    self._finish("the service has not started it")
                    return
                continue
            except OSError:
                return
            with self._changed:
                self._service = service
                self._send(hello=self._met, held=[*self._held], passed=self._passed, cut=self._cut)
            try:
                self._orders(service)
            finally:
                with self._changed:
                    self._service = None
                service.close()

    def _orders(self, service: socket.socket) -> None:
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(service, PACKET, 1)
            except OSError:
                return
            if not data:
                return
            try:
                self._do(fds[0] if fds else None, **json.loads(data))
            except (OSError, XenError, WireError) as e:
                self._tell(error=str(e))

    def _do(self, fd: int | None, do: str, **with_: Any) -> None:
        match do:
            case "start" if fd is not None:
                self._start(fd, **with_)
            case "go":
                with self._changed:
                    if (mark := Mark(with_["mark"])) in self._held:
                        self._let.add(mark)
                        self._changed.notify_all()
            case "checkpoint":
                if self._libxl is not None:
                    self._libxl.sendall(wire.frame(wire.DO_CHECKPOINT))
            case "end":
                self._end()
            case "kill":
                if self._xl is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(self._xl.pid, signal.SIGKILL)
                self._end()

    def _send(self, **what: object) -> None:
        """With the lock."""
        if self._service is not None:
            with contextlib.suppress(OSError):
                self._service.send(json.dumps(what).encode())

    def _tell(self, **what: object) -> None:
        with self._changed:
            self._send(**what)

    # ---- beginning and end -----------------------------------------------------------------------------------------

    def _start(self, fd: int, colo: bool, argv: list[str] | None = None, endpoint: list[Any] | None = None) -> None:
        self._net = net = socket.socket(fileno=fd)
        net.setblocking(True)
        with contextlib.suppress(OSError):  # it is no TCP if a tunnel is in between
            net.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if argv is None:
            self._holds = HELD_BY_PRIMARY[colo]
            if endpoint is not None:
                listener = socket.create_server((endpoint[0], endpoint[1]))
                self._run(lambda: self._serve_libxl(listener))
            room = 0 if colo else _shrink(0)
            there, here = Hop(0, fd), Hop(fd, 1)
            self._hops = [there, here]
            self._run(lambda: self._primary(lambda: forth(there, colo, self._at, room)))
            self._run(lambda: self._primary(lambda: back(here, self._at)))
        else:
            self._holds = HELD_BY_SECONDARY[colo]
            self._into = Resettable()
            self._xl = xl = subprocess.Popen(
                argv, stdin=self._into.far.fileno(), stdout=subprocess.PIPE, start_new_session=True
            )
            assert xl.stdout is not None
            from_ = xl.stdout.fileno()
            there, here = Hop(fd, self._into.fileno()), Hop(from_, fd)
            self._hops = [there, here]
            self._run(lambda: self._take_in(there, colo))
            self._run(lambda: self._answer(here, from_))
        self._run(self._tell_passed)

    def _run(self, work: Callable[[], object]) -> None:
        threading.Thread(target=work, daemon=True).start()

    def _end(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        if self._net is not None:
            with contextlib.suppress(OSError):
                self._net.shutdown(socket.SHUT_RDWR)
        if self._net is None:
            self._finish("ended before it began")

    def _finish(self, why: str, code: int | None = None) -> None:
        with self._changed:
            if self._over:
                return
            self._over = True
            self._send(over=why, code=code)
            self._changed.notify_all()
        self._exit()

    # ---- the primary's side ----------------------------------------------------------------------------------------

    def _primary(self, walk: Callable[[], None]) -> None:
        """However it ends: libxl sees its pipes closed, tears down, and lets the PVM go on."""
        why = "the stream has ended"
        try:
            walk()
        except Ended:
            pass
        except (OSError, WireError, XenError) as e:
            why = str(e)
        self._finish(why)

    def _serve_libxl(self, listener: socket.socket) -> None:
        with listener:
            connection, _ = listener.accept()
        with connection:
            if not wire.trusted(wire.owner(connection)):
                self._finish("who connected as libxl is not root")
                return
            connection.settimeout(INIT_S)
            reader = wire.Reader()
            try:
                while piece := connection.recv(reader.wanted):
                    if reader.feed(piece) == wire.INIT:
                        connection.sendall(wire.frame(wire.INIT_ANSWER))
                        connection.settimeout(None)
                        self._libxl = connection
            except (OSError, WireError) as e:
                self._tell(error=f"libxl as COLO's client: {e}")
            self._libxl = None

    # ---- the secondary's -------------------------------------------------------------------------------------------

    def _take_in(self, hop: Hop, colo: bool) -> None:
        assert self._into is not None
        assert self._xl is not None
        why = "the other host has closed the connection"
        try:
            forth(hop, colo, self._at)
        except Ended:
            pass
        except (OSError, WireError, XenError) as e:
            why = str(e)
        self._note_cut(why)
        with self._changed:
            self._changed.wait_for(lambda: self._ending)
        self._into.reset(lambda: self._xl is not None and self._xl.poll() is None)  # now libxl takes over

    def _answer(self, hop: Hop, from_: int) -> None:
        assert self._xl is not None
        try:
            back(hop, self._at)
        except Ended:
            pass
        except (OSError, WireError) as e:
            self._note_cut(str(e))
        with contextlib.suppress(OSError):  # libxl must not stand still because nobody listens
            while os.read(from_, CHUNK):
                pass
        self._finish("xl has ended", self._xl.wait())

    def _note_cut(self, why: str) -> None:
        with self._changed:
            if not self._cut and not self._ending:
                self._cut = why
                self._send(cut=why)

    # ---- both ------------------------------------------------------------------------------------------------------

    def _at(self, mark: Mark) -> None:
        with self._changed:
            self._met[mark] = self._met.get(mark, 0) + 1
            held = mark in self._holds
            if held:
                self._held.append(mark)
            self._send(mark=mark, held=held)
            if held:
                self._changed.wait_for(lambda: mark in self._let or self._ending)
                self._held.remove(mark)
                self._let.discard(mark)
            if held and self._ending:
                raise Ended

    @property
    def _passed(self) -> int:
        return sum(hop.passed for hop in self._hops[:1])

    def _tell_passed(self) -> None:
        told = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._over, TOLD_S)
                if self._over:
                    return
                if self._passed != told:
                    told = self._passed
                    self._send(passed=told)


def _shrink(pipe: int) -> int:
    """Makes it hold as little as it can. Returns how many bytes that is."""
    with contextlib.suppress(OSError):  # then a checkpoint is sure later
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    return fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)


def main(path: Path) -> None:
    """Serves at `path` until the stream's end."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    os.umask(0o077)
    listener.bind(str(path))
    listener.listen()

    def leave() -> None:
        with contextlib.suppress(OSError):
            path.unlink()
        os._exit(0)

    Relay(listener, leave).serve()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
