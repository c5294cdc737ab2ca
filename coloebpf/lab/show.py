"""`coloebpf lab show`: two redis replicas behind one address, compared before a client sees a byte.

Four acts: load in lock-step; one replica is made to answer differently; a checkpoint; load again. What must hold is
checked on the way, and the exit code says whether it all did.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from textwrap import indent
from typing import Any, TextIO

from coloebpf.errors import ColoError
from coloebpf.lab import commands, needs, redis
from coloebpf.lab.display import MEBI, Display, Sample
from coloebpf.lab.plan import GUESTS, LabPlan
from coloebpf.lab.report import event_text
from coloebpf.units import duration

SAMPLE_PERIOD = 0.25  # seconds between two looks at the counters
PROBE_PERIOD = 0.01  # seconds between two questions of the client that looks for gaps
SILENCE = 1.5  # seconds for which the client must not get a byte of the unproven answer
EVENT_TIMEOUT = 2.0  # seconds for the divergence to be reported; it takes under a tick of the lab's agent
DRAIN_TIMEOUT = 3.0  # seconds after a load for the last packets to be proven
LIST_LENGTH = 100
AGREED = "the same in both replicas"
PRIMARYS = "what the primary says"
SECONDARYS = "another answer, from the secondary"

# The list is filled beforehand by one client: LPUSH answers with the list's length, and so with the order in which a
# replica serves its 50 clients, which nobody promises.
LOADS = (
    redis.Load("SET", 100_000, 1, ("-t", "set")),
    redis.Load("GET, pipelined", 400_000, 16, ("-t", "get")),
    redis.Load("GET over IPv6", 100_000, 1, ("-t", "get"), v6=True),
    redis.Load(f"LRANGE of {LIST_LENGTH}", 40_000, 1, ("lrange", "list", "0", str(LIST_LENGTH - 1))),
    redis.Load("MSET of 10", 40_000, 1, ("-t", "mset")),
)
LOADS_AFTER = (redis.Load("SET and GET", 50_000, 1, ("-t", "set,get")),)


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
    """One run, on a lab that is up with redis in both guests."""

    def __init__(
        self,
        plan: LabPlan,
        display: Display,
        snapshot: Callable[[], dict[str, Any]],
        checkpoint: Callable[[], dict[str, int]],
    ) -> None:
        self._plan = plan
        self._display = display
        self._snapshot = snapshot
        self._checkpoint = checkpoint
        self._address = plan.nic_list()[0].guest_v4
        self._address_v6 = plan.nic_list()[0].guest_v6
        self._replicas = {guest: redis.Connection(plan, guest, "127.0.0.1") for guest in GUESTS}
        self._checks: list[tuple[str, bool]] = []
        self._expected_divergences = 0
        self._probes: list[Probe] = []

    def run(self) -> bool:
        """All acts; True if everything held."""
        self._prepare()
        self._display.say("1. Both replicas get each request; an answer leaves when both have given it.")
        self._load(LOADS)
        self._check_lockstep("in lock-step")
        self._differ()
        self._display.say("4. On with new connections, in the new epoch.")
        self._load(LOADS_AFTER)
        self._check_lockstep("after the checkpoint")
        self._summarize()
        return all(held for _, held in self._checks)

    def _prepare(self) -> None:
        filler = self._connect()
        filler.ask("RPUSH", "list", *(f"element {number}" for number in range(LIST_LENGTH)))
        filler.ask("SET", "agreed", AGREED)
        filler.ask("SET", "answer", PRIMARYS)
        filler.close()

    def _connect(self) -> redis.Connection:
        return redis.Connection(self._plan, "client", self._address)

    def _load(self, loads: tuple[redis.Load, ...]) -> None:
        probe = Probe(self._connect())
        probe.start()
        self._probes.append(probe)
        for load in loads:
            text = f"{load.label}: {load.requests:,} requests of {redis.CLIENTS} clients answered"
            self._check(text, self._benchmark(load))
        probe.finish()
        self._check(f"a client beside them got {probe.answers:,} right answers", probe.answers > 0 and not probe.wrong)

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
        nic: dict[str, Any] = self._snapshot()["nics"][0]
        return nic

    def _sample(self) -> Sample:
        requests = redis.requests_served(self._replicas["pvm"].ask("INFO", "stats"))
        return Sample.of(self._nic(), requests, time.monotonic())

    def _divergences(self) -> int:
        # What only came late on a busy machine is told too, but it is no divergence.
        return sum(n for why, n in self._nic()["divergences"].items() if not why.startswith("missing"))

    def _check_lockstep(self, when: str) -> None:
        drained = _wait_for(lambda: self._nic()["held"] == 0, DRAIN_TIMEOUT)
        self._check(f"nothing is held {when}", drained)
        self._check(f"no divergence {when}", self._divergences() == self._expected_divergences)

    def _differ(self) -> None:
        self._display.say("2. The secondary's replica is changed behind our back; then a client asks.")
        self._replicas["svm"].ask("SET", "answer", SECONDARYS)
        before = self._divergences()
        events = EventTail(self._plan.run_dir / "events.jsonl")
        client = self._connect()
        client.send("GET", "answer")
        self._check(f"not one byte of the unproven answer in {SILENCE} s", client.silent_for(SILENCE))
        reported = _wait_for(lambda: events.has("divergence"), EVENT_TIMEOUT)
        self._check("the divergence was reported", reported)
        told = events.first("divergence")
        self._display.say(indent(event_text(told) if told else "no event", "   "))

        self._display.say("3. A checkpoint: the secondary becomes a copy of the primary, so what was held is true now.")
        # Here, where replicas are processes, what the engine would copy is written by hand.
        self._replicas["svm"].ask("SET", "answer", PRIMARYS)
        done = self._checkpoint()
        answer = client.answer().decode()
        self._display.say(f"   epoch {done['epoch']}, {done['flushed']} packets sent; the client reads: {answer}")
        self._check("the checkpoint released the primary's answer", answer == PRIMARYS and done["flushed"] > 0)
        # The SVM's process was not copied, so its connection has numbers of its own that no translation knows any more.
        # New connections are sound; this one ends on both sides.
        client.abort()
        self._replicas["svm"].ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        self._expected_divergences = self._divergences()
        self._check("there was a divergence, as there should be", self._expected_divergences > before)

    def _check(self, text: str, held: bool) -> None:
        self._checks.append((text, held))

    def _summarize(self) -> None:
        nic = self._nic()
        unexpected = self._divergences() - self._expected_divergences
        self._display.summary(
            self._checks,
            [
                ("requests served", f"{self._sample().requests:,}"),
                ("compared", f"{nic['compared_bytes'] / MEBI:,.1f} MiB in {nic['compared_packets']:,} packets"),
                ("holding time", f"p50 {duration(nic['holding_ns']['p50'])}, p99 {duration(nic['holding_ns']['p99'])}"),
                ("held at the end", f"{nic['held']}"),
                ("divergences", f"{self._expected_divergences} on purpose, {unexpected} else"),
                ("longest gap for a client", duration(max(probe.longest_gap for probe in self._probes) * 1e9)),
            ],
        )


class EventTail:
    """The events that the lab's agent writes from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = path.stat().st_size if path.exists() else 0

    def first(self, kind: str) -> dict[str, Any] | None:
        if not self._path.exists():
            return None
        with open(self._path, encoding="utf-8") as log:
            log.seek(self._start)
            whole = [json.loads(line) for line in log if line.endswith("\n")]
        return next((event for event in whole if event["kind"] == kind), None)

    def has(self, kind: str) -> bool:
        return self.first(kind) is not None


def run(name: str, out: TextIO = sys.stdout) -> int:
    """Make a lab, run the show in it, take it down; 0 if all held."""
    needs.check({"redis-server": "redis-server", "redis-benchmark": "redis-tools"})
    from coloebpf.lab import hosts

    plan = LabPlan(name, "process", command=redis.SERVER)
    display = Display(out)
    display.say("Building two hosts, a forward link, a client and two replicas of redis-server ...")
    with commands.temporary(plan, hosts.bring_up):
        try:
            held = Show(plan, display, lambda: hosts.snapshot(plan, "primary"), lambda: hosts.checkpoint(plan)).run()
        finally:
            display.settle()
    return 0 if held else 1


def _wait_for(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not (held := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held
