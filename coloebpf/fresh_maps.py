"""What a set of maps has from its load on: secrets, free lists, and the sizes that it was made for."""

from __future__ import annotations

import ctypes as ct
import os
import secrets
from pathlib import Path

from coloebpf import bpfsys, pins, shapes
from coloebpf.errors import BpfError, ConfigError
from coloebpf.model import Sizes
from coloebpf.pins import Maps
from coloebpf.programs import DGRAM_WORDS, HASH_PAD, magazine, stream_words

COMPARE_TIMEOUT_NS = 200_000_000  # docs/design.md, section 5; QEMU's is 3 s
MARK_SHIFT, MARK_MAX = 20, 0xFFF  # of skb->mark the upper 12 bits are the secret (FLOW_MASK in bpf/constants.h)
SPARE_MAGAZINES = 1024  # of bpf/constants.h


def fill(maps: Maps, sizes: Sizes) -> None:
    """Once, a fresh set of maps. The settings come last: they say "done"."""
    size = ct.sizeof(maps.shapes.leaf("hash_keys"))
    keys, start = bytearray(os.urandom(size)), 0
    for words in (stream_words(sizes), DGRAM_WORDS):  # the first keys of each table again behind its last
        end = start + words * 8
        keys[end : end + HASH_PAD * 8] = keys[start : start + HASH_PAD * 8]
        start = end + HASH_PAD * 8
    bpfsys.update(maps.fd("hash_keys"), ct.c_uint32(0), (ct.c_char * size).from_buffer(keys))
    for number in reversed(range(sizes.flows)):  # a stack: the lowest come first
        bpfsys.update(maps.fd("free_flows"), None, ct.c_uint32(number))
    _fill_magazines(maps, sizes)
    settings = maps.shapes.leaf("settings")()
    settings.mark = (secrets.randbelow(MARK_MAX) + 1) << MARK_SHIFT
    settings.slots, settings.flows, settings.slot_bytes = _figures(sizes)
    settings.compare_timeout_ns = COMPARE_TIMEOUT_NS
    bpfsys.update(maps.fd("settings"), ct.c_uint32(0), settings)


def _fill_magazines(maps: Maps, sizes: Sizes) -> None:
    """All slots into magazines; those behind them stay empty."""
    size = magazine(sizes)
    full = -(-sizes.slots // size)
    for number in range(1, full + 1):
        slots = range((number - 1) * size, min(number * size, sizes.slots))
        value = maps.shapes.leaf("magazines")()
        words = (ct.c_uint32 * (size + 1)).from_buffer(value)
        words[: len(slots) + 1] = [len(slots), *slots]
        bpfsys.update(maps.fd("magazines"), ct.c_uint32(number), value)
    empty = range(full + SPARE_MAGAZINES, full, -1)
    for table, numbers in (("full_magazines", range(full, 0, -1)), ("empty_magazines", empty)):
        for number in numbers:
            bpfsys.update(maps.fd(table), None, ct.c_uint32(number))


def _figures(sizes: Sizes) -> tuple[int, int, int]:
    """Slots, flows, and bytes of a slot, as the maps were or are to be made."""
    return sizes.slots, sizes.flows, 16384 if sizes.jumbo else 2048


def kept(pin_dir: Path, sizes: Sizes) -> shapes.Shapes:
    """The shapes of the maps that are pinned. Raises BpfError if some are missing, ConfigError for other sizes."""
    kinds = pins.complete(pin_dir, pins.MAPS)
    settings = kinds.leaf("settings")()
    with bpfsys.opened(pin_dir / "settings") as fd:
        bpfsys.lookup(fd, ct.c_uint32(0), settings)
    have = (settings.slots, settings.flows, settings.slot_bytes)
    if not settings.slots:
        raise BpfError(f"{pin_dir}: a load was interrupted before its maps were filled; detach, then load again")
    if have != _figures(sizes):
        raise ConfigError(
            f"{pin_dir}: loaded with (slots, flows, slot bytes) {have}, asked for {_figures(sizes)}; detach first"
        )
    return kinds
