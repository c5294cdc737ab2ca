"""What goes between the two libxls of a guest that is copied again and again: where one record ends, and what it says.

libxl's stream has libxc's inside, and both have records of a type, a length, and a body padded to 8 bytes (Xen's
docs/specs: libxl-migration-stream, libxc-migration-stream; docs/features/colo.pandoc has the order). A walk passes
everything on as it came, and calls `at` with what it has met: before the first byte of it goes on, so that `at` can
keep it back; but for WHOLE, which is told when all of it has gone on.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from coloebpf.errors import WireError
from coloebpf.xen.stream import HEAD_BYTES, check_head

CHUNK = 1 << 20  # bytes that are passed on in one go; a record of libxc has 4 MiB at most
ALIGN = 8
_RECORD = struct.Struct("=II")  # type, length of the body
_STATE = struct.Struct("=II")  # of a checkpoint: what, padding
_LIBXL_HEAD = struct.Struct(">QII")  # ident, version, options; always big endian
_LIBXL_IDENT = 0x4C6962786C466D74  # "LibxlFmt"
_LIBXC_HEADS = 24 + 16  # bytes of its image header and its domain header
_BANNER_END = b"\n"
_MAX_BANNER = 256  # bytes; xl's has 52

# Of libxl (libxl_sr_stream_format.h).
_END, _LIBXC_CONTEXT, _CHECKPOINT_END, _CHECKPOINT_STATE = 0, 1, 4, 5
# Of libxc (xg_sr_stream_format.h).
_XC_END, _XC_HVM_CONTEXT, _XC_CHECKPOINT, _XC_DIRTY_PFN_LIST = 0x0, 0x9, 0xE, 0xF


class Mark(StrEnum):
    """What a walk tells of."""

    STILL = "still"  # forth: the PVM stands still, and all of its memory has been sent
    WHOLE = "whole"  # forth: a checkpoint has been passed on, to its last byte
    NEXT = "next"  # forth, Remus: the PVM stands still for the next checkpoint, of which nothing was passed on yet
    SURE = "sure"  # forth, Remus: this checkpoint has what the PVM had done when STILL or NEXT was told last
    NEW = "new"  # forth, COLO: libxl begins a checkpoint, and the SVM is about to be touched
    SUSPENDED = "suspended"  # back: the SVM stands still
    READY = "ready"  # back: the secondary has the whole state; the PVM goes on when this has passed
    RESUMED = "resumed"  # back: the SVM runs
    BLIND = "blind"  # back: no page is told of that the SVM has written, which can't be of one that has run


_STATES = {0: Mark.NEW, 1: Mark.SUSPENDED, 2: Mark.READY, 3: Mark.RESUMED}
At = Callable[[Mark], None]


class Ended(Exception):
    """The stream is at its end, where it may be."""


class Hop:
    """One direction: bytes of `source` go to `sink`, both blocking descriptors. `passed`: how many have."""

    def __init__(self, source: int, sink: int) -> None:
        self._source, self._sink = source, sink
        self.passed = 0

    def read(self, length: int) -> bytes:
        """So many, which are not passed on. Raises Ended at the end of file, WireError in the middle; OSError."""
        data = b""
        while len(data) < length:
            more = os.read(self._source, length - len(data))
            if not more:
                if data:
                    raise WireError("the stream broke off in a record's head")
                raise Ended
            data += more
        return data

    def write(self, data: bytes) -> None:
        """Passes on what read() gave. Raises OSError."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._sink, view) :]
        self.passed += len(data)

    def copy(self, length: int) -> None:
        """Passes on the next `length` bytes. Raises WireError if they don't all come; OSError."""
        while length:
            data = os.read(self._source, min(length, CHUNK))
            if not data:
                raise WireError(f"the stream broke off {length} bytes before the end of a record")
            self.write(data)
            length -= len(data)


class _Head(NamedTuple):
    type: int
    length: int  # of the body with its padding
    data: bytes


