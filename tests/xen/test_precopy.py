"""The engine libxl-live with its memory copied ahead, on two real Xen hosts with Debian's own packages and one library."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen import scenario
from tests.xen.counter import until
from tests.xen.lab import Lab
from tests.xen.plan import HOSTS
from tests.xen.scenario import Protected

pytestmark = [pytest.mark.xen, pytest.mark.timeout(7200)]

SOURCE = Path(__file__).parents[2] / "deploy/xen/precopy/precopy.c"
LIBRARY = "/usr/lib/coloebpf/precopy.so"
COMPILER = ("gcc", "-O2", "-shared", "-fPIC")


@pytest.fixture(scope="module")
def protected(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    made = tmp_path_factory.mktemp("precopy") / "precopy.so"
    subprocess.run([*COMPILER, "-o", str(made), str(SOURCE)], check=True)
    for host in HOSTS:
        place = lab.ssh(host, "--", f"mkdir -p $(dirname {LIBRARY}) && cat >{LIBRARY}")
        subprocess.run(place, input=made.read_bytes(), check=True)
    table = f'[pair.libxl_live]\nlisten = "{{address}}:7790"\nprecopy = "{LIBRARY}"'
    with scenario.protected_pair(lab, "libxl-live", 'standby_vif = "web1"', table) as pair:
        yield pair


def test_doctor_is_content(protected: Protected) -> None:
    scenario.doctor_is_content(protected.lab)


def test_protect(protected: Protected) -> None:
    scenario.protect(protected)


def test_a_copy_is_under_way_and_the_guest_runs(protected: Protected) -> None:
    lab = protected.lab
    until(lambda: lab.run(2, "xl list").count("web--") == 2, "a domain beside the SVM")
    protected.counter.goes_on(20)
    assert lab.run(1, "pgrep -fc libxl-save-helper").strip() == "1"


def test_divergences(protected: Protected) -> None:
    scenario.diverging(protected)


def test_failover(protected: Protected) -> None:
    scenario.host_1_dies(protected)
