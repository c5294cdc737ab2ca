"""A lab whose services a test kills, cuts off and starts again, with a client that counts meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from coloebpf.control import Control, State
from coloebpf.errors import ColoError
from coloebpf.lab import etcd, guests, redis, services
from coloebpf.lab.plan import ARBITER, GUESTS, HOSTS, MGMT, PAIR, LabPlan
from coloebpf.lab.topology import FORWARD_QUEUE
from coloebpf.service.commands import client

PATIENT_MS = 20_000  # a peer timeout that no test reaches: what happens is the test's doing alone
SOON = 30.0  # seconds that anything may take on a busy machine
PATIENCE_S = 60.0  # of a client that waits for what a test does meanwhile
LONG = "".join(f"{number:06}" for number in range(1000))
LONG_EVERY = 10  # answers


class Counter(threading.Thread):
    """A client that lets redis count, one request after the other, and notes what is not the next number.

    The replica that answers must know of all that was answered before: a number that comes twice or is left out is a
    byte that was not proven. Now and then an answer is longer than a segment.
    """

    def __init__(self, connection: redis.Connection) -> None:
        super().__init__(daemon=True)
        self.longest_s, self.count, self.wrong, self.broken = 0.0, 0, "", ""
        self.since = time.monotonic()  # of the last answer
        self._connection, self._ended = connection, threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                answer = self._connection.ask("INCR", "counter").decode()
                now = time.monotonic()
                self.longest_s, self.since = max(self.longest_s, now - self.since), now
                self.count += 1
                if answer != str(self.count):
                    self.wrong = f"{answer} instead of {self.count}"
                    return
                if self.count % LONG_EVERY == 0 and self._connection.ask("ECHO", LONG) != LONG.encode():
                    self.wrong = "a long answer is another one"
                    return
                self._ended.wait(0.002)  # some hundred requests a second leave the machine to others
        except (OSError, ColoError) as e:
            self.broken = str(e)

    def goes_on(self, answers: int = 20, within_s: float = SOON) -> None:
        """Returns after so many more answers."""
        begin = self.count
        until(
            lambda: self.count >= begin + answers or self.wrong or self.broken, "the client gets its answers", within_s
        )
        self.check()

    def check(self) -> None:
        """Nothing was wrong so far."""
        assert not self.wrong, self.wrong
        assert not self.broken, self.broken

    def finish(self) -> None:
        self._ended.set()
        self._connection.interrupt()
        self.join(SOON)
        self._connection.close()


class ServiceLab:
    """The lab `plan`, up; each test begins with fresh()."""

    def __init__(self, plan: LabPlan) -> None:
        self.plan = plan
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.etcd: subprocess.Popen[bytes] | None = None
        self.counter: Counter | None = None

    # ---- as new ----------------------------------------------------------------------------------------------------

    def fresh(self, arbiter: str = "command", peer_timeout_ms: int = PATIENT_MS, **changes: Any) -> Counter:
        """Everything up and in lock-step, and a client that counts. `changes`: of services.configure()."""
        self.reset(arbiter, peer_timeout_ms, **changes)
        self.start(*HOSTS)
        services.protect(self.plan, self.running)
        return self.counted()

    def beginning(self, arbiter: str = "command", peer_timeout_ms: int = PATIENT_MS, **changes: Any) -> Counter:
        """As fresh(), but the engine is held at the first copy: both hosts are `syncing`.

        What the client is told meanwhile nobody proves, and nothing repeats to the replica what that misses. Guests that
        can't be copied are blank() again before the first copy.
        """
        self.reset(arbiter, peer_timeout_ms, **changes)
        self.start(*HOSTS)
        services.ready(self.plan, self.running)
        services.tell_engine(self.plan, do="hang", at="request")
        threading.Thread(target=self._protect, daemon=True).start()
        until(lambda: {self.state(host) for host in HOSTS} == {"syncing"}, "both hosts begin the protection")
        return self.counted()

    def _protect(self) -> None:
        with suppress(ColoError, OSError):  # its service may be killed meanwhile
            services.client_of(self.plan, "primary", "protect", client.ORDER_S, pair=services.PAIR_NAME)

    def counted(self) -> Counter:
        """A client that counts from now on."""
        self.counter = Counter(self.connect(PATIENCE_S))
        self.counter.start()
        self.counter.goes_on()
        return self.counter

    def reset(self, arbiter: str = "command", peer_timeout_ms: int = PATIENT_MS, **changes: Any) -> None:
        """Everything up, but no service runs and no pair is protected."""
        self.leave()
        for guest in GUESTS:
            self.signal_guest(guest, signal.SIGCONT)
        self.plan = replace(self.plan, arbiter=arbiter, peer_timeout_ms=peer_timeout_ms)
        for node in (*HOSTS, *GUESTS):
            self.links(node, "up", *self.plan.devices(node))
        self.mend()
        if arbiter == "etcd":
            self.start_etcd()
        self.links("lan", "down", *HOSTS)  # the switch forgets where it saw the guest
        self.links("lan", "up", *HOSTS)
        for host in HOSTS:
            with Control.open(self.plan.pin_dir(host)) as control:
                control.set_deadline(PAIR, 0)
                control.set_open_after(PAIR, 0)
                control.set_state(PAIR, State.UNPROTECTED)
            services.configure(self.plan, host, **changes)
        self.blank()

    def blank(self) -> None:
        """The replicas know nothing, and nobody is connected to them."""
        for guest in GUESTS:
            replica = redis.Connection(self.plan, guest, "127.0.0.1")
            replica.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            replica.ask("FLUSHALL")
            replica.close()

    def leave(self) -> None:
        """Ends the client and the services."""
        if self.counter is not None:
            self.counter.finish()
            self.counter = None
        for host in HOSTS:
            self.kill(host)
        self.end_etcd()

    # ---- services --------------------------------------------------------------------------------------------------

    def start_etcd(self) -> None:
        """With what it knew before."""
        self.etcd = etcd.start(self.plan)

    def end_etcd(self) -> None:
        if self.etcd is not None:
            self.etcd.kill()
            self.etcd.wait()
            self.etcd = None

    def start(self, *hosts: str, environ: dict[str, str] | None = None) -> None:
        for host in hosts:
            self.running[host] = services.start(self.plan, host, environ)

    def kill(self, host: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to a host's service, and waits for its end if it is to end by it."""
        for pid in guests.running(self.plan, host):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number in (signal.SIGKILL, signal.SIGTERM):
            if host in self.running:
                self.running.pop(host).wait(SOON)
            until(lambda: not guests.running(self.plan, host), f"the {host}'s service ends")

    def signal_guest(self, guest: str, number: signal.Signals) -> None:
        """To all its processes."""
        for pid in guests.running(self.plan, guest):
            os.kill(pid, number)

    def terminate(self, host: str) -> None:
        """Ends a host's service as `systemctl restart` does: its guest, in the same namespace, goes on."""
        process = self.running.pop(host)
        process.terminate()
        process.wait(SOON)

    def status(self, host: str) -> dict[str, Any]:
        """Of a service; nothing if it doesn't run."""
        return services.service_status(self.plan, host) or {}

    def pair(self, host: str) -> dict[str, Any]:
        pairs = self.status(host).get("pairs") or [{}]
        return dict(pairs[0])

    def warns(self, host: str, words: str) -> bool:
        """A service has a warning with these words."""
        return any(words.lower() in warning.lower() for warning in self.status(host).get("warnings", ()))

    def state(self, host: str) -> str:
        """As the programs have it. Read from outside: whoever is inside may be ended with the host."""
        with Control.open(self.plan.pin_dir(host)) as control:
            return control.state(PAIR).state.name.lower()

    def in_lockstep(self) -> None:
        """Returns when both services say so and hear each other."""
        for host in HOSTS:
            until(partial(self._in_lockstep, host), f"the {host} is in lock-step")

    def _in_lockstep(self, host: str) -> bool:
        status = self.status(host)
        return bool(status and status["peer"]["connected"] and status["pairs"][0]["state"] == "lockstep")

    def checkpoint(self) -> int:
        """Returns the new epoch."""
        return services.checkpoint(self.plan)["epoch"]

    def log(self, host: str) -> str:
        return (services.directory(self.plan, host) / services.LOG).read_text()

    # ---- the network -----------------------------------------------------------------------------------------------

    def links(self, node: str, state: str, *devices: str) -> None:
        """Devices of a node up or down."""
        lines = "".join(f"link set {device} {state}\n" for device in devices)
        subprocess.run(["ip", "-n", self.plan.namespace(node), "-batch", "-"], input=lines, text=True, check=True)

    def powered(self, host: str) -> bool:
        """It was not switched off."""
        shown = subprocess.run(
            ["ip", "-n", self.plan.namespace(host), "link", "show", "dev", "br0", "up"],
            capture_output=True,
            text=True,
            check=True,
        )
        return bool(shown.stdout)

    def cut(self, *devices: str) -> None:
        """`fwd0`, `mgmt0`: the primary's end goes down."""
        self.links("primary", "down", *devices)

    def mute(self, host: str, device: str) -> None:
        """`fwd0`, `mgmt0`: what the host sends there is lost from now on; what comes still comes."""
        self._queue(host, device, "blackhole")

    def mend(self) -> None:
        """All that mute(), part() and cut() have done."""
        for host in HOSTS:
            self.links(host, "up", FWD, MANAGEMENT_LINK)
            self._queue(host, FWD, "pfifo", "limit", str(FORWARD_QUEUE))
            self._queue(host, MANAGEMENT_LINK, "pfifo", "limit", str(FORWARD_QUEUE))
            self._isolate(host, "off")

    def part(self) -> None:
        """The hosts don't reach each other on the management network, but the arbiter's machine there."""
        for host in HOSTS:
            self._isolate(host, "on")

    def _isolate(self, port: str, state: str) -> None:
        command = ("bridge", "-n", self.plan.namespace(ARBITER), "link", "set", "dev", port, "isolated", state)
        subprocess.run(command, check=True)

    def _queue(self, host: str, device: str, *kind: str) -> None:
        command = ("tc", "-n", self.plan.namespace(host), "qdisc", "replace", "dev", device, "root", *kind)
        subprocess.run(command, check=True)

    def connect(self, patience_s: float = redis.ANSWER_TIMEOUT) -> redis.Connection:
        return redis.Connection(self.plan, "client", self.plan.nic_list()[0].guest_v4, answer_timeout=patience_s)

    def replicas_agree(self) -> None:
        """Returns when both have counted alike, as they would after a copy: here nothing can be copied."""
        replicas = [redis.Connection(self.plan, guest, "127.0.0.1") for guest in GUESTS]
        until(lambda: len({replica.ask("GET", "counter") for replica in replicas}) == 1, "the replicas know the same")
        for replica in replicas:
            replica.close()

    def set_apart(self, key: str, pvm: str, svm: str) -> None:
        """The replicas know different things. Of one length, for nothing is copied and the stream has to go on."""
        for guest, value in (("pvm", pvm), ("svm", svm)):
            replica = redis.Connection(self.plan, guest, "127.0.0.1")
            replica.ask("SET", key, value)
            replica.close()


def until(condition: Callable[[], object], what: str, timeout: float = SOON) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what}"
        time.sleep(0.01)


FWD, MANAGEMENT_LINK = "fwd0", MGMT
