"""Release rules of TCP: what a released packet acknowledges, what follows, what goes at once, what is swallowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

SYN, FIN, ACK = 0x02, 0x01, 0x10


@pytest.fixture(autouse=True)
def _nothing_is_left(wire: Wire) -> Iterator[None]:
    before = wire.nic()
    yield
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)
    assert sum(n for name, n in change.items() if name.startswith("divergences")) == 0
    assert wire.seen() == []


def told(frames: list[bytes]) -> list[tuple[int, int]]:
    """ACK number and window of each frame, its checksums checked."""
    assert all(Heard.of(frame).sums_hold() for frame in frames)
    return [(Heard.of(frame).ack, Heard.of(frame).window) for frame in frames]


def open_stream(wire: Wire, talk: Talk, ack: int = 1000, window: int = 500, seq: int = 1) -> None:
    """One proven byte at `seq`; both VMs have acknowledged `ack`."""
    wire.pvm(talk.tcp(seq, b"x", ack=ack, window=window))
    wire.svm(talk.tcp(seq, b"x", ack=ack, window=window))
    assert told(wire.released(1)) == [(ack & M32, window)]


def test_a_pure_ack_waits_until_the_svm_has_acknowledged_anything(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(1, ack=1000))
    assert wire.seen() == []
    wire.svm(talk.tcp(1, ack=1000))
    same_frames(wire.released(1), [talk.tcp(1, ack=1000)])


@pytest.mark.parametrize("base", [1000, 2**32 - 100, 2**31 - 100])
def test_a_pure_ack_above_the_svms_waits_for_it(wire: Wire, talk: Talk, base: int) -> None:
    open_stream(wire, talk, ack=base)
    wire.pvm(talk.tcp(2, ack=base + 200))
    assert wire.seen() == []
    wire.svm(talk.tcp(2, ack=base + 199))
    assert all(ack != (base + 200) & M32 for ack, _ in told(wire.seen()))
    wire.svm(talk.tcp(2, ack=base + 200))
    got = wire.released(1)
    assert told(got)[-1] == ((base + 200) & M32, 500)


def test_a_pure_ack_below_the_svms_goes_at_once(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.svm(talk.tcp(2, ack=1400))
    for ack in (1200, 1400, 1400, 1400):  # duplicates too: the client counts them
        wire.pvm(talk.tcp(2, ack=ack))
        assert told(wire.released(1)) == [(ack, 500)]


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize(
    ("pvm", "svm"),
    [((1500, 500), (1200, 500)), ((1200, 500), (1500, 500)), ((1200, 100), (1500, 50)), ((1500, 70), (1200, 90))],
)
def test_data_carry_the_lower_ack_and_window(
    wire: Wire, talk: Talk, first: str, pvm: tuple[int, int], svm: tuple[int, int]
) -> None:
    open_stream(wire, talk)
    frames = {
        "pvm": talk.tcp(2, b"data", ack=pvm[0], window=pvm[1]),
        "svm": talk.tcp(2, b"data", ack=svm[0], window=svm[1]),
    }
    wire.send(first, frames[first])
    assert wire.seen() == []
    other = "svm" if first == "pvm" else "pvm"
    wire.send(other, frames[other])
    got = wire.released(1)
    same_frames(got, [frames["pvm"]])
    assert told(got) == [(min(pvm[0], svm[0]), min(pvm[1], svm[1]))]
    if pvm[0] > svm[0]:  # the difference is owed
        wire.svm(talk.tcp(6, ack=pvm[0], window=500))
        assert told(wire.released(1))[0][0] == pvm[0]


def test_the_owed_ack_follows_when_the_svm_catches_up(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    stamps = [("NOP", None), ("NOP", None), ("Timestamp", (77, 88))]
    wire.pvm(talk.tcp(2, b"data", ack=1500, window=400, options=stamps))
    wire.svm(talk.tcp(2, b"data", ack=1200, window=300, options=stamps))
    assert told(wire.released(1)) == [(1200, 300)]
    wire.svm(talk.tcp(6, ack=1300, window=300))
    first = wire.released(1)
    wire.svm(talk.tcp(6, ack=1500, window=300))
    second = wire.released(1)
    wire.svm(talk.tcp(6, ack=1600, window=300))
    assert wire.seen() == []  # beyond the PVM's
    assert told(first + second) == [(1300, 300), (1500, 300)]
    for frame in first + second:
        owed, model = Heard.of(frame), talk.tcp(6, options=stamps)
        assert frame[: owed.l3] == model[: owed.l3]  # addresses and the guest's tags
        assert (owed.seq, owed.flags, owed.data, owed.timestamps) == (6, ACK, b"", (77, 88))
        assert frame[owed.l4 : owed.l4 + 4] == model[owed.l4 : owed.l4 + 4]
    assert wire.nic()["owed_acks"] >= 2


def test_an_owed_ack_has_no_timestamps_where_there_are_none(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(2, b"data", ack=1500))
    wire.svm(talk.tcp(2, b"data", ack=1200))
    assert told(wire.released(1)) == [(1200, 500)]
    wire.svm(talk.tcp(6, ack=1500))
    got = wire.released(1)
    assert told(got) == [(1500, 500)]
    assert Heard.of(got[0]).tcp_options == b""


def test_a_shut_window_is_opened_again(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(2, b"data", window=500))
    wire.svm(talk.tcp(2, b"data", window=0))
    assert told(wire.released(1)) == [(1000, 0)]
    wire.svm(talk.tcp(6, window=300))
    assert told(wire.released(1)) == [(1000, 300)]


def test_a_pure_ack_has_the_svms_window(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk, window=500)
    wire.svm(talk.tcp(2, ack=1000, window=200))
    wire.pvm(talk.tcp(2, ack=1000, window=900))
    assert told(wire.released(1)) == [(1000, 200)]


def test_an_old_window_does_not_count(wire: Wire, talk: Talk) -> None:
    """A late SVM packet with a lower ACK says nothing of the window any more."""
    open_stream(wire, talk, window=500)
    wire.svm(talk.tcp(2, ack=1400, window=100))
    wire.svm(talk.tcp(2, ack=1200, window=500))
    wire.pvm(talk.tcp(2, ack=1400, window=500))
    assert told(wire.released(1)) == [(1400, 100)]


MOVES = st.lists(
    st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 400), st.sampled_from([0, 50, 500, 65535])),
    min_size=2,
    max_size=14,
)


@settings(max_examples=100, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(moves=MOVES, base=st.sampled_from([1000, 2**32 - 300, 2**31 - 300]))
def test_no_ack_is_above_the_svms_and_none_is_forgotten(
    wire: Wire, moves: list[tuple[bool, int, int, int]], base: int
) -> None:
    """Random data and ACKs: the client is never told more than the SVM said, and in the end all that both said."""
    talk = Talk(wire)
    at: dict[str, Any] = {"pvm": [1, base, 500], "svm": [1, base, 500]}
    edges = [base + 500]
    for node in ("pvm", "svm"):
        wire.send(node, talk.tcp(1, ack=base, window=500))
    told_most = -1
    for is_pvm, data, ack, window in [*moves, (True, 0, 0, 500), (False, 0, 0, 500)]:
        node = "pvm" if is_pvm else "svm"
        me = at[node]
        me[1] += ack
        me[2] = window
        frame = talk.tcp(me[0], b"d" * data, ack=me[1], window=window)
        me[0] += data
        if not is_pvm:
            edges.append(me[1] + window)
        wire.send(node, frame)
        for got in wire.seen():
            heard = Heard.of(got)
            assert heard.sums_hold()
            said = (heard.ack - base) & M32
            assert said <= at["svm"][1] - base
            assert said <= at["pvm"][1] - base
            assert base + said + heard.window <= max(edges)
            told_most = max(told_most, said)
    at["svm"][1] = max(at["svm"][1], at["pvm"][1])  # the SVM catches up, in data too
    for node in ("pvm", "svm"):
        end = max(at["pvm"][0], at["svm"][0])
        wire.send(node, talk.tcp(at[node][0], b"d" * (end - at[node][0]), ack=at[node][1], window=500))
    for got in wire.released():
        told_most = max(told_most, (Heard.of(got).ack - base) & M32)
    assert told_most == at["pvm"][1] - base
    assert wire.nic()["held"] == 0


# ---- SACK ----


def sack(*edges: int) -> list[Any]:
    return [("NOP", None), ("NOP", None), ("SAck", edges)]


@pytest.mark.parametrize("data", [b"", b"data"])
@pytest.mark.parametrize("again", [False, True])
def test_a_sack_block_that_the_svm_has_not_is_blanked(wire: Wire, talk: Talk, data: bytes, again: bool) -> None:
    """The client takes it for received and would not send it again: promise 2, also for what was proven before."""
    open_stream(wire, talk)
    if again and data:
        wire.pvm(talk.tcp(2, data))
        wire.svm(talk.tcp(2, data))
        assert len(wire.released(1)) == 1
    wire.pvm(talk.tcp(2, data, options=sack(2000, 3000)))
    wire.svm(talk.tcp(2, data))
    got = wire.released(1)
    assert told(got) == [(1000, 500)]
    heard = Heard.of(got[0])
    assert (heard.seq, heard.data, heard.sack) == (2, data, [])


@pytest.mark.parametrize("svm", [(2000, 3000), (1500, 3500), (7000, 8000, 2000, 3000)])
def test_a_sack_block_that_both_have_goes_out(wire: Wire, talk: Talk, svm: tuple[int, ...]) -> None:
    open_stream(wire, talk)
    wire.svm(talk.tcp(2, options=sack(*svm)))
    frame = talk.tcp(2, options=sack(2000, 3000))
    wire.pvm(frame)
    got = wire.released(1)
    same_frames(got, [frame])
    assert Heard.of(got[0]).sack == [2000, 3000]


def test_a_sack_block_below_the_svms_ack_goes_out(wire: Wire, talk: Talk) -> None:
    """It reports a duplicate (RFC 2883)."""
    open_stream(wire, talk)
    frame = talk.tcp(2, options=sack(900, 1000))
    wire.pvm(frame)
    same_frames(wire.released(1), [frame])
