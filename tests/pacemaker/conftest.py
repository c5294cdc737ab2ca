"""Clusters as docs/pacemaker.md has them, on a lab of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coloebpf.lab import commands, redis, services
from coloebpf.lab.plan import HOSTS, LabPlan
from tests.lab.conftest import new_name
from tests.lab.service_lab import Counter, ServiceLab, until
from tests.pacemaker.cluster import LOST_MS, Cluster
from tests.pacemaker.host import PATIENCE_S, made_root


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.lab)
            item.add_marker(pytest.mark.real_time)
            item.add_marker(pytest.mark.timeout(900))
            if not os.environ.get("COLO_PACEMAKER"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: make pacemaker-test"))


@contextmanager
def _fence_devices(home: Path) -> Iterator[Cluster]:
    """Members and fence devices, and services whose pair has no arbiter yet."""
    made_root()
    plan = LabPlan(new_name(), "process", command=redis.SERVER, service=True, peer_timeout_ms=LOST_MS)
    try:
        commands.up(plan, services.bring_up)
        lab = ServiceLab(plan)
        lab.reset("none", LOST_MS)
        lab.start(*HOSTS)
        services.ready(lab.plan, lab.running)
        cluster = Cluster(lab, home)
        try:
            cluster.make()
            yield cluster
        finally:
            cluster.close()
            lab.leave()
    finally:
        commands.down(plan)


@pytest.fixture
def unprotected(tmp_path: Path) -> Iterator[Cluster]:
    with _fence_devices(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def cluster(unprotected: Cluster) -> Cluster:
    return _protected(unprotected)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One for all tests of a module, which leave it as it was."""
    with _fence_devices(tmp_path_factory.mktemp("cluster")) as cluster:
        yield _protected(cluster)


def _protected(cluster: Cluster) -> Cluster:
    cluster.protect()
    until(lambda: cluster.promoted("primary") == ["primary"], "Pacemaker has promoted the primary", PATIENCE_S)
    assert cluster.fenced == []
    return cluster


@pytest.fixture
def counter(cluster: Cluster) -> Counter:
    return running_counter(cluster)


def running_counter(cluster: Cluster) -> Counter:
    assert cluster.lab.counter is not None
    return cluster.lab.counter
