"""One lab for all tests: a running one (`python -m tests.xen up`) is used and left; else it is made, and taken down."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.xen.lab import Lab
from tests.xen.plan import HOSTS, XenPlan


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    made = Lab(XenPlan())
    if made.running() == list(HOSTS):
        for host in HOSTS:
            made.push(host)
        yield made
        return
    try:
        made.up()
        yield made
    finally:
        if not os.environ.get("COLO_XEN_KEEP"):
            made.down()
