"""What all tests share."""

import signal

from hypothesis import HealthCheck, settings

# How long an example takes is the machine's matter: its hypervisor may take the CPU away in the middle of one.
settings.register_profile("shared_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared_machine")


def pytest_configure() -> None:
    """Ctrl-C works in the tests' children too.

    A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: a test that
    interrupts one would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
