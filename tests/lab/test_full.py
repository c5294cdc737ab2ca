"""Full slab, full FIFO, full flow table: the newest is refused and a checkpoint asked for, nothing accepted is lost."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from coloebpf.dataplane import Dataplane, NicSpec, Sizes
from coloebpf.lab import commands
from coloebpf.lab.hosts import ROLES
from coloebpf.lab.plan import HOSTS, PAIR, LabPlan
from coloebpf.model import State
from coloebpf.netns import inside
from tests.lab.conftest import new_name
from tests.lab.heard import Heard, same_frames
from tests.lab.talk import Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

SLOTS, FLOWS = 512, 64
SHARE = 8  # a flow may hold this part of the slab: MAX_FIFO of bpf/constants.h


def attach(plan: LabPlan, host: str) -> None:
    """One host's dataplane, as small as can be."""
    with inside(plan.namespace(host)):
        dataplane = Dataplane.load(plan.pin_dir(host), Sizes(slots=SLOTS, flows=FLOWS))
        for nic in plan.nic_list():
            dataplane.attach(NicSpec(nic.nic, PAIR, ROLES[host], nic.vif, nic.fwd, nic.vlan, nic.mac))


def bring_up(plan: LabPlan) -> None:
    with ProcessPoolExecutor(max_workers=len(HOSTS), mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(attach, plan, host) for host in HOSTS]:
            done.result()


@pytest.fixture(scope="module")
def small() -> Iterator[Wire]:
    """A lab with few slots and flows; the tests that fill the flows come last."""
    plan = LabPlan(new_name())
    try:
        commands.up(plan, bring_up)
        wire = Wire(plan)
        for host in reversed(HOSTS):
            wire.control[host].set_state(PAIR, State.LOCKSTEP)
        yield wire
        wire.close()
    finally:
        commands.down(plan)


@pytest.fixture(autouse=True)
def _clean(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"small", "wire"} & set(request.fixturenames):
        request.getfixturevalue(name).clean()


