"""bpf(2) by ctypes: what bcc 0.26 can't do (BPF_PROG_TEST_RUN), and pinned maps and programs without a compile."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coloebpf.errors import BpfError

if TYPE_CHECKING:
    from _ctypes import _CData  # what all ctypes values are; at run time it has no public name

Key = TypeVar("Key", bound="_CData")

_SYSCALL = {"x86_64": 321, "aarch64": 280}  # __NR_bpf
_libc = ct.CDLL(None, use_errno=True)

# enum bpf_cmd, linux/bpf.h
MAP_LOOKUP, MAP_UPDATE, MAP_DELETE, MAP_NEXT_KEY = 1, 2, 3, 4
_MAP_VERBS = {MAP_LOOKUP: "read", MAP_UPDATE: "write", MAP_DELETE: "take an entry out of", MAP_NEXT_KEY: "list"}
OBJ_PIN, OBJ_GET, TEST_RUN = 6, 7, 10
PROG_FD_BY_ID, INFO_BY_FD = 13, 15

CB_OFFSET, CB_WORDS = 48, 5  # of struct __sk_buff, linux/bpf.h: cb[] begins there
PRIORITY_OFFSET, SK_BUFF_BYTES = 32, 192
_NAME_OFFSET = 64  # of struct bpf_prog_info, linux/bpf.h


class _MapAttr(ct.Structure):
    _fields_ = [
        ("map_fd", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("key", ct.c_uint64),
        ("value", ct.c_uint64),
        ("flags", ct.c_uint64),
    ]


class _ObjAttr(ct.Structure):
    _fields_ = [("pathname", ct.c_uint64), ("bpf_fd", ct.c_uint32), ("file_flags", ct.c_uint32)]


class _TestAttr(ct.Structure):
    _fields_ = [
        ("prog_fd", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("data_in", ct.c_uint64),
        ("data_out", ct.c_uint64),
        ("repeat", ct.c_uint32),
        ("duration", ct.c_uint32),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("ctx_in", ct.c_uint64),
        ("ctx_out", ct.c_uint64),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    ]


class _IdAttr(ct.Structure):
    _fields_ = [("id", ct.c_uint32), ("next_id", ct.c_uint32), ("open_flags", ct.c_uint32)]


class _InfoAttr(ct.Structure):
    _fields_ = [("bpf_fd", ct.c_uint32), ("info_len", ct.c_uint32), ("info", ct.c_uint64)]


@dataclass(frozen=True)
class TestRun:
    """What BPF_PROG_TEST_RUN gave back; `duration_ns` is the mean per run."""

    __test__ = False  # not a test class, whatever pytest thinks of its name

    retval: int
    data: bytes
    ctx: bytes
    duration_ns: int


def bpf(command: int, attr: ct.Structure) -> int:
    """The raw call. Raises OSError with the kernel's errno."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise BpfError(f"bpf(2) has no known number on {platform.machine()}")
    got = _libc.syscall(number, command, ct.byref(attr), ct.sizeof(attr))
    if got < 0:
        number = ct.get_errno()
        raise OSError(number, os.strerror(number))
    return int(got)


def obj_get(path: Path) -> int:
    """File descriptor of a pinned map or program. Raises BpfError if it is not there."""
    name = ct.create_string_buffer(str(path).encode())
    try:
        return bpf(OBJ_GET, _ObjAttr(pathname=ct.addressof(name)))
    except OSError as e:
        raise BpfError(f"{path} can't be opened: {e.strerror}; is the dataplane loaded?") from e


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """The descriptor of obj_get() for the length of a block."""
    fd = obj_get(path)
    try:
        yield fd
    finally:
        os.close(fd)


def obj_pin(fd: int, path: Path) -> None:
    """Pins `fd` at `path`, in place of what is pinned there: the new pin is made beside it and renamed over it."""
    fresh = path.with_name(path.name + "_new")
    fresh.unlink(missing_ok=True)
    name = ct.create_string_buffer(str(fresh).encode())
    try:
        bpf(OBJ_PIN, _ObjAttr(pathname=ct.addressof(name), bpf_fd=fd))
    except OSError as e:
        raise BpfError(f"can't pin {path}: {e.strerror}; is bpffs mounted there?") from e
    path.unlink(missing_ok=True)
    fresh.rename(path)


