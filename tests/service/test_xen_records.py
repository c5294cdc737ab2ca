"""The streams between two libxls: what is met in which order, that every byte goes on as it came, and what is refused."""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections.abc import Callable

import pytest

from coloebpf.errors import WireError, XenError
from coloebpf.xen.records import At, Ended, Hop, Mark, back, forth
from tests.service.fake_xl import (
    BANNER,
    CHECKPOINT,
    CHECKPOINT_END,
    CONTEXT,
    DIRTY,
    EMULATOR,
    END,
    HVM,
    LIBXL_HEAD,
    NEW,
    PAGES,
    READY,
    RESUMED,
    SUSPENDED,
    XC_HEADS,
    record,
    state,
)

Walk = Callable[[Hop, At], None]


def head(config: bytes = b'{"c_info": {}}\0') -> bytes:
    """xl's, of a guest."""
    magic = b"Xen saved domain, xl format\n \0 \r".ljust(32, b"\0")
    return struct.pack("=32sIIIII", magic, 0x01020304, 3, 0, 4 + len(config), len(config)) + config


START = head() + LIBXL_HEAD + record(CONTEXT) + XC_HEADS
# A record's type at one level is another's at the other: 4 is CHECKPOINT_END in libxl's, and a page's in libxc's.
CHECKPOINTED = (
    record(PAGES, b"page") + record(CHECKPOINT_END, b"not one here") + record(HVM, bytes(9001)) + record(CHECKPOINT)
    + record(EMULATOR, b"qemu's") + record(CHECKPOINT_END)
)  # fmt: skip


def walk(data: bytes, how: Walk, piece: int = 1 << 16) -> tuple[list[Mark], bytes, BaseException | None]:
    """What it met, what it passed on, and how it ended. `piece`: of so many bytes it reads at a time."""
    source, feed = os.pipe()
    drain, sink = os.pipe()
    met: list[Mark] = []
    passed = bytearray()

    def write() -> None:
        for start in range(0, len(data), piece):
            os.write(feed, data[start : start + piece])
        os.close(feed)

    def read() -> None:
        while more := os.read(drain, 1 << 16):
            passed.extend(more)

    threads = [threading.Thread(target=work) for work in (write, read)]
    for thread in threads:
        thread.start()
    ended: BaseException | None = None
    hop = Hop(source, sink)
    try:
        how(hop, met.append)
    except (Ended, WireError, XenError) as e:
        ended = e
    while os.read(source, 1 << 16):  # else the writer waits for ever
        pass
    os.close(sink)
    for thread in threads:
        thread.join()
    os.close(source)
    os.close(drain)
    assert hop.passed == len(passed)
    return met, bytes(passed), ended


def colo(hop: Hop, at: At) -> None:
    forth(hop, True, at)


def remus(hop: Hop, at: At) -> None:
    forth(hop, False, at)


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_colo(piece: int) -> None:
    data = START + CHECKPOINTED + state(NEW) + CHECKPOINTED + state(NEW)
    met, passed, ended = walk(data, colo, piece)
    assert met == [Mark.STILL, Mark.WHOLE, Mark.NEW, Mark.STILL, Mark.WHOLE, Mark.NEW]
    assert passed == data
    assert isinstance(ended, Ended)


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_remus(piece: int) -> None:
    """It goes on in libxc's stream at once."""
    data = START + CHECKPOINTED + CHECKPOINTED
    met, passed, ended = walk(data, remus, piece)
    assert met == [Mark.STILL, Mark.SURE, Mark.WHOLE, Mark.NEXT, Mark.SURE, Mark.WHOLE]
    assert passed == data
    assert isinstance(ended, Ended)


