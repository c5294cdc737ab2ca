"""Given any moment, when any fault strikes, then no connection breaks, one host speaks, and each byte was proven.

`make test` tries each fault once, at one of the moments; COLO_FAULT_ROUNDS=N tries each at each moment N times. A
failure tells the seed, which COLO_FAULT_SEED takes.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator

import pytest

from coloebpf.lab import services
from tests.lab.faults import BOTH, FAULTS, MOMENTS, PRIMARY, REPLICA, Fault
from tests.lab.probe import Probe
from tests.lab.service_lab import PATIENT_MS, ServiceLab, until
from tests.lab.speakers import Speakers

pytestmark = [pytest.mark.lab, pytest.mark.real_time]
ROUNDS = int(os.environ.get("COLO_FAULT_ROUNDS", "0"))
SEED = int(os.environ.get("COLO_FAULT_SEED", "0")) or random.randrange(1, 1 << 32)
COPY_MS = 100  # in which the replica says what it has still to say, on a busy machine, too
LATE_S = 45.0  # TCP tries again after twice as long each time: what stood still for 10 s is there after 20
QUICK_MS = 400  # twice the default: what happens is to be the test's doing, also on a busy machine
# The engine copies nothing: while the replica is deaf nothing but the test may ask for a checkpoint.
PATIENT_PAIR = "compare_timeout_ms = 30000\ninterval_max_ms = 60000"
ALONE = {REPLICA: ("secondary", "promoted"), PRIMARY: ("primary", "passthrough")}


def cases() -> Iterator[tuple[str, str]]:
    """A moment and a fault each."""
    for number, (name, fault) in enumerate(FAULTS.items()):
        fitting = [moment for moment in MOMENTS if not (fault.deaf and moment == "one checkpoint after the other")]
        yield from ((moment, name) for moment in (fitting if ROUNDS else [fitting[number % len(fitting)]]))


def serving(lab: ServiceLab) -> str:
    """Who goes on alone, or both in lock-step."""
    return next((end for end, (host, state) in ALONE.items() if lab.state(host) == state), BOTH)


@pytest.mark.parametrize("number", range(max(1, ROUNDS)))
@pytest.mark.parametrize(("moment", "name"), cases(), ids=lambda word: word.replace(" ", "_"))
def test_given_a_moment_when_a_fault_strikes_then_the_client_is_served_by_one_host_and_with_proven_bytes(
    lab: ServiceLab, moment: str, name: str, number: int
) -> None:
    seed = f"{SEED + number}"
    try:
        play(lab, moment, FAULTS[name], random.Random(f"{seed} {moment} {name}"))
    except BaseException as e:
        e.add_note(f"given {moment}, when {name}: COLO_FAULT_SEED={seed}")
        raise


def play(lab: ServiceLab, moment: str, fault: Fault, dice: random.Random) -> None:
    client = lab.fresh(
        fault.arbiter,
        PATIENT_MS if fault.brief and fault.arbiter != "etcd" else QUICK_MS,
        pair_changes=PATIENT_PAIR if fault.deaf else "",
        copy_ms=COPY_MS,
    )
    watch, probe = Speakers(lab.plan), None if fault.deaf else Probe(lab)
    try:
        end_moment = MOMENTS[moment](lab, dice)
        fault.strike(lab, dice)
        if fault.undecided:
            time.sleep(dice.uniform(0.5, 2.0))
            assert serving(lab) == BOTH, "somebody goes on alone without the arbiter's word"
            fault.mend(lab, dice)
        if not fault.brief:
            until(lambda: serving(lab) in fault.ends, f"one goes on: {' or '.join(fault.ends)}")
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
