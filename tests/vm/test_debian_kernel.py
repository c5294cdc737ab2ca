"""All programs load, and the tests that load them pass, on Debian 12's own kernel."""

import re

import pytest

from tests.vm.ahead import BOOT_LIMIT_S, LIMIT_S, Ahead

pytestmark = [pytest.mark.vm, pytest.mark.timeout(LIMIT_S + BOOT_LIMIT_S)]


def test_the_kernel_tests_pass_on_debians_kernel(runs: dict[str, Ahead]) -> None:
    result = runs["unit"].result()
    print(result.output)
    assert result.exit_code == 0, result.output
    assert re.search(r"\b[1-9]\d* passed", result.output), result.output
    assert "skipped" not in result.output, "a kernel test must run there, not skip\n" + result.output


def test_loader_and_lab_work_on_debians_kernel(runs: dict[str, Ahead]) -> None:
    result = runs["smoke"].result()
    print(result.output)
    assert result.exit_code == 0, result.output
    assert "smoke passed" in result.output
