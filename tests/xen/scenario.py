"""A guest that both services protect, whatever the engine: configuration, the parts of the fixture, and the tests' steps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
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


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is asked of a pair. `nic`: more lines of [[pair.nic]]; `table`: the engine's, with {address}, the host's own
    on the direct link. `number`: of the pair, `first_nic`: of its first NIC; with several the forward link is shared.
    `more`: tables behind the engine's, with {address} and {other}, the other host's. `paused`: the guest is started so.
    `disk`: the guest's line for xl on each host: it names where the other one listens."""

    engine: str
    nic: str
    table: str
    guest: Guest = GUEST
    primary: int = 1
    number: int = 0
    first_nic: int = 0
    shared: bool = False
    more: str = ""
    paused: bool = False
    disk: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def text(self, lab: Lab, host: int) -> str:
        """[[pair]] of a host."""
        lines = f"""
[[pair]]
name = "{self.guest.name}"
number = {self.number}
role = "{"primary" if host == self.primary else "secondary"}"
engine = "{self.engine}"
arbiter = "command"
commit_timeout_ms = 1200000
compare_timeout_ms = 60000
interval_max_ms = 3000000
storm_count = 10000
storm_window_ms = 200000
calm_ms = 200000
"""
        for number, (vif, mac) in enumerate(zip(self.guest.ports, self.guest.macs, strict=True), self.first_nic):
            lines += f"""
[[pair.nic]]
number = {number}
vif = "{vif}"
{self.nic}
fwd = "{FORWARD}0"
vlan = {number + 1 if self.shared else 0}
mac = "{mac}"
bridge = "{BRIDGE}"
"""
        address, other = (lab.plan.address(DIRECT, which) for which in (host, 3 - host))
        return f"""{lines}
{self.table.format(address=address)}
domain = "{self.guest.name}"
copy_timeout_s = 600
step_timeout_s = 300
{self.more.format(address=address, other=other)}
"""


def write_configuration(lab: Lab, host: int, settings: Sequence[Setting]) -> None:
    """The service's, and the guests'."""
    other = 3 - host
    head = f"""
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
"""
    lab.write(host, service.CONFIG, head + "".join(setting.text(lab, host) for setting in settings))
    for setting in settings:
        config = setting.guest.config(setting.guest.ports, setting.disk.get(host, ""))
        lab.write(host, f"/etc/xen/{setting.guest.name}.cfg", config)


@contextmanager
def services(lab: Lab, settings: Sequence[Setting]) -> Iterator[None]:
    """Both services and the guests are up."""
    if lab.running() != list(HOSTS):
        lab.anew()  # an earlier test has ended a host
    service.hand_out_certificates(lab)
    for host in HOSTS:
        lab.run(host, "install -m 755 /opt/coloebpf/deploy/xen/vif-coloebpf /etc/xen/scripts/")
        write_configuration(lab, host, settings)
    with ThreadPoolExecutor() as both:  # each compiles for minutes on its emulated CPU
        list(both.map(partial(service.start, lab), HOSTS))
    for setting in settings:
        lab.run(setting.primary, f"xl create -q {'-p' if setting.paused else ''} /etc/xen/{setting.guest.name}.cfg")
    for setting in settings:
        if not setting.paused:
            lab.await_answer(setting.guest)
    try:
        yield
    finally:
        for host in lab.running():
            for name in (setting.guest.name for setting in settings):
                lab.run(host, f"coloebpf unprotect {name}", check=False)  # else its programs stay
            service.stop(lab, host)
            for name in (setting.guest.name for setting in settings):
                copies = " ".join(f"{name}{end}" for end in ("", "--0", "--1", "--incoming"))
                lab.run(host, f"for name in {copies}; do xl destroy $name; done 2>/dev/null", check=False)


@contextmanager
def protected_pair(lab: Lab, engine: str, nic: str, table: str, guest: Guest = GUEST) -> Iterator[Protected]:
    """One guest on host 1. `nic`, `table`: see Setting."""
    with services(lab, [Setting(engine, nic, table, guest)]):
        yield Protected(lab, Counter(lab, guest.address), Counter(lab, guest.address))


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
