"""Percentiles of holding times, out of buckets that are powers of two."""

from __future__ import annotations

import ctypes as ct
from pathlib import Path

import pytest

from coloebpf.snapshot import add_up, percentiles, possible_cpus

BUCKETS = 64


def buckets(**counts: int) -> list[int]:
    """`b3=5`: five times of [2^3, 2^4) ns."""
    return [counts.get(f"b{i}", 0) for i in range(BUCKETS)]


@pytest.mark.parametrize(
    ("counts", "count", "p50", "p90", "p99"),
    [
        ({}, 0, 0, 0, 0),
        ({"b0": 1}, 1, 2, 2, 2),
        ({"b10": 1000}, 1000, 2048, 2048, 2048),
        ({"b10": 50, "b20": 50}, 100, 1 << 11, 1 << 21, 1 << 21),
        ({"b10": 49, "b20": 51}, 100, 1 << 21, 1 << 21, 1 << 21),
        ({"b10": 90, "b20": 9, "b30": 1}, 100, 1 << 11, 1 << 11, 1 << 21),
        ({"b10": 89, "b20": 9, "b30": 2}, 100, 1 << 11, 1 << 21, 1 << 31),
        ({"b63": 1}, 1, 1 << 64, 1 << 64, 1 << 64),
        ({"b5": 10**15, "b6": 10**15 + 1}, 2 * 10**15 + 1, 128, 128, 128),
    ],
)
def test_percentiles(counts: dict[str, int], count: int, p50: int, p90: int, p99: int) -> None:
    assert percentiles(buckets(**counts)) == {"count": count, "p50": p50, "p90": p90, "p99": p99}


@pytest.mark.parametrize(
    ("text", "count"), [("0\n", 1), ("0-1\n", 2), ("0-127\n", 128), ("0-3,8-11\n", 12), ("0,2", 3)]
)
def test_possible_cpus(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "possible"
    path.write_text(text)
    assert possible_cpus(path) == count


@pytest.mark.parametrize(
    ("values", "words", "whole"),
    [
        ([1, 2, 3], 3, [1, 2, 3]),
        ([1, 2, 3, 10, 20, 30, 100, 200, 300], 3, [111, 222, 333]),
        ([2**64 - 1, 2**64 - 1, 2, 0], 2, [1, 2**64 - 1]),
    ],
)
def test_words_of_all_cpus_are_added(values: list[int], words: int, whole: list[int]) -> None:
    memory = memoryview((ct.c_uint64 * len(values))(*values)).cast("B").cast("Q")
    assert add_up(memory, words) == whole
