"""What the rules of other modules promise holds for connections that the client knows by other numbers as well.

Their tests run here once more, on a primary that translates at its vif (bpf/alias.h): whatever is held, compared,
answered and flushed has the guest's numbers, whatever reaches the client has the client's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from coloebpf.lab.plan import PAIR
from coloebpf.model import State
from tests.lab import test_checkpoints, test_compare_acks, test_compare_again, test_gso, test_states
from tests.lab.aliased import DELTA, TICKS, AliasedWire
from tests.lab.conftest import Lab, begin
from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk

pytestmark = pytest.mark.lab

RULES = (
    test_checkpoints.test_a_flush_keeps_the_order,
    test_checkpoints.test_a_stream_half_matched_at_the_checkpoint,
    test_checkpoints.test_acks_after_a_checkpoint,
    test_checkpoints.test_an_ack_of_the_new_svm_may_come_before_the_flush,
    test_checkpoints.test_output_between_suspended_and_committed_waits_for_proof,
    test_checkpoints.test_the_next_pvm_packet_finds_the_commit_too,
    test_compare_acks.test_a_pure_ack_below_the_svms_goes_at_once,
    test_compare_acks.test_a_sack_block_that_both_have_goes_out,
    test_compare_acks.test_a_sack_block_that_the_svm_has_not_is_blanked,
    test_compare_acks.test_a_shut_window_is_opened_again,
    test_compare_acks.test_an_owed_ack_has_no_timestamps_where_there_are_none,
    test_compare_acks.test_data_carry_the_lower_ack_and_window,
    test_compare_acks.test_the_owed_ack_follows_when_the_svm_catches_up,
    test_compare_again.test_a_pvm_only_retransmission_goes_out_at_once,
    test_compare_again.test_a_repeated_fin_goes_out_at_once,
    test_compare_again.test_a_retransmission_with_new_bytes_waits_for_them,
    test_gso.test_a_checksum_left_open_is_right_at_the_client,
    test_gso.test_a_super_packet_acknowledges_no_more_than_the_svm,
    test_gso.test_a_super_packet_is_compared_as_the_segments_it_stands_for,
    test_gso.test_fin_and_wrap,
    test_gso.test_open_checksums_of_a_flow_that_releases_itself,
    test_gso.test_super_packets_one_after_the_other,
    test_gso.test_the_kernels_limit_of_tail_calls_leaves_no_owner_behind,
    test_gso.test_the_svm_may_be_half_ahead,
    test_states.test_passthrough_of_what_was_held_keeps_its_acks,
    test_states.test_passthrough_releases_everything_in_order,
    test_states.test_passthrough_sends_acks_and_windows_as_they_are,
    test_states.test_without_protection_output_passes,
)
globals().update({rule.__name__: rule for rule in RULES})  # with the fixtures of this module

TCP = 6
SOFT = [("NOP", None), ("NOP", None)]


@pytest.fixture(scope="module")
def wire(bare_lab: Lab) -> Iterator[AliasedWire]:
    """The bare lab, every connection of which is an older guest's."""
    with closing(AliasedWire(bare_lab.plan)) as wire:
        begin(wire)
        yield wire


@pytest.fixture(autouse=True)
def _clean(wire: AliasedWire) -> Iterator[None]:
    yield
    for control in wire.control.values():
        control.set_state(PAIR, State.LOCKSTEP)
    wire.clean()


def test_the_client_sees_numbers_that_no_vm_has(wire: AliasedWire, talk: Talk) -> None:
    """What the other tests here stand on."""
    frame = talk.tcp(2, b"y", options=[*SOFT, ("Timestamp", (7, 8))])
    wire.pvm(frame)
    wire.svm(frame)
    (raw,) = wire.as_sent(1)
    assert (Heard.of(raw).seq, Heard.of(raw).ack) == ((2 + DELTA) & M32, 1000)
    assert Heard.of(raw).timestamps == ((7 + TICKS) & M32, 8)
    assert Heard.of(raw).sums_hold()


def test_both_vms_hear_the_client_in_the_guests_numbers(wire: AliasedWire, talk: Talk) -> None:
    wire.pvm(talk.tcp(1, b"x"))
    wire.svm(talk.tcp(1, b"x"))
    wire.released(1)
    sack = ("SAck", (500, 600, 700, 800))
    frame = talk.client_tcp(1000, b"question", ack=2, options=[*SOFT, ("Timestamp", (9, 4711)), *SOFT, sack])
    wire.client(frame)
    for vm in ("pvm", "svm"):
        assert wire.await_frames(vm, 1) == [frame]


def test_the_svm_is_answered_in_the_guests_numbers(wire: AliasedWire, talk: Talk) -> None:
    """The copy of the client's ACK was lost on fwd, and the SVM repeats what it was not acknowledged."""
    data = talk.tcp(1, b"data")
    wire.pvm(data)
    wire.svm(data)
    assert len(wire.released(1)) == 1
    wire.client(talk.client_tcp(1000, ack=5))
    wire.seen("svm")
    wire.svm(data)
    (answer,) = wire.await_frames("svm", 1)
    assert (Heard.of(answer).seq, Heard.of(answer).ack) == (1000, 5)
    assert Heard.of(answer).sums_hold()


def test_exempt_connections_are_translated_too(wire: AliasedWire, talk: Talk) -> None:
    wire.control["primary"].exempt_add(TCP, talk.guest_port, "::/0")
    try:
        frame = talk.tcp(1, b"x")
        wire.pvm(frame)
        same_frames(wire.released(1), [frame])
    finally:
        wire.control["primary"].exempt_del(TCP, talk.guest_port, "::/0")


def test_nothing_else_changes(wire: AliasedWire, talk: Talk) -> None:
    wire.pvm(talk.udp(b"abc"))
    wire.svm(talk.udp(b"abc"))
    assert wire.released(1) == [talk.udp(b"abc")]
    wire.client(talk.udp(b"abc", output=False))
    assert wire.await_frames("pvm", 1) == [talk.udp(b"abc", output=False)]
