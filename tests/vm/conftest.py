"""What the tests in QEMU share: Debian's kernel, the repository and a way to run a command under it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf.lab import image
from tests.vm import machine
from tests.vm.machine import Result

REPO = Path(__file__).resolve().parents[2]

RunInVm = Callable[..., Result]


@pytest.fixture(scope="session")
def debian_kernel() -> image.Kernel:
    """Debian 12's own kernel; skips only where `deploy/install-deps.sh test` has not run."""
    for tool in (machine.QEMU, str(machine.VIRTIOFSD), str(image.BUSYBOX), "cpio"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: run deploy/install-deps.sh test")
    kernel = image.find_kernel()
    if kernel is None:
        pytest.skip("no linux-image-cloud-amd64 of Debian 12: run deploy/install-deps.sh test")
    return kernel


@pytest.fixture
def in_vm(debian_kernel: image.Kernel, tmp_path: Path) -> RunInVm:
    """Calls machine.run with this repository: `in_vm("uname -r", timeout_s=20)`."""

    def run(command: str, timeout_s: float, under: str = machine.INIT) -> Result:
        return machine.run(debian_kernel, command, repo=REPO, work_dir=tmp_path, timeout_s=timeout_s, under=under)

    return run