# Of libxc's part from HVM_CONTEXT on, and of a whole checkpoint, with what xl has written when the first head was read.
LIBXC_PART = len(record(HVM, bytes(9001)) + record(CHECKPOINT)) - 8
TWO = (
    len(record(HVM, bytes(9001)) + record(CHECKPOINT) + record(EMULATOR, b"qemu's") + record(CHECKPOINT_END))
    - 8
    + len(
        record(PAGES, b"page") + record(CHECKPOINT_END, b"not one here") + record(HVM, bytes(9001)) + record(CHECKPOINT)
    )
)


@pytest.mark.parametrize(
    ("room", "sure"),
    [
        (LIBXC_PART - 1, [1, 2, 3]),
        (LIBXC_PART, [2, 3]),  # the third was told of from its beginning, which is more
        (TWO - 1, [2]),
        (TWO, [3]),
    ],
)
def test_remus_with_room_for_a_checkpoint(room: int, sure: list[int]) -> None:
    """A checkpoint whose last byte xl could write before the standstill was told is not sure to have what came until
    then; the one that it could not is. No standstill is told in between."""
    met, _, _ = walk(START + 3 * CHECKPOINTED, lambda hop, at: forth(hop, False, at, room))
    assert [met[:at].count(Mark.WHOLE) + 1 for at, mark in enumerate(met) if mark is Mark.SURE] == sure
    told = [mark for mark in met if mark is not Mark.WHOLE]
    assert told[0] is Mark.STILL
    assert all((one is Mark.SURE) != (other is Mark.SURE) for one, other in itertools.pairwise(told)), told


def test_a_stream_that_ends_as_migrations_do() -> None:
    data = START + record(PAGES, b"page") + record(END) + record(EMULATOR, b"qemu") + record(END)
    met, passed, ended = walk(data, colo)
    assert (met, passed, ended) == ([], data, None)


def test_back() -> None:
    data = BANNER + state(READY) + state(RESUMED) + state(SUSPENDED) + record(DIRTY, bytes(24)) + state(READY)
    met, passed, ended = walk(data, back)
    assert met == [Mark.READY, Mark.RESUMED, Mark.SUSPENDED, Mark.READY]
    assert passed == data
    assert isinstance(ended, Ended)


def test_a_secondary_that_tells_of_no_page() -> None:
    met, _, _ = walk(BANNER + state(SUSPENDED) + record(DIRTY), back)
    assert met == [Mark.SUSPENDED, Mark.BLIND]


def test_what_is_told_is_not_passed_on_yet() -> None:
    """So that whoever is told can keep it back; but for WHOLE, of which all has gone on."""
    data = START + CHECKPOINTED + state(NEW)
    passed: dict[Mark, int] = {}

    def note(hop: Hop, at: At) -> None:
        def look(mark: Mark) -> None:
            passed[mark] = hop.passed
            at(mark)

        forth(hop, True, look)

    walk(data, note)
    assert passed[Mark.NEW] == passed[Mark.WHOLE] == len(data) - len(state(NEW))
    assert passed[Mark.STILL] < len(START + CHECKPOINTED) - 9001


@pytest.mark.parametrize(
    ("data", "how", "why"),
    [
        (b"\0" * 200, colo, "no copy of a guest"),
        (head() + b"\0" * 100, colo, "no stream of libxl"),
        (START + record(PAGES, b"page" * 4)[:-8], colo, "broke off 8 bytes before"),
        (START + record(PAGES)[:5], colo, "broke off in a record's head"),
        (START + CHECKPOINTED + state(9), colo, "state 9, which libxl does not have"),
        (START + CHECKPOINTED + record(5, bytes(4096)), colo, "state of 4096 bytes"),
        (b"x" * 1000, back, "does not begin as one that takes a guest in"),
        (BANNER + state(77), back, "state 77"),
    ],
)
def test_what_is_no_such_stream(data: bytes, how: Walk, why: str) -> None:
    """Nothing of what was refused goes on."""
    met, passed, ended = walk(data, how)
    assert isinstance(ended, WireError | XenError)
    assert why in str(ended)
    assert data.startswith(passed)
    assert Mark.NEW not in met
