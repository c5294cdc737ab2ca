"""What the tests in QEMU share: Debian's kernel, the repository and a way to run a command under it."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf.lab import image
from tests.vm import machine
from tests.vm.ahead import REPO, Ahead
from tests.vm.machine import Result

FUZZ_FRAMES = 20_000  # a million take minutes there; tests/unit shows them to this machine's kernel
PYTHON = ".venv/bin/python"
UNIT_TESTS = f"{PYTHON} -m pytest tests/unit -m kernel -q -p no:cacheprovider -o timeout=3000 --durations=10"
COMMANDS = {
    "unit": f"COLOEBPF_FUZZ_FRAMES={FUZZ_FRAMES} {UNIT_TESTS}",
    "smoke": f"{PYTHON} -m tests.vm.loader_smoke",
}
RUNS = pytest.StashKey[dict[str, Ahead]]()

RunInVm = Callable[..., Result]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What takes ten minutes begins before the first test."""
    if session.config.option.collectonly or not any(
        "runs" in getattr(item, "fixturenames", ()) for item in session.items
    ):
        return
    if image.find_kernel() is not None:
        session.config.stash[RUNS] = {
            name: Ahead(command, Path(tempfile.mkdtemp(prefix=f"vm-{name}-"))) for name, command in COMMANDS.items()
        }


def pytest_unconfigure(config: pytest.Config) -> None:
    for run in config.stash.get(RUNS, {}).values():
        run.end()


@pytest.fixture
def runs(debian_kernel: image.Kernel, pytestconfig: pytest.Config) -> dict[str, Ahead]:
    """Those machines, one for each command."""
    return pytestconfig.stash[RUNS]


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
