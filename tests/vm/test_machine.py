"""The virtual machine itself: results come back whole, and nothing of it outlives a failure."""

import threading
from pathlib import Path

import pytest

from coloebpf.lab.image import Kernel, find_kernel
from tests.vm import machine
from tests.vm.ahead import REPO
from tests.vm.conftest import RunInVm
from tests.vm.machine import VmError

pytestmark = pytest.mark.vm


def machines_of(work_dir: Path) -> list[str]:
    """Names of the processes that run in `work_dir`: QEMU and virtiofsd do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink().is_relative_to(work_dir):
                found.append((entry / "comm").read_text())
        except OSError:
            continue  # it ended in the meantime
    return found


def test_the_guest_runs_debians_kernel_on_the_hosts_files(
    in_vm: RunInVm, debian_kernel: Kernel, tmp_path: Path
) -> None:
    readme = (REPO / "README.md").read_text()
    result = in_vm("uname -r; pwd; findmnt -no FSTYPE /sys/fs/bpf; echo x > README.md; cat README.md", 60)
    assert result.output.split() == [debian_kernel.release, str(REPO), "bpf", "x"]
    assert result.exit_code == 0
    assert (REPO / "README.md").read_text() == readme, "the guest wrote to the host"
    assert machines_of(tmp_path) == []


def test_an_exit_code_and_both_streams_come_back(in_vm: RunInVm) -> None:
    result = in_vm("echo out; echo err >&2; exit 7", 60)
    assert (result.exit_code, result.output) == (7, "out\nerr\n")


def test_a_command_that_hangs_is_ended(in_vm: RunInVm, tmp_path: Path) -> None:
    seen: list[str] = []
    look = threading.Timer(2, lambda: seen.extend(machines_of(tmp_path)))
    look.start()
    with pytest.raises(VmError, match=r"not done after 3 s[\s\S]*still here"):
        in_vm("echo still here; sleep 1000", 3)
    look.join()
    assert any(name.startswith("qemu") for name in seen), "machines_of() does not see a running machine"
    assert machines_of(tmp_path) == []


def test_a_panic_is_told_with_the_console(in_vm: RunInVm, tmp_path: Path) -> None:
    with pytest.raises(VmError, match=r"ended without a result[\s\S]*sysrq triggered crash"):
        in_vm("echo c > /proc/sysrq-trigger; sleep 100", 60)
    assert machines_of(tmp_path) == []


def test_find_kernel_takes_the_newest_that_has_modules(tmp_path: Path) -> None:
    for release, with_modules in (("6.1.0-9", True), ("6.1.0-56", True), ("6.1.0-57", False), ("6.12.1-1", True)):
        image = tmp_path / f"boot/vmlinuz-{release}-cloud-amd64"
        image.parent.mkdir(exist_ok=True)
        image.touch()
        if with_modules:
            (tmp_path / f"lib/modules/{release}-cloud-amd64/kernel").mkdir(parents=True)
    found = find_kernel((tmp_path / "empty", tmp_path))
    assert found is not None
    assert found.release == "6.1.0-56-cloud-amd64"
    assert find_kernel((tmp_path / "empty",)) is None


def test_a_boot_that_stalls_is_tried_again_and_then_told(
    in_vm: RunInVm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "BOOT_LIMIT_S", 0.3)
    with pytest.raises(machine.BootStallError, match=r"not up after 0\.3 s"):
        in_vm("true", 5)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["boot1", "boot2", "boot3"]
    assert machines_of(tmp_path) == []
