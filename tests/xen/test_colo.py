"""An HVM guest protected by libxl's COLO on two real Xen hosts, with packages that deploy/xen/rebuild.sh has made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.xen import scenario, service
from tests.xen.counter import until
from tests.xen.lab import Lab
from tests.xen.scenario import Protected

pytestmark = [pytest.mark.xen, pytest.mark.rebuilt, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def protected(lab: Lab) -> Iterator[Protected]:
    table = '[pair.libxl_colo]\nlisten = "127.0.0.1:9000"\nstream_listen = "{address}:7792"'
    with scenario.protected_pair(lab, "libxl-colo", "", table) as pair:
        yield pair


def test_doctor_is_content(protected: Protected) -> None:
    scenario.doctor_is_content(protected.lab)


def test_protect(protected: Protected) -> None:
    """The guest was not started paused."""
    scenario.protect(protected)


def test_divergences(protected: Protected) -> None:
    scenario.diverging(protected)


def test_the_svm_is_well(protected: Protected) -> None:
    """Its kernel has not crashed meanwhile, which the checkpoints would not tell: it proves what the PVM says."""
    lab = protected.lab
    before = proven(lab)
    protected.counter.goes_on(20)
    until(lambda: proven(lab) > before + 20, "packets that the SVM proves")


def proven(lab: Lab) -> int:
    """Packets of the PVM that left because the SVM had said the same."""
    [nic] = service.status(lab, 1)["dataplane"]["nics"]
    return int(nic["compared_packets"])


def test_unprotect_and_protect_again(protected: Protected) -> None:
    lab = protected.lab
    lab.run(1, "coloebpf unprotect web")
    until(lambda: len(lab.run(2, "xl list").splitlines()) == 2, "the SVM's end")
    protected.counter.goes_on(5)
    lab.run(1, "coloebpf protect web", timeout=1200)
    protected.counter.goes_on(20)


def test_failover(protected: Protected) -> None:
    scenario.host_1_dies(protected)
