"""The engine libxl-live with its memory copied ahead, on two real Xen hosts with Debian's own packages and one library."""

from __future__ import annotations

import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen import scenario
from tests.xen.counter import pair, until
from tests.xen.lab import Lab
from tests.xen.plan import HOSTS
from tests.xen.scenario import Protected

pytestmark = [pytest.mark.xen, pytest.mark.timeout(7200)]

SOURCE = Path(__file__).parents[2] / "deploy/xen/precopy/precopy.c"
DIVERGENCES = 5
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


def test_divergences_that_come_seldom(protected: Protected) -> None:
    """Each behind the first round of the copy ahead, which has all of the memory."""
    lab = protected.lab
    before, took = pair(lab, 1)["checkpoints"].get("divergence", 0), []
    for _ in range(DIVERGENCES):
        until(lambda: copied_ahead(lab) > scenario.GUEST.memory, "all of the memory")
        began = time.monotonic()
        assert float(protected.server.time()) > 0
        took.append(time.monotonic() - began)
        print(f"answer {len(took)} after {took[-1]:.1f} s, the count is {protected.counter.value}")
    assert pair(lab, 1)["checkpoints"].get("divergence", 0) - before >= DIVERGENCES - 1
    print(f"from question to answer: median {statistics.median(took):.1f} s, worst {max(took):.1f} s")
    protected.counter.goes_on(5)


def copied_ahead(lab: Lab) -> int:
    """MiB of the copy that is kept going; 0: there is none."""
    said = re.match(r"(\d+) MiB .* ahead", pair(lab, 1)["engine_progress"])
    return int(said[1]) if said else 0


def test_failover(protected: Protected) -> None:
    scenario.host_1_dies(protected)
