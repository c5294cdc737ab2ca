"""All programs load, and the tests that load them pass, on Debian 12's own kernel."""

import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from coloebpf.lab.image import Kernel
from tests.vm import machine
from tests.vm.conftest import REPO
from tests.vm.machine import Result

LIMIT_S = 1500  # emulation is 10 to 20 times slower than the machine below it
FUZZ_FRAMES = 20_000  # a million take minutes there; tests/unit shows them to this machine's kernel
PYTHON = ".venv/bin/python"
UNIT_TESTS = f"{PYTHON} -m pytest tests/unit -m kernel -q -p no:cacheprovider --durations=10"
COMMANDS = {
    "unit": f"COLOEBPF_FUZZ_FRAMES={FUZZ_FRAMES} {UNIT_TESTS}",
    "smoke": f"{PYTHON} -m tests.vm.loader_smoke",
}

pytestmark = [pytest.mark.vm, pytest.mark.timeout(LIMIT_S + 200)]

Runs = dict[str, Future[Result]]


@pytest.fixture(scope="module")
def runs(debian_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A machine for each command, side by side: most of their time is one compiler's."""

    def run(name: str, work_dir: Path) -> Result:
        return machine.run(debian_kernel, COMMANDS[name], repo=REPO, work_dir=work_dir, timeout_s=LIMIT_S)

    with ThreadPoolExecutor(len(COMMANDS)) as pool:
        yield {name: pool.submit(run, name, tmp_path_factory.mktemp(name)) for name in COMMANDS}


def test_the_kernel_tests_pass_on_debians_kernel(runs: Runs) -> None:
    result = runs["unit"].result()
    print(result.output)
    assert result.exit_code == 0, result.output
    assert re.search(r"\b[1-9]\d* passed", result.output), result.output
    assert "skipped" not in result.output, "a kernel test must run there, not skip\n" + result.output


def test_loader_and_lab_work_on_debians_kernel(runs: Runs) -> None:
    result = runs["smoke"].result()
    print(result.output)
    assert result.exit_code == 0, result.output
    assert "smoke passed" in result.output
