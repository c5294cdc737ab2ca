"""A PVH guest protected by plain Remus on two real Xen hosts, with Debian's own packages: coloebpf is its network buffer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xen import scenario
from tests.xen.counter import PATIENCE_S, pair
from tests.xen.guests import Guest
from tests.xen.lab import Lab
from tests.xen.scenario import Protected

pytestmark = [pytest.mark.xen, pytest.mark.timeout(7200)]
GUEST = Guest("web", "pvh", 22, 128)
CHECKPOINTS = 20


@pytest.fixture(scope="module")
def protected(lab: Lab) -> Iterator[Protected]:
    table = '[pair.libxl_remus]\nstream_listen = "{address}:7792"\ninterval_ms = 1000'
    with scenario.protected_pair(lab, "libxl-remus", "", table, GUEST) as pair:
        yield pair


def test_doctor_is_content(protected: Protected) -> None:
    scenario.doctor_is_content(protected.lab)


def test_protect(protected: Protected) -> None:
    """Each answer waits for the checkpoint behind it."""
    lab, counter = protected.lab, protected.counter
    counter.count()
    print(lab.run(1, "coloebpf protect web", timeout=PATIENCE_S))
    counter.start()
    counter.goes_on(CHECKPOINTS)
    made = sum(pair(lab, 1)["checkpoints"].values())
    print(f"{counter.value} answers, {made} checkpoints; the longest took {counter.longest_s:.1f} s")
    assert made >= CHECKPOINTS // 2


def test_failover(protected: Protected) -> None:
    """The SVM goes on from the last checkpoint: no client was told of anything later."""
    scenario.host_1_dies(protected)
