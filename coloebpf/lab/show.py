"""`coloebpf lab show`: two hosts with their services, two redis replicas behind one address, one client.

Three acts: load in lock-step; an answer that differs by the clock, held until a checkpoint; the primary's end under
load. What must hold is checked on the way, and the exit code says whether it all did.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from coloebpf.errors import ColoError
from coloebpf.lab import commands, needs, redis, services
from coloebpf.lab.display import Display, Sample
from coloebpf.lab.plan import GUESTS, LabPlan
from coloebpf.units import amount, duration

SAMPLE_PERIOD = 0.25  # seconds between two looks at the counters
PROBE_PERIOD = 0.01  # seconds between two questions of the client that looks for gaps
DELAY_MS = 1500  # of the checkpoint that the audience is to see; a real one takes as long as there is to copy
SILENCE = 1.0  # seconds of it for which the client must not get a byte of the unproven answer
REQUEST_TIMEOUT = 0.4  # seconds for the service to ask for a checkpoint; it takes about a millisecond
PEER_TIMEOUT_MS = 1000  # the usual 200 ms are for hosts that do nothing else: here both share two CPUs with 50 clients
TRIES = 5  # one answer in twenty is the same to the microsecond
DRAIN_TIMEOUT = 30.0  # seconds after a load for the last packets to be proven
LOAD_BEFORE_END = 1.0  # seconds of load until the primary is switched off
LIST_LENGTH = 100
AGREED = "the same in both replicas"

# The list is filled beforehand by one client: LPUSH answers with the list's length, and so with the order in which a
# replica serves its 50 clients, which nobody promises.
LOADS = (
    redis.Load("SET", 100_000, 1, ("-t", "set")),
    redis.Load("GET, pipelined", 400_000, 16, ("-t", "get")),
    redis.Load("GET over IPv6", 100_000, 1, ("-t", "get"), v6=True),
    redis.Load(f"LRANGE of {LIST_LENGTH}", 40_000, 1, ("lrange", "list", "0", str(LIST_LENGTH - 1))),
    redis.Load("MSET of 10", 40_000, 1, ("-t", "mset")),
)
LOAD_AT_THE_END = redis.Load("SET, and the primary is switched off", 100_000, 1, ("-t", "set"))


class Probe(threading.Thread):
    """A client that asks one small question after the other and notes the longest time between two answers."""

    def __init__(self, connection: redis.Connection) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._ended = threading.Event()
        self.answers = 0
        self.wrong = 0
        self.longest_gap = 0.0

    def run(self) -> None:
        last = time.monotonic()
        with suppress(OSError, ColoError):  # an answer that never comes shows as a gap
            while not self._ended.wait(PROBE_PERIOD):
                self.wrong += self._connection.ask("GET", "agreed") != AGREED.encode()
                self.answers += 1
                now = time.monotonic()
                self.longest_gap = max(self.longest_gap, now - last)
                last = now
            return
        self.longest_gap = max(self.longest_gap, time.monotonic() - last)

    def finish(self) -> None:
        self._ended.set()
        self.join()
        self._connection.close()


class Show:
    """One run, on a lab that is up with its services and redis in both guests."""

    def __init__(self, plan: LabPlan, display: Display) -> None:
        self._plan = plan
        self._display = display
        self._address = plan.nic_list()[0].guest_v4
        self._address_v6 = plan.nic_list()[0].guest_v6
        self._replicas = {guest: redis.Connection(plan, guest, "127.0.0.1") for guest in GUESTS}
        self._checks: list[tuple[str, bool]] = []
        self._expected_divergences = 0
        self._facts: list[tuple[str, str]] = []

    def run(self) -> bool:
        """All acts; True if everything held."""
        self._prepare()
        self._display.say("1. Both replicas get each request; an answer leaves when both have given it.")
        gap = self._load(LOADS)
        self._check_lockstep()
        self._facts.append(("longest pause in lock-step", duration(gap * 1e9)))
        self._differ()
        self._count()
        self._lose_the_primary()
        self._display.summary(self._checks, self._facts)
        return all(held for _, held in self._checks)

    def _prepare(self) -> None:
        filler = self._connect()
        filler.ask("RPUSH", "list", *(f"element {number}" for number in range(LIST_LENGTH)))
        filler.ask("SET", "agreed", AGREED)
        filler.close()

    def _connect(self) -> redis.Connection:
        return redis.Connection(self._plan, "client", self._address)

    def _load(self, loads: tuple[redis.Load, ...], meanwhile: Callable[[], None] | None = None) -> float:
        """Returns the longest time that a client beside the load had to wait."""
        probe = Probe(self._connect())
        probe.start()
        timer = threading.Timer(LOAD_BEFORE_END, meanwhile) if meanwhile else None
        if timer:
            timer.start()
        for load in loads:
            text = f"{load.label}: {load.requests:,} requests of {redis.CLIENTS} clients answered"
            self._check(text, self._benchmark(load))
        if timer:
            timer.join()
        probe.finish()
        self._check(f"a client beside them got {probe.answers:,} right answers", probe.answers > 0 and not probe.wrong)
        return probe.longest_gap

    def _benchmark(self, load: redis.Load) -> bool:
        process = redis.benchmark(self._plan, load, self._address_v6 if load.v6 else self._address)
        try:
            while process.poll() is None:
                self._display.sample(load.label, self._sample())
                time.sleep(SAMPLE_PERIOD)
            output = process.stdout.read() if process.stdout else ""
        finally:
            process.kill()
            process.wait()
        return process.returncode == 0 and "error" not in output.lower()

    def _nic(self) -> dict[str, Any]:
        nic: dict[str, Any] = services.snapshot(self._plan, "primary")["nics"][0]
        return nic

    def _pair(self, host: str) -> dict[str, Any]:
        status = services.service_status(self._plan, host)
        return dict(status["pairs"][0]) if status else {}

    def _sample(self) -> Sample:
        requests = sum(redis.requests_served(self._replicas[guest].ask("INFO", "stats")) for guest in GUESTS) // 2
        return Sample.of(self._nic(), requests, time.monotonic())

    def _divergences(self) -> int:
        # What only came late on a busy machine is told too, but it is no divergence.
        return sum(n for why, n in self._nic()["divergences"].items() if not why.startswith("missing"))

    def _check_lockstep(self) -> None:
        drained = _wait_for(lambda: self._nic()["held"] == 0, DRAIN_TIMEOUT)
        self._check("nothing is held in lock-step", drained)
        self._check("no divergence in lock-step", self._divergences() == 0)

    def _differ(self) -> None:
        self._display.say("2. A client asks for the time: each replica has its own clock, so their answers differ.")
        services.tell_engine(self._plan, do="delay", ms=DELAY_MS)
        client = self._connect()
        before = self._commits()
        self._check("the service asks for a checkpoint because of it", self._ask_the_time(client))
        self._check(f"not one byte of the unproven answer in {SILENCE} s of it", client.silent_for(SILENCE))
        self._check("until then no checkpoint has committed", self._commits() == before)
        answer = client.answer().decode()
        last = self._pair("primary")["last"]
        held = duration(last["duration_ms"] * 1e6)
        self._display.say(f"   {last['reason']}: held for {held}; the client reads {answer}")
        self._check("the checkpoint's commit released the primary's answer", self._commits() > before)
        services.tell_engine(self._plan, do="delay", ms=0)
        self._check("the connection goes on", client.ask("GET", "agreed").decode() == AGREED)
        client.close()
        self._expected_divergences = self._divergences()
        self._check("there was a divergence, as there should be", self._expected_divergences > 0)

    def _ask_the_time(self, client: redis.Connection) -> bool:
        """Until the answers differ; the clocks may agree to the microsecond, and then that answer is proven."""
        for _ in range(TRIES):
            client.send("EVAL", redis.CLOCK, "0")
            if _wait_for(self._asks, REQUEST_TIMEOUT):
                return True
            client.answer()
        return False

    def _asks(self) -> bool:
        pending = self._pair("primary")["pending"]
        return bool(pending) and pending["trigger"] == "divergence"

    def _commits(self) -> int:
        return sum(self._pair("primary")["checkpoints"].values())

    def _lose_the_primary(self) -> None:
        self._display.say("3. The primary host is switched off under load; the clients' connections go on.")
        gap = self._load((LOAD_AT_THE_END,), lambda: services.switch_off(self._plan, "primary"))
        pair = self._pair("secondary")
        self._check("the secondary's replica is the guest now", pair.get("state") == "promoted")
        self._display.say(f"   {pair.get('state')}: {pair.get('state_reason')}")
        self._facts.append(("longest pause when the primary ended", duration(gap * 1e9)))

    def _check(self, text: str, held: bool) -> None:
        self._checks.append((text, held))

    def _count(self) -> None:
        nic = self._nic()
        self._facts += [
            ("requests served in lock-step", f"{self._sample().requests:,}"),
            ("compared", f"{amount(nic['compared_bytes'])} in {nic['compared_packets']:,} packets"),
            ("holding time", f"p50 {duration(nic['holding_ns']['p50'])}, p99 {duration(nic['holding_ns']['p99'])}"),
            ("checkpoints", ", ".join(f"{n} {why}" for why, n in self._pair("primary")["checkpoints"].items())),
        ]


def run(name: str, out: TextIO = sys.stdout) -> int:
    """Make a lab, run the show in it, take it down; 0 if all held."""
    needs.check({"redis-server": "redis-server", "redis-benchmark": "redis-tools"})
    plan = LabPlan(name, "process", command=redis.SERVER, service=True, peer_timeout_ms=PEER_TIMEOUT_MS)
    display = Display(out)
    display.say("Building two hosts with their services, a client and two replicas of redis-server ...")
    with commands.temporary(plan, services.bring_up):
        try:
            held = Show(plan, display).run()
        finally:
            display.settle()
    return 0 if held else 1


def _wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held
