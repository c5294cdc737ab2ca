"""The unit under a real systemd, on Debian 12's own kernel."""

import os

import pytest

from tests.vm import machine
from tests.vm.conftest import RunInVm

LIMIT_S = 1500  # most of it is one compiler's time, on an emulated CPU

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(LIMIT_S + 200),
    pytest.mark.skipif(not os.environ.get("COLO_SYSTEMD"), reason="takes some minutes: make systemd-test"),
]


def test_the_unit_starts_reloads_and_restarts_and_what_must_outlives_it(in_vm: RunInVm) -> None:
    result = in_vm(".venv/bin/python -m tests.vm.service_unit", LIMIT_S, under=machine.SYSTEMD)
    print(result.output)
    assert result.exit_code == 0, result.output
    assert "the unit works" in result.output
