"""The kernel's own accounting of BPF programs: run time and runs, from bpf_prog_info."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from coloebpf import bpfsys
from tests.bench.errors import BenchError

BPF_PROG_LOAD = 5
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_ENABLE_STATS = 32  # the statistics are on while its descriptor is open: nothing is left switched on by a crash
BPF_STATS_RUN_TIME = 0
BPF_PROG_TYPE_SCHED_CLS = 3
RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit
FLOOR_RUNS = 1_000_000


class _InfoAttr(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_uint32), ("length", ctypes.c_uint32), ("info", ctypes.c_uint64)]


class _StatsAttr(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32)]


class _LoadAttr(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("instructions", ctypes.c_uint32),
        ("code", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
    ]


class _ProgInfo(ctypes.Structure):
    """struct bpf_prog_info up to run_cnt (linux/bpf.h); the kernel fills as much as it is given."""

    _fields_ = [
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("ifindex", ctypes.c_uint32),
        ("gpl_compatible", ctypes.c_uint32),
        ("netns_dev", ctypes.c_uint64),
        ("netns_ino", ctypes.c_uint64),
        ("nr_jited_ksyms", ctypes.c_uint32),
        ("nr_jited_func_lens", ctypes.c_uint32),
        ("jited_ksyms", ctypes.c_uint64),
        ("jited_func_lens", ctypes.c_uint64),
        ("btf_id", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("nr_func_info", ctypes.c_uint32),
        ("nr_line_info", ctypes.c_uint32),
        ("line_info", ctypes.c_uint64),
        ("jited_line_info", ctypes.c_uint64),
        ("nr_jited_line_info", ctypes.c_uint32),
        ("line_info_rec_size", ctypes.c_uint32),
        ("jited_line_info_rec_size", ctypes.c_uint32),
        ("nr_prog_tags", ctypes.c_uint32),
        ("prog_tags", ctypes.c_uint64),
        ("run_time_ns", ctypes.c_uint64),
        ("run_cnt", ctypes.c_uint64),
    ]


@dataclass(frozen=True)
class Spent:
    """What a program has used while statistics were on."""

    ns: int
    runs: int

    def since(self, earlier: Spent) -> Spent:
        """What was used between two readings."""
        return Spent(self.ns - earlier.ns, self.runs - earlier.runs)


def spent(prog_fd: int) -> Spent:
    """What the kernel has counted for this program."""
    info = _ProgInfo()
    bpfsys.bpf(BPF_OBJ_GET_INFO_BY_FD, _InfoAttr(prog_fd, ctypes.sizeof(info), ctypes.addressof(info)))
    return Spent(info.run_time_ns, info.run_cnt)


@contextmanager
def counting() -> Iterator[None]:
    """Run-time statistics of all programs are on meanwhile. They cost each run two readings of the clock."""
    try:
        fd = bpfsys.bpf(BPF_ENABLE_STATS, _StatsAttr(BPF_STATS_RUN_TIME))
    except OSError as error:
        raise BenchError(f"the kernel won't count the run time of BPF programs: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(fd)


def meter(prog_fds: Mapping[str, int]) -> dict[str, float]:
    """The readings of several programs as the feeder's marks take them: NAME_ns and NAME_runs."""
    values: dict[str, float] = {}
    for name, fd in prog_fds.items():
        reading = spent(fd)
        values |= {f"{name}_ns": reading.ns, f"{name}_runs": reading.runs}
    return values


@contextmanager
def empty_program() -> Iterator[int]:
    """A tc program that does nothing: what is counted for it, counting costs."""
    code, licence = ctypes.create_string_buffer(RETURN_ZERO), ctypes.create_string_buffer(b"GPL")
    load = _LoadAttr(BPF_PROG_TYPE_SCHED_CLS, len(RETURN_ZERO) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    fd = bpfsys.bpf(BPF_PROG_LOAD, load)
    try:
        yield fd
    finally:
        os.close(fd)


def floor_ns() -> float:
    """What the accounting itself adds to each run of a program, on the average of many in a row."""
    with empty_program() as fd, counting():
        bpfsys.test_run(fd, bytes(64), repeat=FLOOR_RUNS)
        used = spent(fd)
    return used.ns / used.runs
