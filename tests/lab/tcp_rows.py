"""The table of TCP: what each VM sends, equal and unequal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.talk import Talk

Frames = Callable[[Talk], Sequence[bytes]]
DATA = bytes(range(256)) * 8
MSS_ONLY = [("MSS", 1460)]
FULL = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (11, 0)), ("NOP", None), ("WScale", 7)]
OTHER_TS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (999, 0)), ("NOP", None), ("WScale", 7)]


@dataclass(frozen=True)
class Row:
    """What each VM sends; `reason` of the divergence, or None where both are equal.

    `fronts`: proven fronts of held packets that leave on their own, because the SVM repeats them (bpf/partial.c).
    """

    name: str
    pvm: Frames
    svm: Frames
    reason: str | None = None
    fronts: int = 0


def cut(t: Talk, start: int, data: bytes, *borders: int, **fields: Any) -> list[bytes]:
    """`data` from stream position `start` on, in segments that end at `borders`."""
    edges = [0, *borders, len(data)]
    return [t.tcp(start + a, data[a:b], **fields) for a, b in itertools.pairwise(edges)]


EQUAL = [
    Row("same", lambda t: [t.tcp(1, DATA[:700])], lambda t: [t.tcp(1, DATA[:700])]),
    Row("one-byte", lambda t: [t.tcp(1, b"x")], lambda t: [t.tcp(1, b"x")]),
    Row(
        "never-compared",
        lambda t: [t.tcp(1, DATA[:100], flags="PA", window=700, options=[("Timestamp", (1, 2))], ip={"ttl": 64})],
        lambda t: [t.tcp(1, DATA[:100], window=500, options=[("Timestamp", (7, 5))], ip={"ttl": 9, "tos": 8, "id": 9})],
    ),
    Row("1-to-3", lambda t: cut(t, 1, DATA[:1400]), lambda t: cut(t, 1, DATA[:1400], 500, 501)),
    Row("3-to-1", lambda t: cut(t, 1, DATA[:1400], 3, 777), lambda t: cut(t, 1, DATA[:1400])),
    Row("crossing", lambda t: cut(t, 1, DATA, 600, 1200), lambda t: cut(t, 1, DATA, 1, 599, 1201, 1300)),
    Row("single-bytes", lambda t: cut(t, 5, DATA[:40]), lambda t: cut(t, 5, DATA[:40], *range(1, 40))),
    Row("bytes-held", lambda t: cut(t, 5, DATA[:40], *range(1, 40)), lambda t: cut(t, 5, DATA[:40])),
    Row(
        "svm-reordered",
        lambda t: cut(t, 1, DATA, 600, 1200),
        lambda t: cut(t, 1, DATA, 512, 1024)[::-1],
    ),
    Row(
        "svm-overlaps",
        lambda t: cut(t, 1, DATA[:1000], 600),
        lambda t: [t.tcp(1, DATA[:400]), t.tcp(201, DATA[200:700]), t.tcp(101, DATA[100:1000])],
    ),
    Row(
        "svm-again",
        lambda t: cut(t, 1, DATA[:1000], 600),
        lambda t: [t.tcp(1, DATA[:400]), t.tcp(1, DATA[:400]), t.tcp(401, DATA[400:1000]), t.tcp(1, DATA[:1000])],
        fronts=1,
    ),
    Row("junk-behind", lambda t: [t.tcp(1, b"abc") + b"\1\2"], lambda t: [t.tcp(1, b"abc") + b"\3\4"]),
    Row("svm-junk-behind", lambda t: [t.tcp(1, b"abc")], lambda t: [t.tcp(1, b"abc") + b"\3\4\5"]),
    Row(
        "svm-junk-behind-the-rest",
        lambda t: [t.tcp(1, DATA[:10])],
        lambda t: [t.tcp(1, DATA[:4]), t.tcp(5, DATA[4:10]) + DATA[20:24]],
    ),
    Row("pvm-again", lambda t: [t.tcp(1, b"data")] * 3, lambda t: [t.tcp(1, b"data")]),
    Row(
        "pvm-overlaps",
        lambda t: [
            t.tcp(1, DATA[:400]),
            t.tcp(201, DATA[200:700]),
            t.tcp(101, DATA[100:1000]),
            t.tcp(301, DATA[300:900]),
        ],
        lambda t: cut(t, 1, DATA[:1000], 600),
    ),
    Row(
        "pvm-reordered",
        lambda t: [t.tcp(1, b"a"), *cut(t, 2, DATA, 512, 1024)[::-1]],
        lambda t: [t.tcp(1, b"a"), *cut(t, 2, DATA, 700, 1400)],
    ),
    Row("wrap", lambda t: cut(t, 2**32 - 50, DATA[:100], 49, 50, 51), lambda t: cut(t, 2**32 - 50, DATA[:100], 60)),
    Row("wrap-at-zero", lambda t: cut(t, 2**32 - 700, DATA, 700), lambda t: cut(t, 2**32 - 700, DATA, 350, 1050)),
    Row("half-way", lambda t: cut(t, 2**31 - 700, DATA, 700), lambda t: cut(t, 2**31 - 700, DATA, 350, 1050)),
    Row("data-and-fin", lambda t: [t.tcp(1, DATA[:99], flags="FPA")], lambda t: [t.tcp(1, DATA[:99], flags="FA")]),
    Row(
        "fin-apart-on-svm",
        lambda t: [t.tcp(1, DATA[:99], flags="FA")],
        lambda t: [t.tcp(1, DATA[:99]), t.tcp(100, flags="FA")],
    ),
    Row(
        "fin-apart-on-pvm",
        lambda t: [t.tcp(1, DATA[:99]), t.tcp(100, flags="FA")],
        lambda t: [t.tcp(1, DATA[:99], flags="FA")],
    ),
    Row("fin-alone", lambda t: [t.tcp(1, flags="FA")], lambda t: [t.tcp(1, flags="FA")]),
    Row(
        "fin-at-wrap",
        lambda t: [t.tcp(-4, b"last", flags="FA")],
        lambda t: [*cut(t, -4, b"last"), t.tcp(0, flags="FA")],
    ),
    Row("rst", lambda t: [t.tcp(77, flags="R", ack=0)], lambda t: [t.tcp(77, flags="R", ack=0)]),
    Row("rst-ack", lambda t: [t.tcp(77, flags="RA")], lambda t: [t.tcp(77, flags="RA", window=9)]),
    Row(
        "data-then-rst",
        lambda t: [t.tcp(1, b"bye"), t.tcp(4, flags="RA")],
        lambda t: [t.tcp(1, b"bye"), t.tcp(4, flags="RA")],
    ),
    Row("padded-pvm", lambda t: [t.tcp(1, b"abc").ljust(90, b"\0")], lambda t: [t.tcp(1, b"abc")]),
    Row("padded-svm", lambda t: [t.tcp(1, b"abc")], lambda t: [t.tcp(1, b"abc").ljust(90, b"\0")]),
    Row("padded-junk", lambda t: [t.tcp(1, b"abc") + b"\1\2\3"], lambda t: [t.tcp(1, b"abc") + b"\4\5"]),
    Row(
        "urgent", lambda t: [t.tcp(1, b"abc", flags="UA", urgptr=1)], lambda t: [t.tcp(1, b"abc", flags="UA", urgptr=1)]
    ),
    Row(
        "syn",
        lambda t: [t.tcp(1, flags="S", ack=0, options=FULL)],
        lambda t: [t.tcp(900, flags="S", ack=0, options=OTHER_TS)],
    ),
    Row(
        "syn-ack", lambda t: [t.tcp(1, flags="SA", options=FULL)], lambda t: [t.tcp(900, flags="SA", options=OTHER_TS)]
    ),
    Row(
        "syn-ack-again",
        lambda t: [t.tcp(1, flags="SA", options=FULL)] * 2,
        lambda t: [t.tcp(900, flags="SA", options=OTHER_TS)],
    ),
    Row(
        "syn-ack-again-on-svm",
        lambda t: [t.tcp(1, flags="SA", options=FULL)],
        lambda t: [t.tcp(900, flags="SA", options=OTHER_TS)] * 2,
    ),
    Row("syn-plain", lambda t: [t.tcp(1, flags="SA")], lambda t: [t.tcp(2**32 - 1, flags="SA")]),
    Row(
        "syn-options-in-other-order",
        lambda t: [t.tcp(1, flags="SA", options=FULL)],
        lambda t: [t.tcp(2, flags="SA", options=[*FULL[2:3], ("NOP", None), ("NOP", None), FULL[0], FULL[1], FULL[4]])],
    ),
    Row("max-size", lambda t: [t.tcp(1, (DATA * 2)[:1432])], lambda t: cut(t, 1, (DATA * 2)[:1432], 720)),
]

UNEQUAL = [
    Row("first-byte", lambda t: [t.tcp(1, b"abcdefghij")], lambda t: [t.tcp(1, b"Abcdefghij")], "payload"),
    Row(
        "middle-byte",
        lambda t: [t.tcp(1, DATA[:999])],
        lambda t: [t.tcp(1, DATA[:500] + b"!" + DATA[501:999])],
        "payload",
    ),
    Row("last-byte", lambda t: [t.tcp(1, b"abcdefghij")], lambda t: [t.tcp(1, b"abcdefghiJ")], "payload"),
    Row("swapped-bytes", lambda t: [t.tcp(1, b"abcdefgh" * 9)], lambda t: [t.tcp(1, b"badcfehg" * 9)], "payload"),
    Row(
        "swapped-words",
        lambda t: [t.tcp(1, b"11112222" + b"33334444")],
        lambda t: [t.tcp(1, b"33334444" + b"11112222")],
        "payload",
    ),
    Row("zeroes", lambda t: [t.tcp(1, bytes(64))], lambda t: [t.tcp(1, bytes(63) + b"\1")], "payload"),
    Row("other-cuts", lambda t: cut(t, 1, b"a" * 100), lambda t: cut(t, 1, b"a" * 99 + b"b", 30, 60), "payload"),
    Row("held-in-pieces", lambda t: cut(t, 1, b"a" * 99 + b"b", 30, 60), lambda t: cut(t, 1, b"a" * 100), "payload"),
    Row("fin-early-on-svm", lambda t: [t.tcp(1, b"abcd")], lambda t: [t.tcp(1, b"abc", flags="FA")], "fin"),
    Row("fin-early-on-pvm", lambda t: [t.tcp(1, b"abc", flags="FA")], lambda t: [t.tcp(1, b"abcd")], "fin"),
    Row("fin-for-data", lambda t: [t.tcp(1, flags="FA")], lambda t: [t.tcp(1, b"x")], "fin"),
    Row("rst-for-data", lambda t: [t.tcp(1, flags="RA")], lambda t: [t.tcp(1, b"abc")], "rst"),
    Row("data-for-rst", lambda t: [t.tcp(1, b"abc")], lambda t: [t.tcp(1, flags="RA")], "rst"),
    Row("rst-elsewhere", lambda t: [t.tcp(1, flags="RA")], lambda t: [t.tcp(2, flags="RA")], "rst"),
    Row(
        "mss",
        lambda t: [t.tcp(1, flags="SA", options=MSS_ONLY)],
        lambda t: [t.tcp(1, flags="SA", options=[("MSS", 1400)])],
        "options",
    ),
    Row(
        "mss-low-byte",
        lambda t: [t.tcp(1, flags="SA", options=MSS_ONLY)],
        lambda t: [t.tcp(1, flags="SA", options=[("MSS", 1461)])],
        "options",
    ),
    Row("no-mss", lambda t: [t.tcp(1, flags="SA", options=MSS_ONLY)], lambda t: [t.tcp(1, flags="SA")], "options"),
    Row(
        "wscale",
        lambda t: [t.tcp(1, flags="SA", options=FULL)],
        lambda t: [t.tcp(1, flags="SA", options=[*FULL[:4], ("WScale", 8)])],
        "options",
    ),
    Row(
        "wscale-zero",
        lambda t: [t.tcp(1, flags="SA", options=[*FULL[:4], ("WScale", 0)])],
        lambda t: [t.tcp(1, flags="SA", options=FULL[:4])],
        "options",
    ),
    Row(
        "no-sack",
        lambda t: [t.tcp(1, flags="SA", options=FULL)],
        lambda t: [t.tcp(1, flags="SA", options=[FULL[0], *FULL[2:]])],
        "options",
    ),
    Row(
        "no-timestamps",
        lambda t: [t.tcp(1, flags="SA", options=FULL)],
        lambda t: [t.tcp(1, flags="SA", options=[*FULL[:2], *FULL[3:]])],
        "options",
    ),
    Row("ecn-setup", lambda t: [t.tcp(1, flags="SA")], lambda t: [t.tcp(1, flags="SAE")], "options"),
    Row("rst-for-syn-ack", lambda t: [t.tcp(1, flags="SA")], lambda t: [t.tcp(0, flags="RA", ack=1000)], "rst"),
    Row("syn-for-syn-ack", lambda t: [t.tcp(1, flags="SA")], lambda t: [t.tcp(1, flags="S")], "options"),
    Row("syn-data", lambda t: [t.tcp(1, b"hi", flags="SA")], lambda t: [t.tcp(1, b"ho", flags="SA")], "options"),
]
