"""The programs of a host: compiled for its sizes, loaded, and found by each other's tail calls."""

from __future__ import annotations

import ctypes as ct
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coloebpf import bpfsys
from coloebpf.errors import BpfError, ConfigError
from coloebpf.model import Sizes
from coloebpf.pins import MAPS, TC_PROGRAMS, XDP_PROGRAMS, Maps
from coloebpf.preflight import Headers
from coloebpf.source import one_text

# STAGE_* of bpf/maps.h
TC_STAGES = (
    "drain",
    "split",
    "p4_prove",
    "s1_deliver",
    "pass_whole",
    "hold",
    "split_udp",
    "partial",
    "p4_datagram",
    "answer",
    "let_go",
    "p1_alias",
    "p2_alias",
)
XDP_STAGES = ("p3_arrive", "s1_arrive")
STREAM_WORDS, DGRAM_WORDS, HASH_PAD = 512, 16384, 32  # of bpf/constants.h
JUMBO_STREAM_WORDS = 4096  # keys for a slot of 16 KiB


def defines(sizes: Sizes, pin_dir: Path) -> list[str]:
    """The compiler's flags for `sizes`. Raises ConfigError for one that the programs can't have."""
    for what, n, top in (("slots", sizes.slots, 65536), ("flows", sizes.flows, 1 << 20)):
        if n < 2 or n > top or n & (n - 1):
            raise ConfigError(f"{what} = {n}: must be a power of two between 2 and {top}")
    if not 576 <= sizes.mtu <= 9000:
        raise ConfigError(f"mtu = {sizes.mtu}: must be between 576 and 9000")
    words = stream_words(sizes)
    flags = [
        f'-DPIN_DIR="{pin_dir}"',
        f"-DMAGAZINE={magazine(sizes)}",
        f"-DSTREAM_WORDS={words}u",
        f"-DHASH_KEYS_BYTES={(words + DGRAM_WORDS + 2 * HASH_PAD + 2) * 8}",
        f"-DMAX_SLOTS={sizes.slots}u",
        f"-DHELD_BYTES={sizes.slots * 64}",
        f"-DMAX_FLOWS={sizes.flows}u",
    ]
    if sizes.jumbo:  # a longer hash leaves the verifier less for the rest
        flags += ["-DSLOT_SHIFT=14", "-DHASH_ROUNDS=71", "-DDRAIN_STEPS=4", "-DGSO_BATCH=1"]
    return flags


def stream_words(sizes: Sizes) -> int:
    """Keys of the hash of streams: one for each 4 bytes of a slot, so that no segment meets a key twice."""
    return JUMBO_STREAM_WORDS if sizes.jumbo else STREAM_WORDS


def magazine(sizes: Sizes) -> int:
    """Free slots that a CPU keeps for itself: few enough not to be missed. One less than a power of two."""
    return 15 if sizes.slots >= 4096 else 1


def compiled(flags: Iterable[str], headers: Headers) -> Any:
    """bcc's module, which keeps the descriptors of what it has loaded. Takes some 3 s. Raises BpfError."""
    headers.tell_bcc(os.environ)
    from bcc import BPF

    try:
        return BPF(text=one_text().encode(), cflags=[*headers.cflags, *flags, "-Wno-unused-function"])
    except Exception as e:  # bcc raises bare Exception
        raise BpfError(f"the programs do not compile ({e}); see the compiler's words above") from e


def loaded(module: Any) -> dict[str, int]:
    """File descriptors of all programs. Raises BpfError."""
    from bcc import BPF

    fds = {}
    for names, kind in ((TC_PROGRAMS, BPF.SCHED_CLS), (XDP_PROGRAMS, BPF.XDP)):
        for name in names:
            try:
                fds[name] = module.load_func(name.encode(), kind).fd
            except Exception as e:  # bcc raises bare Exception
                raise BpfError(f"the kernel refuses program {name}: {e}") from e
    return fds


def digest(sizes: Sizes, pin_dir: Path) -> str:
    """Stands for all that a compile depends on."""
    whole = "\0".join((one_text(), *defines(sizes, pin_dir), os.uname().release))
    return hashlib.sha256(whole.encode()).hexdigest()


def described(module: Any) -> dict[str, list[Any]]:
    """What shapes.save() keeps."""
    from bcc import lib

    said = {}
    for name in MAPS:
        key = lib.bpf_table_key_desc(module.module, name.encode())
        leaf = lib.bpf_table_leaf_desc(module.module, name.encode())
        said[name] = [json.loads(text) if text else None for text in (key, leaf)]
    return said


def publish(maps: Maps, programs: dict[str, int]) -> None:
    """Tail calls find the programs, and so do others by their pins."""
    for stages, table in ((TC_STAGES, "tc_stages"), (XDP_STAGES, "xdp_stages")):
        for number, name in enumerate(stages):
            bpfsys.update(maps.fd(table), ct.c_uint32(number), ct.c_uint32(programs[name]))
    for name, fd in programs.items():
        bpfsys.obj_pin(fd, maps.pin_dir / name)
