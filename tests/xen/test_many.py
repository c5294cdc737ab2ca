"""Two guests on two real Xen hosts, protected in both directions at once by libxl's COLO; one of them has two NICs.

Their NICs share the forward link, by VLANs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.xen import scenario, service
from tests.xen.counter import PATIENCE_S, Counter, pair, until
from tests.xen.guests import Guest
from tests.xen.lab import Lab
from tests.xen.plan import HOSTS
from tests.xen.scenario import Setting

pytestmark = [pytest.mark.xen, pytest.mark.rebuilt, pytest.mark.timeout(7200)]
WEB = Guest("web", "hvm", 21, 128, nics=2)  # host 1 is its primary
DB = Guest("db", "hvm", 22, 128)  # and host 2 of this one
DIVERGENCES = 5  # of each
TABLE = '[pair.libxl_colo]\nlisten = "127.0.0.1:{endpoint}"\nstream_listen = "{{address}}:{stream}"'


class Clients(NamedTuple):
    """Connections: one per NIC that counts, and one per guest that asks for what two VMs never say alike."""

    counters: list[Counter]
    servers: dict[str, Counter]


@pytest.fixture(scope="module")
def clients(lab: Lab) -> Iterator[Clients]:
    web = Setting("libxl-colo", "", TABLE.format(endpoint=9000, stream=7792), WEB, shared=True)
    db = Setting(
        "libxl-colo", "", TABLE.format(endpoint=9001, stream=7793), DB, primary=2, number=1, first_nic=2, shared=True
    )
    with scenario.services(lab, [web, db]):
        addresses = [*WEB.addresses, DB.address]
        counters = [Counter(lab, address, f"n{number}") for number, address in enumerate(addresses)]
        yield Clients(counters, {guest.name: Counter(lab, guest.address) for guest in (WEB, DB)})


def test_protect_both(lab: Lab, clients: Clients) -> None:
    for counter in clients.counters:
        counter.count()
    for host, name in ((1, "web"), (2, "db")):
        print(lab.run(host, f"coloebpf protect {name}", timeout=PATIENCE_S))
    for host, name in ((1, "web"), (2, "db")):
        assert pair(lab, host, name)["state"] in ("lockstep", "checkpointing")
        assert pair(lab, 3 - host, name)["role"] == "secondary"
    for counter in clients.counters:
        counter.start()
    for counter in clients.counters:
        counter.goes_on(20)


def test_divergences_of_both(lab: Lab, clients: Clients) -> None:
    """A question to each in turn: its checkpoint is none of the other's, and all connections go on."""
    hosts = {"web": 1, "db": 2}

    def made() -> dict[str, int]:
        return {name: pair(lab, host, name)["checkpoints"].get("divergence", 0) for name, host in hosts.items()}

    before, asked = made(), 0
    while any(now < before[name] + DIVERGENCES for name, now in made().items()):
        assert asked < 4 * DIVERGENCES, f"{before} before, {made()} behind {asked} questions to each"
        asked += 1
        for server in clients.servers.values():  # libxl's own checkpoint, each 5 s, may answer it first
            assert float(server.time()) > 0
    for name, host in hosts.items():
        print(f"{name}: {pair(lab, host, name)['checkpoints']}")
    for counter in clients.counters:
        counter.goes_on(5)


def test_each_nic_is_compared(lab: Lab, clients: Clients) -> None:
    """What each SVM says proves what its PVM says, on each NIC."""

    def proven() -> list[int]:
        rows = [nic for host in HOSTS for nic in service.status(lab, host)["dataplane"]["nics"]]
        return [max(int(row["compared_packets"]) for row in rows if row["nic"] == number) for number in range(3)]

    before = proven()
    for counter in clients.counters:
        counter.goes_on(20)
    until(
        lambda: all(now > then + 10 for now, then in zip(proven(), before, strict=True)), "packets proven on each NIC"
    )


def test_host_1_dies(lab: Lab, clients: Clients) -> None:
    """web's SVM takes over, db goes on alone; no connection is lost, and no count goes back."""
    lab.kill(1)
    began = time.monotonic()
    for counter in clients.counters:
        counter.goes_on(20)
    print(f"20 more answers on each connection {time.monotonic() - began:.1f} s after host 1 lost its power")
    for counter in clients.counters:
        counter.stop()
    assert pair(lab, 2, "web")["state"] == "promoted"
    assert pair(lab, 2, "db")["state"] == "passthrough"
