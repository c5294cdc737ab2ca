"""The kernel's own accounting of BPF programs: run time and runs, from bpf_prog_info."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tests.bench.errors import BenchError

SYS_BPF = {"x86_64": 321, "aarch64": 280}
BPF_PROG_LOAD = 5
BPF_PROG_TEST_RUN = 10
BPF_OBJ_GET_INFO_BY_FD = 15
BPF_ENABLE_STATS = 32  # the statistics are on while its descriptor is open: nothing is left switched on by a crash
BPF_STATS_RUN_TIME = 0
BPF_PROG_TYPE_SCHED_CLS = 3
RETURN_ZERO = bytes.fromhex("b7000000000000009500000000000000")  # r0 = 0; exit
FLOOR_RUNS = 1_000_000

_libc = ctypes.CDLL(None, use_errno=True)


class _InfoAttr(ctypes.Structure):
    _fields_ = [("fd", ctypes.c_uint32), ("length", ctypes.c_uint32), ("info", ctypes.c_uint64)]


class _LoadAttr(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_uint32),
        ("instructions", ctypes.c_uint32),
        ("code", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
    ]


class _TestAttr(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("size_in", ctypes.c_uint32),
        ("size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
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


def _bpf(command: int, attr: ctypes.Structure | ctypes.Array[ctypes.c_uint32], what: str) -> int:
    number = SYS_BPF.get(os.uname().machine)
    if number is None:
        raise BenchError(f"the number of bpf(2) on {os.uname().machine} isn't known here")
    result: int = _libc.syscall(number, command, ctypes.byref(attr), ctypes.sizeof(attr))
    if result < 0:
        raise BenchError(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def spent(prog_fd: int) -> Spent:
    """What the kernel has counted for this program."""
    info = _ProgInfo()
    attr = _InfoAttr(prog_fd, ctypes.sizeof(info), ctypes.addressof(info))
    _bpf(BPF_OBJ_GET_INFO_BY_FD, attr, "information about a BPF program")
    return Spent(info.run_time_ns, info.run_cnt)


@contextmanager
def counting() -> Iterator[None]:
    """Run-time statistics of all programs are on meanwhile. They cost each run two readings of the clock."""
    fd = _bpf(BPF_ENABLE_STATS, (ctypes.c_uint32 * 1)(BPF_STATS_RUN_TIME), "BPF run-time statistics")
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


def floor_ns() -> float:
    """What the accounting itself adds to each run: the mean of a program that does nothing."""
    code, licence, frame = ctypes.create_string_buffer(RETURN_ZERO), ctypes.create_string_buffer(b"GPL"), bytes(64)
    load = _LoadAttr(BPF_PROG_TYPE_SCHED_CLS, len(RETURN_ZERO) // 8, ctypes.addressof(code), ctypes.addressof(licence))
    fd = _bpf(BPF_PROG_LOAD, load, "loading an empty program")
    try:
        data = ctypes.create_string_buffer(frame)
        test = _TestAttr(fd, 0, len(frame), 0, ctypes.addressof(data), 0, FLOOR_RUNS, 0)
        with counting():
            _bpf(BPF_PROG_TEST_RUN, test, "running an empty program")
            used = spent(fd)
    finally:
        os.close(fd)
    return used.ns / used.runs
