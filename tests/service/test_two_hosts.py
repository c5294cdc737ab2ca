"""Given two hosts in lock-step with a real etcd, when something happens to them, then never two of them may speak.

Link, heartbeats, leases and arbiter are the service's own, in two processes and three network namespaces; the
supervisor and the dataplane are stand-ins (host_process.py). The test looks every millisecond at what either host's
programs would do with a packet.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coloebpf.model import Role, State
from coloebpf.netns import inside
from coloebpf.service.peer.pki import init_pki
from coloebpf.service.peer.witness import lease_of
from tests.service import etcds
from tests.service.etcds import Member
from tests.service.host_process import ETCD_LEASE_S, GRACE_MS, Words

PATIENCE = 60.0  # seconds
# Without a heartbeat for so long the other host is lost. The configuration's default is for machines of one's own: here
# a process may stand still for a second.
TIMEOUT_MS = 1500
SHORT_MS = 200  # the default, for what has to be true however late anybody is
LEASE_S, GRACE_S = lease_of(TIMEOUT_MS) / 1000, GRACE_MS / 1000
# A takeover, with time to spare; a service in doubt about what its predecessor has granted would wait 10 s from its start.
SOON_S = LEASE_S + 3
NS = 1_000_000_000
pytestmark = pytest.mark.real_time
ROLES = {"a": Role.PRIMARY, "b": Role.SECONDARY}
MANAGEMENT = {"a": "192.0.2.1", "b": "192.0.2.2"}  # of documentation, in namespaces of the test's own
TO_ETCD = {"a": "198.51.100.1", "b": "198.51.100.2"}
ETCD = "198.51.100.9"


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


class Site:
    """The namespaces a and b, joined by mgmt and fwd, and the one that etcd is in."""

    def __init__(self) -> None:
        self.spaces = {name: f"coloebpf-two-{os.getpid()}-{name}" for name in ("a", "b", "etcd")}

    def build(self) -> None:
        for space in self.spaces.values():
            ip("netns", "add", space)
            ip("-n", space, "link", "set", "lo", "up")
            with inside(space):
                Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1\n")
        a, b, etcd = self.spaces.values()
        for device in ("mgmt", "fwd"):
            ip("-n", a, "link", "add", device, "type", "veth", "peer", "name", device, "netns", b)
            self.set(device, "up")
        ip("-n", etcd, "link", "add", "br0", "type", "bridge")
        ip("-n", etcd, "addr", "add", f"{ETCD}/24", "dev", "br0")
        ip("-n", etcd, "link", "set", "br0", "up")
        for name in ROLES:
            ip(
                "-n",
                self.spaces[name],
                "link",
                "add",
                "arbiter",
                "type",
                "veth",
                "peer",
                "name",
                f"to-{name}",
                "netns",
                etcd,
            )
            ip("-n", etcd, "link", "set", "dev", f"to-{name}", "master", "br0", "up")
            ip("-n", self.spaces[name], "link", "set", "arbiter", "up")
            ip("-n", self.spaces[name], "addr", "add", f"{TO_ETCD[name]}/24", "dev", "arbiter")
            ip("-n", self.spaces[name], "addr", "add", f"{MANAGEMENT[name]}/24", "dev", "mgmt")

    def remove(self) -> None:
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], check=False)

    def set(self, device: str, state: str) -> None:
        for name in ROLES:
            ip("-n", self.spaces[name], "link", "set", device, state)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    made = Site()
    try:
        made.build()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="module")
def etcd(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Member]:
    with inside(site.spaces["etcd"]):
        members = etcds.cluster(tmp_path_factory.mktemp("etcd"), 1, ETCD)
    try:
        yield members[0]
    finally:
        etcds.end(members)


class Two:
    """Both hosts' processes."""

    def __init__(self, site: Site, etcd: Member, directory: Path, timeout_ms: int) -> None:
        self.site, self.etcd, self.timeout_ms = site, etcd, timeout_ms
        init_pki(directory / "pki", tuple(ROLES))
        self.words, self.logs = {}, {}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.spawned: list[subprocess.Popen[str]] = []
        self.directory = directory
        for name in ROLES:
            (directory / name).write_bytes(bytes(16))
            self.words[name] = Words(directory / name)
            self.logs[name] = directory / f"{name}.log"
        for name, process in [(name, self.spawn(name)) for name in ROLES]:
            self.loaded(process)
            self.start(name, process)

    def spawn(self, name: str) -> subprocess.Popen[str]:
        """The process of a host's next service, which does nothing yet; loading its modules may take seconds."""
        directory, role = self.directory, ROLES[name]
        other = "ab"[name == "a"]
        about = {
            "name": name, "peer": other, "role": int(role), "words": str(directory / name), "etcd": self.etcd.url,
            "pki": str(directory / "pki"), "listen": MANAGEMENT[name], "connect": MANAGEMENT[other],
            "pair": f"pair-{directory.name}", "timeout_ms": self.timeout_ms,
        }  # fmt: skip
        with inside(self.site.spaces[name]), self.logs[name].open("ab") as log:
            command = (sys.executable, "-m", "tests.service.host_process", json.dumps(about))
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True)
        self.spawned.append(process)
        return process

    def loaded(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        assert process.stdout.readline() == "loaded\n", self.said()

    def start(self, name: str, process: subprocess.Popen[str]) -> None:
        """The process serves; the host's words are as they were."""
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
        self.processes[name] = process

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    def speakers(self) -> str:
        """Who may speak now. a is looked at twice, so that its stopping between two looks is no second speaker."""
        a, b, a_still = self.words["a"].speaks, self.words["b"].speaks, self.words["a"].speaks
        return ("a" if a and a_still else "") + ("b" if b else "")

    def watch(self, until: Callable[[], bool], patience: float = PATIENCE) -> float:
        """Looks on until it is so; how many seconds that took. Fails as soon as both may speak."""
        start = time.monotonic()
        while not until():
            assert self.speakers() != "ab", f"two speakers\n{self.said()}"
            assert time.monotonic() - start < patience, f"it did not come about\n{self.said()}"
            time.sleep(0.001)
        return time.monotonic() - start

    def watch_for(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.watch(lambda: time.monotonic() >= end)

    def state(self, name: str) -> State:
        return self.words[name].state

    def said(self) -> str:
        return "\n".join(f"{name}: {line}" for name, log in self.logs.items() for line in log.read_text().splitlines())

    def end(self) -> None:
        for process in self.spawned:
            process.kill()
            process.communicate()
        for device in ("mgmt", "fwd"):
            self.site.set(device, "up")


@pytest.fixture
def two(request: pytest.FixtureRequest, site: Site, etcd: Member, tmp_path: Path) -> Iterator[Two]:
    """In lock-step for a random while. A parameter is their timeout."""
    made = Two(site, etcd, tmp_path, getattr(request, "param", TIMEOUT_MS))
    try:
        made.watch(lambda: made.speakers() != "")
        made.watch_for(0.5 + random.random() / 5)
        yield made
    finally:
        made.end()
        with inside(site.spaces["etcd"]):
            etcd.mend()


def test_given_lock_step_when_nothing_happens_then_the_primary_speaks_all_the_time(two: Two) -> None:
    silent_ns, looked_ns = 0, time.monotonic_ns()
    end_ns = looked_ns + 3 * NS

    def over() -> bool:
        nonlocal silent_ns, looked_ns
        before_ns, looked_ns = looked_ns, time.monotonic_ns()
        silent_ns += max(0, looked_ns - max(before_ns, two.words["a"].deadline_ns))
        return looked_ns >= end_ns

    two.watch(over)
    assert two.state("a") is State.LOCKSTEP, two.said()
    assert silent_ns < 0.3 * NS, two.said()  # a busy machine stalls processes


@pytest.mark.parametrize("device", ["mgmt", "fwd"])
def test_given_lock_step_when_one_path_is_cut_then_nothing_but_a_warning(two: Two, device: str) -> None:
    two.site.set(device, "down")
    two.watch_for(LEASE_S + 1)
    two.watch(lambda: "a path to the peer is lost" in two.said())
    assert two.state("a") is State.LOCKSTEP
    assert two.state("b") is State.UNPROTECTED  # it never decided anything
    assert two.speakers() == "a"


def test_given_lock_step_when_the_primary_is_killed_then_the_secondary_is_promoted_soon(two: Two) -> None:
    two.signal("a", signal.SIGKILL)
    two.processes["a"].wait()
    took = two.watch(lambda: two.state("b") is State.PROMOTED)
    print(f"promoted after {took * 1000:.0f} ms")
    assert two.speakers() == "b"  # a's leave had to end first
    assert took < SOON_S
    two.watch_for(ETCD_LEASE_S + 0.5)
    two.watch(lambda: two.speakers() == "b")  # the lease is renewed


def test_given_lock_step_when_the_secondary_is_killed_then_the_primary_goes_on_alone(two: Two) -> None:
    two.signal("b", signal.SIGKILL)
    two.watch(lambda: two.state("a") is State.PASSTHROUGH)
    two.watch_for(ETCD_LEASE_S + 0.5)
    two.watch(lambda: two.speakers() == "a")  # the lease is renewed


@pytest.mark.parametrize("name", ROLES)
def test_given_lock_step_when_a_service_is_restarted_as_planned_then_the_primary_speaks_all_the_time(
    two: Two, name: str
) -> None:
    successor = two.spawn(name)
    two.loaded(successor)
    two.signal(name, signal.SIGTERM)
    two.processes[name].wait()
    left = time.monotonic()
    two.watch_for(LEASE_S + 0.1)
    assert two.speakers() == "a"
    two.start(name, successor)
    two.watch_for(left + GRACE_S + 0.3 - time.monotonic())
    assert two.speakers() == "a", two.said()
    assert (two.state("a"), two.state("b")) == (State.LOCKSTEP, State.UNPROTECTED)
    two.signal("a", signal.SIGKILL)
    assert two.watch(lambda: two.state("b") is State.PROMOTED) < SOON_S


def test_given_a_planned_restart_when_the_primary_stays_away_then_the_secondary_takes_over_behind_the_grace(
    two: Two,
) -> None:
    began = time.monotonic()
    two.signal("a", signal.SIGTERM)
    two.watch(lambda: two.state("b") is State.PROMOTED)
    assert GRACE_S < time.monotonic() - began < GRACE_S + SOON_S


def test_given_lock_step_when_the_primary_is_frozen_and_wakes_up_then_it_finds_itself_halted(two: Two) -> None:
    two.signal("a", signal.SIGSTOP)
    two.watch(lambda: two.speakers() == "b")
    two.watch_for(random.random())
    two.signal("a", signal.SIGCONT)
    two.watch(lambda: two.state("a") is State.HALTED)
    two.watch_for(1)
    two.watch(lambda: two.speakers() == "b")


def test_given_lock_step_when_the_secondary_is_frozen_and_wakes_up_then_it_stays_silent(two: Two) -> None:
    two.signal("b", signal.SIGSTOP)
    two.watch(lambda: two.state("a") is State.PASSTHROUGH)
    two.watch_for(random.random())
    two.signal("b", signal.SIGCONT)
    two.watch_for(2)
    two.watch(lambda: two.speakers() == "a")
    assert two.state("b") in (State.UNPROTECTED, State.HALTED)


def test_given_lock_step_when_both_paths_are_cut_then_one_goes_on_and_the_other_halts(two: Two) -> None:
    """The primary, if it is not kept from asking first (test_witness.py)."""
    two.site.set("mgmt", "down")
    two.site.set("fwd", "down")
    one_alone = ((State.PASSTHROUGH, State.HALTED), (State.HALTED, State.PROMOTED))
    two.watch(lambda: (two.state("a"), two.state("b")) in one_alone)
    speaker = "ab"[two.state("a") is State.HALTED]
    two.watch_for(ETCD_LEASE_S + 0.5)
    two.watch(lambda: two.speakers() == speaker)


def test_given_both_paths_cut_when_the_arbiter_is_frozen_too_then_both_are_silent_until_it_is_back(two: Two) -> None:
    two.etcd.freeze()
    two.watch_for(ETCD_LEASE_S + 0.5)
    assert two.speakers() == "a"  # lock-step needs no arbiter
    two.site.set("mgmt", "down")
    two.site.set("fwd", "down")
    two.watch(lambda: two.speakers() == "")
    two.watch_for(2)
    assert two.speakers() == ""
    two.etcd.thaw()
    two.watch(lambda: len(two.speakers()) == 1)
    two.watch(lambda: State.HALTED in (two.state("a"), two.state("b")))
    two.watch_for(1)
    two.watch(lambda: len(two.speakers()) == 1)


def test_given_a_primary_alone_when_it_can_not_renew_then_it_falls_silent_and_speaks_again_later(two: Two) -> None:
    two.signal("b", signal.SIGKILL)
    two.watch(lambda: two.state("a") is State.PASSTHROUGH)
    two.etcd.freeze()
    frozen_ns = time.monotonic_ns()
    two.watch(lambda: two.speakers() == "")
    assert two.words["a"].deadline_ns < frozen_ns + ETCD_LEASE_S * NS
    two.etcd.thaw()
    two.watch(lambda: two.speakers() == "a")


def test_given_a_primary_alone_when_it_is_frozen_for_longer_than_its_lease_then_it_wakes_up_silent(two: Two) -> None:
    two.signal("b", signal.SIGKILL)
    two.watch(lambda: two.state("a") is State.PASSTHROUGH)
    two.signal("a", signal.SIGSTOP)
    two.watch(lambda: two.speakers() == "")  # no process of its had to run for that
    two.watch_for(1)
    two.signal("a", signal.SIGCONT)
    two.watch(lambda: two.speakers() == "a")  # etcd says that it is still the one


@pytest.mark.parametrize("two", [SHORT_MS], indirect=True)
@pytest.mark.parametrize("seed", range(4))
def test_given_lock_step_when_anything_happens_then_never_two(two: Two, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(6):
        what = chance.choice(
            ["cut mgmt", "cut fwd", "mend", "freeze a", "freeze b", "thaw", "freeze etcd", "thaw etcd"]
        )
        verb, _, whom = what.partition(" ")
        if verb == "cut":
            two.site.set(whom, "down")
        elif verb == "mend":
            two.site.set("mgmt", "up")
            two.site.set("fwd", "up")
        elif verb == "freeze" and whom in ROLES:
            two.signal(whom, signal.SIGSTOP)
        elif what == "thaw":
            for name in ROLES:
                two.signal(name, signal.SIGCONT)
        elif what == "freeze etcd":
            two.etcd.freeze()
        else:
            two.etcd.thaw()
        two.watch_for(chance.random() / 2)
    for name in ROLES:
        two.signal(name, signal.SIGCONT)
    two.etcd.thaw()
    two.watch_for(2)