def _on_map(command: int, fd: int, key: _CData | None, value: _CData | None = None) -> bool:
    """One call on a map; False if the kernel knows no such entry. Raises BpfError for any other refusal."""
    attr = _MapAttr(
        map_fd=fd,
        key=ct.addressof(key) if key is not None else 0,
        value=ct.addressof(value) if value is not None else 0,
    )
    try:
        bpf(command, attr)
    except OSError as e:
        if e.errno == errno.ENOENT:
            return False
        raise BpfError(f"the kernel refuses to {_MAP_VERBS[command]} a map: {e.strerror}") from e
    return True


def lookup(fd: int, key: _CData, value: _CData) -> bool:
    """Fills `value`; False if the key is not there. A per-CPU map's `value` is an array, one place a possible CPU."""
    return _on_map(MAP_LOOKUP, fd, key, value)


def update(fd: int, key: _CData | None, value: _CData) -> None:
    """Writes one entry; `key` None pushes onto a queue or stack."""
    _on_map(MAP_UPDATE, fd, key, value)


def delete(fd: int, key: _CData) -> bool:
    """Takes an entry out; False if it was not there."""
    return _on_map(MAP_DELETE, fd, key)


def some_keys(fd: int, key_type: type[Key], after: Key | None, count: int) -> list[Key]:
    """Up to `count` keys of a map (not of an array) behind `after`; from the first on if that is None, or gone."""
    found: list[Key] = []
    following = key_type()
    while len(found) < count and _on_map(MAP_NEXT_KEY, fd, found[-1] if found else after, following):
        found.append(following)
        following = key_type()
    return found


def keys(fd: int, key_type: type[Key]) -> list[Key]:
    """All keys of a map (not of an array)."""
    return some_keys(fd, key_type, None, sys.maxsize)


def test_run(
    prog_fd: int, data: bytes, *, repeat: int = 1, ctx: bytes | None = None, out_size: int = 65536, want_ctx: int = 0
) -> TestRun:
    """Runs a program on `data` in the caller's network namespace.

    `ctx`: a struct __sk_buff or xdp_md; `want_ctx`: how many bytes of it to give back.
    """
    source = ct.create_string_buffer(data, len(data))
    result = ct.create_string_buffer(out_size)
    given = ct.create_string_buffer(ctx or b"", len(ctx or b""))
    back = ct.create_string_buffer(max(want_ctx, 1))
    attr = _TestAttr(
        prog_fd=prog_fd,
        data_in=ct.addressof(source),
        data_size_in=len(data),
        data_out=ct.addressof(result),
        data_size_out=out_size,
        repeat=repeat,
        ctx_in=ct.addressof(given) if ctx else 0,
        ctx_size_in=len(ctx or b""),
        ctx_out=ct.addressof(back) if want_ctx else 0,
        ctx_size_out=want_ctx,
    )
    try:
        bpf(TEST_RUN, attr)
    except OSError as e:
        raise BpfError(f"BPF_PROG_TEST_RUN: {e.strerror}") from e
    return TestRun(
        retval=ct.c_int32(attr.retval).value,
        data=result.raw[: attr.data_size_out],
        ctx=back.raw[: attr.ctx_size_out],
        duration_ns=attr.duration,
    )


test_run.__test__ = False  # type: ignore[attr-defined]


def sk_buff(*cb: int, priority: int = 0) -> bytes:
    """A struct __sk_buff with cb[] and priority set, as test_run() takes it."""
    words = bytearray(SK_BUFF_BYTES)
    words[PRIORITY_OFFSET : PRIORITY_OFFSET + 4] = priority.to_bytes(4, "little")
    for i, word in enumerate(cb[:CB_WORDS]):
        words[CB_OFFSET + 4 * i : CB_OFFSET + 4 * i + 4] = (word & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(words)


def prog_name(prog_id: int) -> str:
    """Name (15 characters at most) of a loaded program; "" if it is gone."""
    try:
        fd = bpf(PROG_FD_BY_ID, _IdAttr(id=prog_id))
    except OSError:
        return ""
    try:
        info = ct.create_string_buffer(256)
        bpf(INFO_BY_FD, _InfoAttr(bpf_fd=fd, info_len=len(info), info=ct.addressof(info)))
        return info.raw[_NAME_OFFSET : _NAME_OFFSET + 16].split(b"\0")[0].decode(errors="replace")
    finally:
        os.close(fd)