def test_a_full_slab(small: Wire) -> None:
    """Whatever came first is kept and leaves by the commit; the rest was refused, newest first."""
    wire, talks = small, [Talk(small) for _ in range(SHARE + 1)]
    sent = [talk.udp(b"%03d" % n) for talk in talks for n in range(SLOTS // SHARE)]
    for talk in talks:  # one after the other: flows may take different CPUs
        wire.pvm(*[f for f in sent if Heard.of(f).word(0, 2) == talk.guest_port])
    count = wire.nic()
    kept = count["held"]
    assert SLOTS * 3 // 4 <= kept <= SLOTS
    assert sum(n for name, n in count.items() if name.startswith("dropped")) == len(sent) - kept
    assert count["high_waters"] >= SHARE  # those of the flows that were filled, and the slab's
    assert wire.last_event("high_water")["reason"] in ("no_slot", "fifo_full")
    assert wire.seen() == []
    wire.checkpoint()
    got = wire.released(kept)
    assert sorted(got) == sorted(sent[:kept])
    for talk in talks:
        mine = [f for f in sent[:kept] if Heard.of(f).word(0, 2) == talk.guest_port]
        same_frames([f for f in got if f in mine], mine)
    status = wire.status()
    assert status["slots"]["free"] >= SLOTS - 4  # one is kept by each CPU
    other = Talk(wire)
    wire.pvm(other.udp(b"again"))
    wire.svm(other.udp(b"again"))
    same_frames(wire.released(1), [other.udp(b"again")])


def test_a_slab_full_of_the_svms(small: Wire) -> None:
    """What can't be parked is dropped and counted; what was parked proves."""
    wire, before, talks = small, small.nic(), [Talk(small) for _ in range(3)]
    frames = [talks[n % 3].udp(b"%03d" % n) for n in range(SLOTS + 40)]
    wire.svm(*frames)
    count = wire.nic().since(before)
    assert sum(n for name, n in count.items() if name.startswith("dropped")) == len(frames) - count["parked"]
    assert count["parked"] == 3 * SLOTS // SHARE
    wire.checkpoint()  # voids all of it
    for frame in frames[:10]:
        wire.pvm(frame)
        assert wire.seen() == []
        wire.svm(frame)
        same_frames(wire.released(1), [frame])


def test_a_stream_through_a_full_slab(small: Wire) -> None:
    """TCP: what was refused is sent again, and goes on in order."""
    wire, talk = small, Talk(small)
    sent = [talk.tcp(1 + 4 * n, b"%04d" % n) for n in range(SLOTS // SHARE * 2)]
    wire.pvm(*sent)
    kept = wire.nic()["held"]
    assert SLOTS // SHARE <= kept < len(sent)
    wire.svm(*sent)
    same_frames(wire.released(kept), sent[:kept])
    wire.pvm(*sent[kept:])
    wire.svm(*sent[kept:])
    same_frames(wire.released(len(sent) - kept), sent[kept:])
    assert (wire.nic()["held"], wire.nic()["parked"]) == (0, 0)


def test_a_full_fifo(small: Wire) -> None:
    """One flow can't take the slab from the others."""
    wire, talk, before, limit = small, Talk(small), small.nic(), SLOTS // SHARE
    sent = [talk.udp(b"%04d" % n) for n in range(limit + 50)]
    wire.pvm(*sent)
    change = wire.nic().since(before)
    assert (change["held"], change["dropped.fifo_full"]) == (limit, 50)
    assert change["high_waters"] == 1
    event = wire.last_event("high_water")
    assert (event["reason"], event["flow"]["guest_port"]) == ("fifo_full", talk.guest_port)
    other = Talk(wire)
    wire.pvm(other.udp(b"mine"))
    wire.svm(other.udp(b"mine"))
    same_frames(wire.released(1), [other.udp(b"mine")])
    wire.checkpoint()
    same_frames(wire.released(limit), sent[:limit])


def test_a_full_fifo_of_the_svms(small: Wire) -> None:
    wire, talk, before, limit = small, Talk(small), small.nic(), SLOTS // SHARE
    sent = [talk.udp(b"%04d" % n) for n in range(limit + 50)]
    wire.svm(*sent)
    change = wire.nic().since(before)
    assert (change["parked"], change["dropped.fifo_full"]) == (limit, 50)
    wire.pvm(*sent)
    same_frames(wire.released(limit), sent[:limit])
    assert wire.nic().since(before)["held"] == 50
    wire.checkpoint()
    same_frames(wire.released(50), sent[limit:])


def test_a_full_fifo_of_a_stream(small: Wire) -> None:
    wire, talk, before, limit = small, Talk(small), small.nic(), SLOTS // SHARE
    sent = [talk.tcp(1 + 4 * n, b"%04d" % n) for n in range(limit + 50)]
    wire.pvm(*sent)
    change = wire.nic().since(before)
    assert (change["held"], change["dropped.fifo_full"]) == (limit, 50)
    wire.svm(*sent)
    same_frames(wire.released(limit), sent[:limit])
    wire.pvm(*sent[limit:])
    same_frames(wire.released(50), sent[limit:])
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)


def test_a_full_flow_table(small: Wire) -> None:
    """New flows are refused, told and counted; those that exist go on."""
    wire, before, free = small, small.nic(), small.status()["flows"]["free"]
    talks = [Talk(wire) for _ in range(free + 5)]
    frames = [talk.udp(b"hello") for talk in talks]
    for frame in frames:
        wire.pvm(frame)
    count = wire.nic().since(before)
    assert (count["held"], count["dropped.no_flow"]) == (free, 5)
    assert count["high_waters"] >= 1
    assert wire.last_event("high_water")["reason"] == "no_flow"
    for frame in frames:
        wire.svm(frame)
    assert sorted(wire.released(free)) == sorted(frames[:free])
    wire.svm(talks[0].udp(b"more"))
    wire.pvm(talks[0].udp(b"more"))
    same_frames(wire.released(1), [talks[0].udp(b"more")])
    assert wire.status()["flows"]["free"] == 0


def test_a_full_table_of_translations(small: Wire) -> None:
    """New connections keep the SVM's numbers (and diverge); live ones are not forgotten."""
    wire = small
    free = wire.status("secondary")["flows"]["free"]
    talks = [Talk(wire) for _ in range(free + 4)]
    wire.checkpoint()  # the switch has learned where the guest is
    for talk in talks:
        wire.client(talk.client_tcp(70, flags="S", ack=0))
        wire.svm(talk.tcp(900, flags="SA", ack=71))
        wire.client(talk.client_tcp(71, ack=101))  # the PVM's ISN is 100
    wire.seen("svm")
    for number, talk in enumerate(talks):
        wire.client(talk.client_tcp(71, b"q", ack=101))
        got = wire.await_frames("svm", 1)
        assert [Heard.of(f).ack for f in got] == [901 if number < free else 101]
    count = wire.nic(host="secondary")
    assert count["dropped.no_flow"] >= 4
    assert wire.last_event("high_water", "secondary")["reason"] == "no_flow"


def test_one_svm_packet_proves_a_full_fifo(wire: Wire) -> None:
    """A thousand packets wait behind the first: one arrival lets all of them go, in order."""
    talk, limit = Talk(wire), 1024
    sent = [talk.udp(b"%04d" % n) for n in range(limit)]
    wire.pvm(*sent)
    wire.svm(*sent[1:120])
    assert wire.seen() == []
    wire.svm(sent[0])
    same_frames(wire.released(120), sent[:120])
    for start in range(120, limit, 100):
        wire.svm(*sent[start : start + 100])
    same_frames(wire.released(limit - 120), sent[120:])


def test_a_late_svm_says_a_thousand_segments_at_once(wire: Wire) -> None:
    """The hole of the SVM's stream is filled: one packet, one release of everything."""
    talk = Talk(wire)
    sent = [talk.tcp(1 + 4 * n, b"%04d" % n) for n in range(1000)]
    wire.pvm(*sent)
    wire.svm(*sent[1:])
    assert wire.seen() == []
    wire.svm(sent[0])
    wire.kick()
    same_frames(wire.released(1000), sent)
    assert (wire.nic()["held"], wire.nic()["parked"]) == (0, 0)
