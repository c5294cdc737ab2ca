"""A guest that both services protect, whatever the engine: configuration, the parts of the fixture, and the tests' steps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from tests.xen import service
from tests.xen.counter import PATIENCE_S, Counter, diverge, pair, until
from tests.xen.guests import BRIDGE, Guest
from tests.xen.lab import Lab
from tests.xen.plan import DIRECT, FORWARD, HOSTS

GUEST = Guest("web", "hvm", 21, 128)
DIVERGENCES = 20  # that each ask for a checkpoint


@dataclasses.dataclass
class Protected:
    """A guest on host 1, and two connections to its server."""

    lab: Lab
    counter: Counter
    server: Counter


def write_configuration(lab: Lab, host: int, engine: str, nic: str, table: str, guest: Guest) -> None:
    """`nic`: more lines of [[pair.nic]]; `table`: the engine's."""
    other = 3 - host
    lab.write(
        host,
        service.CONFIG,
        f"""
[host]
name = "host{host}"
[peer]
name = "host{other}"
listen = "{lab.plan.address(DIRECT, host)}:7788"
connect = "{lab.plan.address(DIRECT, other)}:7788"
heartbeat_interval_ms = 500
heartbeat_timeout_ms = 20000
[arbiter.command]
fence = ["/bin/true"]  # the test has turned it off
[[pair]]
name = "web"
number = 0
role = "{"primary" if host == 1 else "secondary"}"
engine = "{engine}"
arbiter = "command"
commit_timeout_ms = 1200000
compare_timeout_ms = 60000
interval_max_ms = 3000000
storm_count = 10000
storm_window_ms = 200000
calm_ms = 200000
[[pair.nic]]
number = 0
vif = "web0"
{nic}
fwd = "{FORWARD}0"
mac = "{guest.mac}"
bridge = "{BRIDGE}"
{table}
domain = "web"
copy_timeout_s = 600
step_timeout_s = 300
""",
    )


@contextmanager
def protected_pair(lab: Lab, engine: str, nic: str, table: str, guest: Guest = GUEST) -> Iterator[Protected]:
    """Both services and the guest are up. `table`: {address} is the host's own on the direct link."""
    service.hand_out_certificates(lab)
    for host in HOSTS:
        lab.run(host, "install -m 755 /opt/coloebpf/deploy/xen/vif-coloebpf /etc/xen/scripts/")
        write_configuration(lab, host, engine, nic, table.format(address=lab.plan.address(DIRECT, host)), guest)
        config = guest.config().replace(f"bridge={BRIDGE}", "bridge=web0-x,script=vif-coloebpf")
        lab.write(host, "/etc/xen/web.cfg", config)
    with ThreadPoolExecutor() as both:  # each compiles for minutes on its emulated CPU
        list(both.map(partial(service.start, lab), HOSTS))
    lab.run(1, "xl create -q /etc/xen/web.cfg")
    lab.await_answer(guest)
    try:
        yield Protected(lab, Counter(lab, guest.address), Counter(lab, guest.address))
    finally:
        for host in lab.running():
            lab.run(host, "coloebpf unprotect web", check=False)  # else its programs stay
            service.stop(lab, host)
            lab.run(
                host, "for name in web web--0 web--1 web--incoming; do xl destroy $name; done 2>/dev/null", check=False
            )


def doctor_is_content(lab: Lab) -> None:
    """With what is the engine's."""
    for host in HOSTS:
        rows = json.loads(lab.run(host, "coloebpf doctor --json", check=False))["findings"]
        assert not [row for row in rows if row["check"] in ("libxl", "xen", "guest") and row["level"] == "fail"], rows
    lab.run(1, "coloebpf config xl /etc/xen/web.cfg")


def protect(protected: Protected) -> None:
    """The first copy; the guest goes on, and its connections too."""
    lab, counter = protected.lab, protected.counter
    counter.count()
    print(lab.run(1, "coloebpf protect web", timeout=PATIENCE_S))
    assert pair(lab, 1)["state"] in ("lockstep", "checkpointing")
    counter.start()
    counter.goes_on(20)


def diverging(protected: Protected) -> None:
    """A real server's answers that can't be the same: each one waits for a checkpoint, while the load goes on."""
    diverge(protected.lab, protected.counter, protected.server, DIVERGENCES)


def host_1_dies(protected: Protected) -> None:
    """It loses its power under load; the connections go on, the count does not go back."""
    lab, counter = protected.lab, protected.counter
    lab.kill(1)
    began = time.monotonic()
    counter.goes_on(20)
    print(f"20 more answers {time.monotonic() - began:.1f} s after host 1 lost its power")
    counter.stop()
    assert protected.server.time()
    assert pair(lab, 2)["state"] == "promoted"
    until(lambda: " web " in lab.run(2, "xl list").replace("web  ", " web "), "the guest's own name")
