"""What all tests share."""

import signal


def pytest_configure() -> None:
    """Ctrl-C works in the tests' children too.

    A shell starts what it runs in the background with SIGINT ignored, and every child inherits that: a test that
    interrupts one would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
