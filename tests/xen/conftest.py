"""One lab for all tests: a running one (`python -m tests.xen up`) is used and left; else it is made, and taken down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.xen.lab import Lab
from tests.xen.plan import HOSTS, XenPlan

DEBS = "COLO_XEN_DEBS"  # a directory with packages in place of Debian's own: tests that are marked `rebuilt`, and no others


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there = bool(os.environ.get(DEBS))
    skip = pytest.mark.skip(reason=f"is for {'stock' if there else 'rebuilt'} packages: {DEBS}, make xen-lab")
    for item in items:
        if item.path.parent.name == "xen" and (item.get_closest_marker("rebuilt") is not None) != there:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    made = Lab(XenPlan())
    if made.running() == list(HOSTS):
        for host in HOSTS:
            made.push(host)
        yield made
        return
    try:
        made.up(sorted(Path(os.environ[DEBS]).glob("*.deb")) if DEBS in os.environ else ())
        yield made
    finally:
        if not os.environ.get("COLO_XEN_KEEP"):
            made.down()
