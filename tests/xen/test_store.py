"""The client of xenstored and the watcher with a real xenstored, real xl and a real guest: each step of a domain is told."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from tests.xen.guests import Guest
from tests.xen.lab import Lab

pytestmark = [pytest.mark.xen, pytest.mark.timeout(1800)]
GUEST = Guest("watched", "pvh", 27, 128)
NAMES = ("watched", "watched--incoming")
PATIENCE_S = 300.0
SCRIPT, EVENTS = "/tmp/watch.py", "/tmp/watch.events"
# A line for each event, and one for each look that a Watch asks for: its time, and the domains' names as xenstore has them.
PYTHON = """
import asyncio, json, sys
from coloebpf.xen.store import SOCKET, Store
from coloebpf.xen.watcher import Watcher

async def main():
    def tell(**what):
        print(json.dumps(what), flush=True)
    store = await Store.connect(SOCKET, lambda path: tell(event=path))
    for path in ("@introduceDomain", "@releaseDomain"):
        await store.watch(path)
    watcher = Watcher(net_s=100000)
    watch = watcher.watch()
    while True:
        if watch.due() and watcher.up:
            names = {}
            for domid in await store.children("/local/domain"):
                names[domid] = await store.read(f"/local/domain/{domid}/name")
            tell(names=names, nic=await watch.domids({sys.argv[1]}))
        await watch.wait(0.2)

asyncio.run(main())
"""

REBOOT = "/tmp/reboot.py"
# Each state that a guest's domains are seen in, by their UUID, from its reboot on until the second one is there.
REBOOTING = """
import dataclasses, json, subprocess, sys, time
from coloebpf.xen.libxl import LibXl

xen = LibXl()
[uuid] = [one.uuid for one in xen.domains() if one.name == sys.argv[1]]
subprocess.run(["xl", "reboot", sys.argv[1]], check=True, stdout=subprocess.DEVNULL)
seen, end = [], time.monotonic() + 300
while time.monotonic() < end and len({one["domid"] for one in seen}) < 2:
    now = [dataclasses.asdict(one) for one in xen.domains() if one.uuid == uuid]
    seen += [one for one in now if one not in seen]
    time.sleep(0.01)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def watched(lab: Lab) -> Iterator[Lab]:
    """The script runs in dom0 of host 1."""
    lab.write(1, SCRIPT, PYTHON)
    lab.write(1, f"/etc/xen/{GUEST.name}.cfg", GUEST.config())
    run = f"/opt/coloebpf/.venv/bin/python {SCRIPT} {GUEST.mac} </dev/null >{EVENTS} 2>&1"
    lab.run(1, f"cd /opt/coloebpf && {{ setsid {run} & echo $! >/run/watch.pid; }}")
    await_line(lab, lambda line: "names" in line)
    try:
        yield lab
    finally:
        lab.run(1, "kill $(cat /run/watch.pid)", check=False)
        for name in NAMES:
            lab.run(1, f"xl destroy {name} 2>/dev/null", check=False)


def lines(lab: Lab) -> list[dict[str, object]]:
    """What it has told so far."""
    text = lab.run(1, f"cat {EVENTS}")
    assert "Traceback" not in text, text
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def await_line(lab: Lab, fits: Callable[[dict[str, object]], bool], seen: int = 0) -> dict[str, object]:
    """The first behind the first `seen` that does."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if (found := next(filter(fits, lines(lab)[seen:]), None)) is not None:
            return found
        time.sleep(1)
    raise AssertionError(f"waited in vain; {lines(lab)[seen:]}")


def named(line: dict[str, object]) -> list[str]:
    names = line.get("names", {})
    assert isinstance(names, dict)
    return [name for name in names.values() if name in NAMES]


def test_a_guest_from_its_creation_to_its_end(watched: Lab) -> None:
    """Created, renamed as libxl does at a failover, destroyed: a look is asked for at each of them."""
    lab = watched
    seen = len(lines(lab))
    lab.run(1, f"xl create -q /etc/xen/{GUEST.name}.cfg 'name=\"{NAMES[1]}\"'")
    await_line(lab, lambda line: line.get("event") == "@introduceDomain", seen)
    await_line(lab, lambda line: named(line) == [NAMES[1]], seen)
    domid = lab.domid(1, NAMES[1])

    seen = len(lines(lab))
    lab.run(1, f"xl rename {NAMES[1]} {NAMES[0]}")
    found = await_line(lab, lambda line: named(line) == [NAMES[0]], seen)
    assert found["nic"] == [domid], "its NIC is not found by its address"

    seen = len(lines(lab))
    lab.run(1, f"xl destroy {NAMES[0]}")
    await_line(lab, lambda line: line.get("event") == "@releaseDomain", seen)
    await_line(lab, lambda line: "names" in line and not named(line), seen)


def test_nothing_is_asked_for_when_nothing_happens(watched: Lab) -> None:
    """Also not while a guest works: its devices write to xenstore at their own places."""
    lab = watched
    seen = len(lines(lab))
    lab.create(1, GUEST)
    await_line(lab, lambda line: named(line) == [NAMES[0]], seen)
    time.sleep(20)
    seen = len(lines(lab))
    time.sleep(20)
    assert lines(lab)[seen:] == []


def test_a_reboot_is_known_as_one(watched: Lab) -> None:
    """libxl says why the old domain has ended, before xl makes the new one, which has the same UUID."""
    lab = watched
    lab.write(1, REBOOT, REBOOTING)
    seen = json.loads(lab.run(1, f"cd /opt/coloebpf && .venv/bin/python {REBOOT} {NAMES[0]}", timeout=2 * PATIENCE_S))
    assert any(one["reboots"] for one in seen), seen
    assert len({one["domid"] for one in seen}) == 2, seen
