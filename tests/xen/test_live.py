"""An HVM guest protected by the engine libxl-live on two real Xen hosts, with Debian's own packages: checkpoints, a failover."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xen import scenario
from tests.xen.counter import until
from tests.xen.lab import Lab
from tests.xen.scenario import Protected

pytestmark = [pytest.mark.xen, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def protected(lab: Lab) -> Iterator[Protected]:
    table = '[pair.libxl_live]\nlisten = "{address}:7790"'
    with scenario.protected_pair(lab, "libxl-live", 'standby_vif = "web1"', table) as pair:
        yield pair


def test_doctor_is_content(protected: Protected) -> None:
    scenario.doctor_is_content(protected.lab)


def test_protect(protected: Protected) -> None:
    scenario.protect(protected)


def test_divergences(protected: Protected) -> None:
    scenario.diverging(protected)


def test_old_replicas_end(protected: Protected) -> None:
    until(lambda: len(protected.lab.run(2, "xl list").splitlines()) <= 4, "the old one's end")


def test_failover(protected: Protected) -> None:
    scenario.host_1_dies(protected)
