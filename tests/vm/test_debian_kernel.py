"""All programs load, and the tests that load them pass, on Debian 12's own kernel."""

import re

import pytest

from tests.vm.conftest import RunInVm

KERNEL_TESTS_LIMIT_S = 1500  # emulation is 10 to 20 times slower than the machine below it
SMOKE_LIMIT_S = 600

pytestmark = pytest.mark.vm


@pytest.mark.timeout(KERNEL_TESTS_LIMIT_S + 200)
def test_the_kernel_tests_pass_on_debians_kernel(in_vm: RunInVm) -> None:
    result = in_vm(
        ".venv/bin/python -m pytest tests/unit -m kernel -q -p no:cacheprovider --durations=10", KERNEL_TESTS_LIMIT_S
    )
    print(result.output)
    assert result.exit_code == 0, result.output
    assert re.search(r"\b[1-9]\d* passed", result.output), result.output
    assert "skipped" not in result.output, "a kernel test must run there, not skip\n" + result.output


@pytest.mark.timeout(SMOKE_LIMIT_S + 200)
def test_loader_and_lab_work_on_debians_kernel(in_vm: RunInVm) -> None:
    result = in_vm(".venv/bin/python -m tests.vm.loader_smoke", SMOKE_LIMIT_S)
    print(result.output)
    assert result.exit_code == 0, result.output
    assert "smoke passed" in result.output