def _head(hop: Hop) -> _Head:
    data = hop.read(_RECORD.size)
    kind, length = _RECORD.unpack(data)
    return _Head(kind, -(-length // ALIGN) * ALIGN, data)


def forth(hop: Hop, colo: bool, at: At, room: int = 0) -> None:
    """From the primary's xl to the secondary's; `colo` False: Remus. Returns at the stream's END, or raises Ended.

    Remus' libxl lets the PVM go on as soon as it has written libxc's part of a checkpoint, `room` bytes of which may
    lie in a pipe, unread: a small one can be over before it is told. What the PVM does from then until it is told
    belongs to the next checkpoint. So this one is SURE if it did not fit; else NEXT is not told before one is.
    """
    head = hop.read(HEAD_BYTES)
    length = check_head(head)
    hop.write(head)
    hop.copy(length)
    head = hop.read(_LIBXL_HEAD.size)
    if _LIBXL_HEAD.unpack(head)[0] != _LIBXL_IDENT:
        raise WireError("what came is no stream of libxl")
    hop.write(head)
    in_libxc = False
    begins = False  # Remus: the PVM runs, and the next record is the first of another checkpoint
    stood = _Standstill(hop, room, at)
    while True:
        record = _head(hop)
        if begins:
            stood.tell(Mark.NEXT)
        begins = False
        if in_libxc:
            if record.type == _XC_HVM_CONTEXT:
                at(Mark.STILL) if colo else stood.tell(Mark.STILL)
            _pass(hop, record)
            in_libxc = record.type not in (_XC_CHECKPOINT, _XC_END)
            if record.type == _XC_CHECKPOINT and not colo:
                stood.passed()
        elif record.type == _CHECKPOINT_STATE:
            _tell(hop, record, at)
            in_libxc = True
        else:
            _pass(hop, record)
            if record.type == _LIBXC_CONTEXT:
                hop.copy(_LIBXC_HEADS)
                in_libxc = True
            elif record.type == _CHECKPOINT_END:
                at(Mark.WHOLE)
                begins = in_libxc = not colo
            elif record.type == _END:
                return


class _Standstill:
    """Remus: the PVM's, from when it is told until a checkpoint is SURE to have been made in it, or after it."""

    def __init__(self, hop: Hop, room: int, at: At) -> None:
        self._hop, self._room, self._at = hop, room, at
        self._before: int | None = None  # what had been passed on when it was told
        self._ever = False

    def tell(self, mark: Mark) -> None:
        """STILL is told of the first only; a record's head has been read. What is not sure yet is not told again."""
        if self._before is None and not (self._ever and mark is Mark.STILL):
            self._before, self._ever = self._hop.passed, True
            self._at(mark)

    def passed(self) -> None:
        """The PVM may run since the last byte of this was written."""
        if self._before is not None and self._hop.passed - self._before > _RECORD.size + self._room:
            self._before = None
            self._at(Mark.SURE)


def back(hop: Hop, at: At) -> None:
    """From the secondary's xl to the primary's: its banner, then records. Raises Ended at the end."""
    banner = b""
    while not banner.endswith(_BANNER_END):
        banner += hop.read(1)
        if len(banner) > _MAX_BANNER:
            raise WireError("the secondary's xl does not begin as one that takes a guest in")
    hop.write(banner)
    while True:
        record = _head(hop)
        if record.type == _CHECKPOINT_STATE:
            _tell(hop, record, at)
        else:
            if record.type == _XC_DIRTY_PFN_LIST and not record.length:
                at(Mark.BLIND)
            _pass(hop, record)


def _pass(hop: Hop, record: _Head) -> None:
    hop.write(record.data)
    hop.copy(record.length)


def _tell(hop: Hop, record: _Head, at: At) -> None:
    if record.length != _STATE.size:
        raise WireError(f"a checkpoint's state of {record.length} bytes")
    body = hop.read(_STATE.size)
    mark = _STATES.get(_STATE.unpack(body)[0])
    if mark is None:
        raise WireError(f"a checkpoint's state {_STATE.unpack(body)[0]}, which libxl does not have")
    at(mark)
    hop.write(record.data + body)
