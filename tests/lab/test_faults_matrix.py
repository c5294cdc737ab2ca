"""Given any moment, when any fault strikes, then no connection breaks, one host speaks, and each byte was proven.

`make test` tries one fault of each kind, at one moment: which ones is chosen by a seed, which a failure tells, and which
COLO_FAULT_SEED takes. COLO_FAULT_ROUNDS=N tries each fault at each moment N times.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest

from coloebpf.lab import guests, services
from tests.lab.faults import BOTH, FAULTS, MOMENTS, PRIMARY, REPLICA, Fault, release
from tests.lab.probe import Probe
from tests.lab.service_lab import FWD, PATIENT_MS, ServiceLab, until
from tests.lab.speakers import Speakers

pytestmark = [pytest.mark.lab, pytest.mark.real_time]
ROUNDS = int(os.environ.get("COLO_FAULT_ROUNDS", "0"))
SEED = int(os.environ.get("COLO_FAULT_SEED", "0")) or random.randrange(1, 1 << 32)
COPY_MS = 100  # in which the replica says what it has still to say, on a busy machine, too
LATE_S = 45.0  # TCP tries again after twice as long each time: what stood still for 10 s is there after 20
QUICK_MS = 1000  # what happens is to be the test's doing, also on a machine that takes half a second away now and then
# What hangs is to hang until the test lets it go.
HANGING_PAIR = "commit_timeout_ms = 120000\n"
# The engine copies nothing: while the replica is deaf nothing but the test may ask for a checkpoint.
PATIENT_PAIR = HANGING_PAIR + "compare_timeout_ms = 30000\ninterval_max_ms = 60000"
ALONE = {REPLICA: ("secondary", "promoted"), PRIMARY: ("primary", "passthrough")}
BEGINNING = "a protection that begins"


def cases() -> Iterator[tuple[str, str]]:
    """A moment and a fault each."""
    if ROUNDS:
        yield from ((moment, name) for name, fault in FAULTS.items() for moment in MOMENTS if fault.fits(moment))
        return
    dice = random.Random(SEED)
    for kind in dict.fromkeys(fault.kind for fault in FAULTS.values()):
        name = dice.choice([name for name, fault in FAULTS.items() if fault.kind == kind])
        yield dice.choice([moment for moment in MOMENTS if FAULTS[name].fits(moment)]), name


def at_the_beginning() -> list[str]:
    """Faults for a protection that has just begun: without COLO_FAULT_ROUNDS one that lasts, and one that is brief."""
    if ROUNDS:
        return list(FAULTS)
    dice = random.Random(SEED)
    return [dice.choice([name for name, fault in FAULTS.items() if fault.brief is brief]) for brief in (True, False)]


def serving(lab: ServiceLab) -> str:
    """Who goes on alone, or both in lock-step."""
    return next((end for end, (host, state) in ALONE.items() if lab.state(host) == state), BOTH)


@pytest.mark.parametrize("number", range(max(1, ROUNDS)))
@pytest.mark.parametrize(("moment", "name"), cases(), ids=lambda word: word.replace(" ", "_"))
def test_given_a_moment_when_a_fault_strikes_then_the_client_is_served_by_one_host_and_with_proven_bytes(
    lab: ServiceLab, moment: str, name: str, number: int
) -> None:
    with told(moment, name, number) as dice:
        play(lab, moment, FAULTS[name], dice)


@pytest.mark.parametrize("number", range(max(1, ROUNDS)))
@pytest.mark.parametrize("name", at_the_beginning(), ids=lambda word: word.replace(" ", "_"))
def test_given_a_protection_that_begins_when_a_fault_strikes_then_only_the_primary_is_heard_until_it_has_begun(
    lab: ServiceLab, name: str, number: int
) -> None:
    with told(BEGINNING, name, number) as dice:
        (play_begun if FAULTS[name].brief else play_beginning)(lab, FAULTS[name], dice)


@contextmanager
def told(moment: str, name: str, number: int) -> Iterator[random.Random]:
    """The dice of a try; its failure tells how to throw them again."""
    try:
        yield random.Random(f"{SEED + number} {moment} {name}")
    except BaseException as e:
        e.add_note(f"given {moment}, when {name}: COLO_FAULT_SEED={SEED + number}")
        raise


def how(fault: Fault) -> dict[str, Any]:
    """Of ServiceLab.fresh() and beginning()."""
    return {
        "arbiter": fault.arbiter,
        "peer_timeout_ms": PATIENT_MS if fault.brief and fault.arbiter != "etcd" else QUICK_MS,
        "pair_changes": PATIENT_PAIR if fault.deaf else HANGING_PAIR,
        "copy_ms": COPY_MS,
    }


def play(lab: ServiceLab, moment: str, fault: Fault, dice: random.Random) -> None:
    client = lab.fresh(**how(fault))
    watch, probe = Speakers(lab.plan), None if fault.deaf else Probe(lab)
    try:
        end_moment = MOMENTS[moment](lab, dice)
        fault.strike(lab, dice)
        if fault.undecided:
            time.sleep(dice.uniform(0.5, 2.0))
            assert serving(lab) == BOTH, "somebody goes on alone without the arbiter's word"
            fault.mend(lab, dice)
        if not fault.brief:
            until(lambda: serving(lab) in fault.ends, f"one goes on: {' or '.join(fault.ends)}", LATE_S)
            client.goes_on(within_s=LATE_S)
        end = serving(lab)
        if not (fault.brief or fault.undecided):
            fault.mend(lab, dice)
        if end == BOTH:
            lab.replicas_agree()
        end_moment()
        if end == BOTH:
            _still_in_lockstep(lab)
        client.goes_on(50, LATE_S)
        assert serving(lab) == (REPLICA if end == BOTH else end)
    finally:
        watch.stop()
        if probe is not None:
            probe.finish()
    watch.check()
    client.check()
    if probe is not None:
        probe.check()


def _still_in_lockstep(lab: ServiceLab) -> None:
    """Another checkpoint; and then the replica takes over, which shows that it knows all that the client was told."""
    lab.in_lockstep()
    lab.checkpoint()
    assert lab.counter
    lab.counter.goes_on(within_s=LATE_S)
    services.client_of(lab.plan, "primary", "failover", pair=services.PAIR_NAME)
    until(lambda: serving(lab) == REPLICA, "the replica takes over")


def play_beginning(lab: ServiceLab, fault: Fault, dice: random.Random) -> None:
    """A fault that lasts. The secondary is no replica yet: it does not take over, and has nobody switched off."""
    client = lab.beginning(**how(fault))
    watch = Speakers(lab.plan)
    try:
        fault.strike(lab, dice)
        observer = "secondary" if fault.ends == (REPLICA,) else "primary"
        for path in ("management", FWD):
            until(
                partial(lab.warns, observer, f"no heartbeat comes on {path}"), f"the {observer} misses {path}", LATE_S
            )
        assert serving(lab) == BOTH, "somebody goes on alone, and nobody may have to"
        assert guests.running(lab.plan, observer)
        if lab.powered("primary"):
            client.goes_on(50, LATE_S)
        fault.mend(lab, dice)
        assert lab.state("secondary") != "promoted"
    finally:
        watch.stop()
    watch.check()
    assert not watch.heard["secondary"].frames


def play_begun(lab: ServiceLab, fault: Fault, dice: random.Random) -> None:
    """A fault for a moment: the client notices nothing, and the protection comes about."""
    client = lab.beginning(**how(fault))
    watch = Speakers(lab.plan)
    try:
        fault.strike(lab, dice)
        client.goes_on(within_s=LATE_S)
        assert not watch.heard["secondary"].frames
        client.finish()
        lab.blank()
        release(lab)
        lab.in_lockstep()
        client = lab.counted()
        _still_in_lockstep(lab)
        client.goes_on(50, LATE_S)
    finally:
        watch.stop()
    watch.check()
    client.check()
