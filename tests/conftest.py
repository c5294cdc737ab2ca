"""What all tests share."""

import signal

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is the machine's matter: its hypervisor may take the CPU away in the middle of one.
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")

# What a wait says when it ends in vain: until(), a timeout of a socket, of a process, of pytest's own or of a command that a QEMU has not answered.
IN_VAIN = (
    r"not in [\d.]+ s: ",
    "waited in vain",
    "did not come about",
    "TimeoutError",
    "TimeoutExpired",
    r"Timeout >",
    "has not answered",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Real hosts and machines share two CPUs that the hypervisor takes away at times: who waits in vain may wait once more.

    It is told (RERUN in the summary). Whatever is wrong and not late (a byte that was not proven, two that speak, a broken connection) fails at once.
    """
    for item in items:
        if item.get_closest_marker("real_time"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun=list(IN_VAIN)))


def pytest_configure() -> None:
    """Ctrl-C works in the tests' children too.

    A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: a test that
    interrupts one would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
