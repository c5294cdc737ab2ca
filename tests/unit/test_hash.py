"""The keyed hash of bpf/hash.h against a model that adds byte by byte, over frames that come in on the forward link."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.rig import DGRAM_WORDS, STREAM_WORDS, XDP_PASS, Rig, next_port, tcp, udp

pytestmark = pytest.mark.kernel

M64 = (1 << 64) - 1
MAX_TCP, MAX_UDP = 1460, 1472  # payload of an MTU of 1,500 over IPv4
PHASES = 9  # positions within a word of 8 bytes, and one more


def model(keys: list[int], data: bytes, position: int) -> int:
    """Each byte stands at its place in the word of its position; words are multiplied by their position's key."""
    return (
        sum(keys[(position + i) // 4 % len(keys)] * (byte << 8 * ((position + i) % 4)) for i, byte in enumerate(data))
        & M64
    )


def stream_digest(rig: Rig, port: int, position: int, data: bytes, flags: str = "A") -> int:
    got = rig.arrive(tcp(port, position, data, flags))
    assert (got.verdict, got.start) == (XDP_PASS, position & 0xFFFFFFFF)
    return got.digest


@pytest.mark.parametrize(
    "position",
    [0, 1, 1_000_003, 4 * STREAM_WORDS - 700, (1 << 32) - 1, (1 << 32) - 700, (1 << 31) - 5],
    ids=["zero", "odd", "anywhere", "end-of-keys", "last", "wrap", "sign"],
)
@pytest.mark.parametrize("length", [1, 7, 8, 31, 64, 65, 1448, MAX_TCP])
def test_a_stream_range_hashes_as_the_model_says(rig: Rig, position: int, length: int) -> None:
    data = random.Random(length).randbytes(length)
    # The kernel counts positions in 32 bits, the table's size divides 2^32.
    assert stream_digest(rig, next_port(), position, data) == model(rig.hash_keys()[0], data, position)


def test_every_length_at_every_phase(rig: Rig) -> None:
    port, keys, noise = next_port(), rig.hash_keys()[0], random.Random(1)
    for phase in range(PHASES):
        for length in range(1, 100):
            data = noise.randbytes(length)
            assert stream_digest(rig, port, phase, data) == model(keys, data, phase), (phase, length)


@pytest.mark.parametrize("length", [*range(40), 63, 64, 65, 127, 128, 1000, MAX_UDP - 1, MAX_UDP])
def test_a_datagram_hashes_as_the_model_says(rig: Rig, length: int) -> None:
    data = random.Random(length).randbytes(length)
    got = rig.arrive(udp(next_port(), data))
    assert (got.verdict, got.length, got.digest) == (XDP_PASS, length, model(rig.hash_keys()[1], data, 0))


def test_the_keys_of_both_tables_are_different_and_random(rig: Rig) -> None:
    stream, datagram, fin, length = rig.hash_keys()
    every = [*stream, *datagram, fin, length]
    assert len(set(every)) == STREAM_WORDS + DGRAM_WORDS + 2, "keys repeat"
    assert abs(sum(key.bit_count() for key in every) / (64 * len(every)) - 0.5) < 0.01


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(min_size=2, max_size=MAX_TCP),
    cuts=st.lists(st.integers(1, MAX_TCP), max_size=6),
    start=st.integers(0, (1 << 32) - 1),
)
def test_a_range_may_be_cut_anywhere(rig: Rig, data: bytes, cuts: list[int], start: int) -> None:
    port = 19_999
    edges = [0, *sorted({cut for cut in cuts if cut < len(data)}), len(data)]
    pieces = [stream_digest(rig, port, start + a, data[a:b]) for a, b in pairwise(edges)]
    assert sum(pieces) & M64 == stream_digest(rig, port, start, data)


def test_a_changed_byte_or_two_swapped_words_change_the_digest(rig: Rig) -> None:
    port, data = next_port(), bytearray(random.Random(7).randbytes(1448))
    seen = {stream_digest(rig, port, 5, bytes(data))}
    for i in range(0, len(data), 13):
        data[i] ^= 1
        seen.add(stream_digest(rig, port, 5, bytes(data)))
        data[i] ^= 1
    swapped = bytes(data[4:8] + data[0:4] + data[8:])  # what a sum in the style of the Internet checksum can't see
    seen.add(stream_digest(rig, port, 5, swapped))
    assert len(seen) == len(range(0, 1448, 13)) + 2


def test_a_fin_is_a_position_of_its_own(rig: Rig) -> None:
    port, keys = next_port(), rig.hash_keys()
    plain, with_fin = (stream_digest(rig, port, 100, b"last words", flags) for flags in ("A", "FA"))
    position = 100 + len(b"last words")
    assert (with_fin - plain) & M64 == keys[2] * (keys[0][position // 4] + position) & M64
    assert rig.arrive(tcp(port, 100, b"last words", "FA")).length == len(b"last words") + 1
