"""The lab with virtual machines: a real guest with a real server on a tap, and nothing left of it afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from coloebpf.lab import image, machine, needs
from coloebpf.lab.plan import LabPlan
from tests.lab.conftest import LabMaker, coloebpf

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.real_time]


@pytest.fixture(autouse=True)
def _there() -> None:
    missing = [tool for tool in needs.VIRTUAL if shutil.which(tool) is None]
    if missing or image.find_kernel() is None:
        pytest.skip(f"{', '.join(missing) or 'the cloud kernel'} missing: run deploy/install-deps.sh lab")


def machines(name: str) -> list[int]:
    """QEMU processes that have the lab's name on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"/{name}/" in (entry / "cmdline").read_text() and (entry / "comm").read_text().startswith("qemu"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def test_an_unprotected_machine_answers_over_both_protocols_and_is_gone_with_its_lab(make_lab: LabMaker) -> None:
    lab = make_lab(guests="qemu", how=["--unprotected"])
    nic = lab.plan.nic_list()[0]
    for address in (nic.guest_v4, nic.guest_v6):
        done = lab.run("client", "redis-cli", "-h", address, "incr", "counter")
        assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"
    status = lab.status()
    assert status["state"] == "unprotected"
    assert status["machines"] == {"primary": machines(lab.plan.name), "secondary": []}
    assert len(status["machines"]["primary"]) == 1
    assert "machines    1 on primary, 0 on secondary" in coloebpf("lab", "status", "--name", lab.plan.name).stdout
    done = lab.run("pvm", "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert "is a virtual machine" in done.stderr
    assert coloebpf("lab", "down", "--name", lab.plan.name).returncode == 0
    assert machines(lab.plan.name) == []
    assert not lab.plan.run_dir.exists()


def test_down_works_when_the_machine_has_died(make_lab: LabMaker) -> None:
    lab = make_lab(guests="qemu", how=["--unprotected"])
    (pid,) = machines(lab.plan.name)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while machines(lab.plan.name) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lab.status()["machines"]["primary"] == []
    assert coloebpf("lab", "down", "--name", lab.plan.name).returncode == 0
    assert list(Path("/run/netns").glob(f"colo-{lab.plan.name}-*")) == []


def test_a_machine_that_does_not_start_is_a_sentence_and_leaves_nothing(
    lab_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    false = tmp_path / machine.QEMU
    false.write_text("#!/bin/sh\necho 'no such machine' >&2\nexit 3\n")
    false.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    done = coloebpf("lab", "up", "--name", lab_name, "--guests", "qemu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "coloebpf: the virtual machine ended with code 3: no such machine\n"
    assert not LabPlan(lab_name).run_dir.exists()
    assert list(Path("/run/netns").glob(f"colo-{lab_name}-*")) == []


def test_the_image_is_packed_once_for_the_same_contents(tmp_path: Path) -> None:
    _, first = image.of_guest(tmp_path)
    made = first.stat().st_mtime_ns
    assert image.of_guest(tmp_path)[1] == first
    assert first.stat().st_mtime_ns == made


def test_the_image_is_packed_anew_when_a_file_of_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, first = image.of_guest(tmp_path)
    init = tmp_path / "init"
    init.write_text(image.INIT.read_text() + "# changed\n")
    monkeypatch.setattr(image, "INIT", init)
    _, second = image.of_guest(tmp_path)
    assert second != first
    assert list(tmp_path.glob("guest-*.cpio")) == [second]


@pytest.mark.slow
def test_the_show_holds(lab_name: str) -> None:
    done = coloebpf("lab", "show", "--name", lab_name, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "no acknowledged write is missing" in done.stdout
    assert not LabPlan(lab_name).run_dir.exists()
    assert machines(lab_name) == []
