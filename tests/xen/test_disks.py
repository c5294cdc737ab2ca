"""A guest with a disk, protected by libxl's COLO on two real Xen hosts, with packages that deploy/xen/rebuild.sh has made.

The guest writes numbers to its disk, and reads back what it wrote (coloebpf/lab/guest_init.sh).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from coloebpf.service.config import LibxlDisk
from coloebpf.service.config_keys import Address
from coloebpf.service.disks import ColoDisk
from tests.xen import scenario
from tests.xen.counter import PATIENCE_S, Counter, pair, until
from tests.xen.guests import Guest
from tests.xen.lab import Lab
from tests.xen.plan import DIRECT, HOSTS
from tests.xen.scenario import Protected, Setting

pytestmark = [pytest.mark.xen, pytest.mark.rebuilt, pytest.mark.timeout(7200)]
IMAGE, DIRECTORY, MIB, PORT = "/var/lib/coloebpf/web.img", "/var/lib/coloebpf/web", 64, 7793
TABLE = '[pair.libxl_colo]\nlisten = "127.0.0.1:9000"\nstream_listen = "{address}:7792"'
DISK = f"""
[[pair.libxl_colo.disk]]
image = "{IMAGE}"
format = "raw"
vdev = "hda"
directory = "{DIRECTORY}"
listen = "{{address}}:{PORT}"
peer_listen = "{{other}}:{PORT}"
compare_image = true
"""
BLOCKS = 100
IDLE_S = 5.0  # behind an answer: a virtual CPU that is paused while a device answers it can't be suspended


class Written(NamedTuple):
    """What the guest has told redis: the number that it wrote last, and what it found wrong."""

    last: int
    bad: str | None


def written(client: Counter) -> Written:
    def get(key: str) -> str | None:
        head = client.ask(f"GET {key}")
        return None if head == "$-1" else client.line()

    return Written(int(get("written") or 0), get("bad"))


def line(lab: Lab, host: int) -> str:
    """For xl, as coloebpf makes it for a host."""
    here, there = (Address(lab.plan.address(DIRECT, which), PORT) for which in (host, 3 - host))
    config = LibxlDisk(
        image=Path(IMAGE), format="raw", vdev="hda", directory=Path(DIRECTORY), listen=here, peer_listen=there,
        compare_image=True,
    )  # fmt: skip
    return ColoDisk("web", config).line()


GUEST = Guest("web", "hvm", 23, 128)


def overlays(lab: Lab) -> None:
    """xl opens what the line names, also what only the other host uses."""
    lab.run(1, f"for name in active hidden; do qemu-img create -q -f qcow2 {DIRECTORY}/web-$name.qcow2 {MIB}M; done")


@pytest.fixture(scope="module")
def hosts(lab: Lab) -> Iterator[Lab]:
    """Both services, and a guest that has not run yet."""
    lines = {host: line(lab, host) for host in HOSTS}
    setting = Setting("libxl-colo", "", TABLE, GUEST, more=DISK, paused=True, disk=lines)
    if lab.running() != list(HOSTS):
        lab.anew()
    for host in HOSTS:
        lab.run(host, f"mkdir -p {DIRECTORY} && rm -rf {DIRECTORY}/* {IMAGE} && truncate -s {MIB}M {IMAGE}")
    overlays(lab)
    with scenario.services(lab, [setting]):
        scenario.doctor_is_content(lab)
        yield lab


@pytest.fixture(scope="module")
def protected(hosts: Lab) -> Protected:
    """The guest has booted, and not touched its disk, before it is protected.

    Under COLO QEMU tells Xen of each byte that Linux' loader has it write into memory, with a hypercall that takes 80 us
    on these emulated hosts: half an hour for a kernel and its initramfs.
    """
    lab = hosts
    lab.run(1, "coloebpf unprotect web; xl destroy web")
    overlays(lab)
    lab.run(1, "xl create -q /etc/xen/web.cfg")
    lab.await_answer(GUEST)
    time.sleep(IDLE_S)
    lab.run(1, "xl pause web")
    print(lab.run(1, "coloebpf protect web", timeout=PATIENCE_S))
    lab.await_answer(GUEST)
    client = Counter(lab, GUEST.address)
    client.ask("SET write 1")
    return Protected(lab, Counter(lab, GUEST.address), client)


def runs(lab: Lab, host: int, name: str) -> bool:
    """It has run, and is neither paused, nor shut down, nor crashed."""
    flags, seconds = lab.run(host, f"xl list {name} | tail -n 1").split()[-2:]
    return float(seconds) > 0 and not set(flags) & set("psc")


def test_a_guest_that_has_not_run(hosts: Lab) -> None:
    """Its firmware begins on both hosts, and goes on behind checkpoints."""
    print(hosts.run(1, "coloebpf protect web", timeout=PATIENCE_S))
    until(lambda: sum(pair(hosts, 1)["checkpoints"].values()) > 3, "checkpoints")
    assert pair(hosts, 1)["state"] in ("lockstep", "checkpointing")
    for host, name in ((1, "web"), (2, "web--incoming")):
        until(partial(runs, hosts, host, name), f"{name}: a checkpoint makes it stand still, too")


def test_the_guest_writes_in_lock_step(protected: Protected) -> None:
    assert pair(protected.lab, 1)["state"] in ("lockstep", "checkpointing")
    until(lambda: written(protected.server).last > 30, "numbers on its disk, and those of 20 numbers ago read")
    protected.counter.start()
    protected.counter.goes_on(20)


def test_checkpoints_keep_the_disks_alike(protected: Protected) -> None:
    """Divergences while it writes; what is read back is what was written, and replication has no error."""
    begun = written(protected.server)
    for _ in range(5):
        assert float(protected.server.time()) > 0
    until(lambda: written(protected.server).last > begun.last + 30, "more of them")
    assert written(protected.server).bad is None
    lab = protected.lab
    assert pair(lab, 1)["checkpoints_failed"] == 0
    [usage] = [json.loads(lab.run(2, "coloebpf status --json"))["service"]["pairs"][0]["disk"]]
    print(usage)
    assert usage["follows"]


def test_failover(protected: Protected) -> None:
    """The guest goes on with its disk, which QEMU brings together in the image: that is the good one."""
    lab = protected.lab
    before = written(protected.server)
    scenario.host_1_dies(protected)
    until(lambda: written(protected.server).last > before.last + 30, "it to write on")
    assert written(protected.server).bad is None
    until(lambda: "QEMU has not ended" not in lab.run(2, "coloebpf disks which web", check=False), "one whole file")
    print(lab.run(2, "coloebpf disks which web"))
    last = written(protected.server).last
    lab.run(2, "xl destroy web")
    text = lab.run(
        2, f"for i in $(seq 0 {BLOCKS - 1}); do dd if={IMAGE} bs=512 skip=$i count=1 2>/dev/null | head -n 1; done"
    )
    numbers = sorted(int(number) for number in re.findall(r"block (\d+)", text))
    assert numbers[-1] >= last
    assert numbers == list(range(numbers[-1] - BLOCKS + 1, numbers[-1] + 1))[-len(numbers) :]
