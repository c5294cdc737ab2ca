"""Whether a history of reads and writes of registers is linearizable (Herlihy and Wing, 1990).

Each write has a value of its own, so every read names the write that it saw, and the check is exact and fast: see
Gibbons and Korach, Testing Shared Memories (1997). A write and the reads of its value are a cluster, whose operations
stand together in any right order. A cluster has to come before another if one of its operations ended before one of the
other's began. The history is linearizable if no two clusters have to come before each other, and no read ended before
its write began.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter


@dataclass(frozen=True)
class Operation:
    """One request of a client. `value`: written or read, None for a register without one.

    `began`, `ended`: on one clock, any unit; `ended` is None for a write that was never answered: it may have happened.
    """

    key: str
    writes: bool
    value: str | None
    began: float
    ended: float | None


@dataclass(frozen=True)
class _Cluster:
    """All operations of one value: the first end and the last beginning among them."""

    value: str | None
    first_end: float
    last_begin: float

    def must_precede(self, other: _Cluster) -> bool:
        return self.first_end < other.last_begin


def check(history: Iterable[Operation]) -> list[str]:
    """What is wrong with it, one sentence for each violation found; none if it is linearizable.

    Reads without an answer must be left out. Raises ValueError if two writes of a key have the same value.
    """
    keys: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        keys[operation.key].append(operation)
    return [f"{key}: {wrong}" for key, operations in sorted(keys.items()) for wrong in _wrong(operations)]


def _wrong(operations: list[Operation]) -> list[str]:
    values: dict[str | None, list[Operation]] = defaultdict(list)
    for operation in operations:
        values[operation.value].append(operation)
    values[None].append(Operation("", True, None, -math.inf, -math.inf))  # what is there before the history
    found, clusters = [], []
    for value, group in values.items():
        writes = [operation for operation in group if operation.writes]
        if len(writes) > 1:
            raise ValueError(f"two writes of {value!r}")
        if not writes:
            found.append(f"{value!r} was read and never written")
            continue
        ends = [math.inf if operation.ended is None else operation.ended for operation in group]
        if len(group) == 1 and writes[0].ended is None:
            continue  # perhaps it never happened, and nobody can tell
        if any(end < writes[0].began for end in ends):
            found.append(f"{value!r} was read before it was written")
        clusters.append(_Cluster(value, min(ends), max(operation.began for operation in group)))
    return found + _conflicts(clusters)


def _conflicts(clusters: list[_Cluster]) -> list[str]:
    """Pairs that would have to precede each other: one of them, or both, ended an operation before it began another."""
    stretched = sorted((each for each in clusters if each.must_precede(each)), key=attrgetter("first_end"))
    found = [_sentence(one, other) for one, other in pairwise(stretched) if _clash(one, other)]
    begins = [each.first_end for each in stretched]
    for each in clusters:
        # Stretched clusters follow one another, but for those told of already: only the last that began before counts.
        here = bisect_left(begins, each.last_begin)
        if here and not each.must_precede(each) and _clash(stretched[here - 1], each):
            found.append(_sentence(stretched[here - 1], each))
    return found


def _clash(one: _Cluster, other: _Cluster) -> bool:
    return one.must_precede(other) and other.must_precede(one)


def _sentence(one: _Cluster, other: _Cluster) -> str:
    return f"{one.value!r} and {other.value!r} were each seen after the other"
