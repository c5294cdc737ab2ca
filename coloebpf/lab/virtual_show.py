"""`coloebpf lab show` with virtual machines: real guests with a real server, one a live copy of the other.

Clients write and read all the time and note what they were answered. First the guests run in lock-step, with the
checkpoints that their own differences ask for; then checkpoints are asked for; then the primary host loses its power.
At the end every acknowledged write must be there, and the whole history must be linearizable.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from coloebpf.lab import commands, machine, needs, redis, services
from coloebpf.lab.display import Display, Sample
from coloebpf.lab.history import History
from coloebpf.lab.pauses import Pauses
from coloebpf.lab.plan import LabPlan
from coloebpf.units import amount, duration

SAMPLE_PERIOD = 0.25  # seconds between two looks at the counters
CLIENTS = 4
PAUSE_S = 0.01  # of a client between an answer and its next request: two emulated machines share this one's CPUs
LOCKSTEP_S = 10.0
ON_DEMAND = 5  # checkpoints
FILLING_S = 1.5  # between two of them: the next copy is filled meanwhile, so that little is left when it is asked for
BEFORE_END_S = 2.0  # of load, until the primary is switched off
AFTER_END_S = 8.0
FAILOVER_LIMIT_S = 30.0  # until the secondary must have taken over, whatever else this machine does
# The services share the CPUs with two emulated machines: silence for less is no sign of a lost host here.
PEER_TIMEOUT_MS = 1000
MOST_TOLD = 5  # sentences about a history that is wrong


class VirtualShow:
    """One run, on a lab that is up with its services and a protected virtual machine."""

    def __init__(self, plan: LabPlan, display: Display) -> None:
        self._plan, self._display = plan, display
        self._history = History(plan, CLIENTS, PAUSE_S)
        self._seen = "primary"  # the host whose counters are shown
        self._checks: list[tuple[str, bool]] = []
        self._facts: list[tuple[str, str]] = []

    def run(self) -> bool:
        """All acts; True if everything held."""
        pauses = Pauses(machine.monitor(self._plan))
        pauses.start()
        self._history.start()
        try:
            self._lockstep()
            self._on_demand()
            self._difference()
            self._count(pauses)
            self._lose_the_primary()
        finally:
            self._history.finish()
            pauses.close()
        self._judge()
        self._display.summary(self._checks, self._facts)
        return all(held for _, held in self._checks)

    # ---- the acts --------------------------------------------------------------------------------------------------

    def _lockstep(self) -> None:
        self._display.say(
            f"1. {CLIENTS} clients write to and read from redis in the machine; an answer leaves when both have given "
            "it, or when a checkpoint has made them the same again."
        )
        before = self._history.answers
        self._watch("lock-step", LOCKSTEP_S)
        self._check("the clients are answered in lock-step", self._history.answers - before > CLIENTS)
        self._check("the pair is in lock-step", self._pair("primary").get("state") in ("lockstep", "checkpointing"))

    def _on_demand(self) -> None:
        self._display.say(f"2. {ON_DEMAND} checkpoints are asked for, under load.")
        took = []
        for _ in range(ON_DEMAND):
            self._watch("between checkpoints", FILLING_S)
            began = time.monotonic()
            services.checkpoint(self._plan)
            took.append(time.monotonic() - began)
        self._facts.append(
            ("checkpoint on demand", f"{duration(_median(took) * 1e9)}, {duration(max(took) * 1e9)} at most")
        )

    def _difference(self) -> None:
        self._display.say("3. A client asks for the time: each machine has its own clock, so their answers differ.")
        client = redis.Connection(
            self._plan, "client", self._plan.nic_list()[0].guest_v4, answer_timeout=FAILOVER_LIMIT_S
        )
        before, began = self._commits(), time.monotonic()
        answer = client.ask("EVAL", redis.CLOCK, "0").decode()
        held = time.monotonic() - began
        self._check("a checkpoint's commit released the primary's answer", self._commits() > before)
        self._display.say(f"   answered after {duration(held * 1e9)}: {answer}")
        client.close()

    def _lose_the_primary(self) -> None:
        self._display.say("4. The primary host loses its power under load; the clients' connections go on.")
        self._watch("load", BEFORE_END_S)
        before = self._history.answers
        self._facts.append(("longest gap before", duration(self._history.gap() * 1e9)))
        services.switch_off(self._plan, "primary")
        self._seen = "secondary"
        self._watch(
            "the primary is off",
            AFTER_END_S,
            until=lambda: self._promoted() and self._history.answers > before + 20 * CLIENTS,
        )
        if not self._promoted():
            self._watch("the primary is off", FAILOVER_LIMIT_S - AFTER_END_S, until=self._promoted)
        pair = self._pair("secondary")
        self._display.say(f"   {pair.get('state')}: {pair.get('state_reason')}")
        self._check("the secondary's machine is the guest now", pair.get("state") == "promoted")
        self._check("the clients are answered by it", self._history.answers > before + CLIENTS)

    def _judge(self) -> None:
        for told in self._history.broken[:MOST_TOLD]:
            self._display.say(f"   {told}")
        self._check("every client kept its TCP connection", not self._history.broken)
        wrong = self._history.check()
        for told in wrong[:MOST_TOLD]:
            self._display.say(f"   {told}")
        self._check("no acknowledged write is missing, and the history is linearizable", not wrong)
        latencies = self._history.latencies()
        self._facts += [
            ("requests", f"{self._history.answers:,}"),
            ("latency", f"p50 {duration(_median(latencies) * 1e9)}, p99 {duration(_of(latencies, 0.99) * 1e9)}"),
            ("longest gap at the failover", duration(self._history.gap() * 1e9)),
        ]

    # ---- looking on ------------------------------------------------------------------------------------------------

    def _watch(self, label: str, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not until():
            self._display.sample(label, self._sample())
            time.sleep(SAMPLE_PERIOD)

    def _nic(self) -> dict[str, Any]:
        nic: dict[str, Any] = services.snapshot(self._plan, self._seen)["nics"][0]
        return nic

    def _sample(self) -> Sample:
        return Sample.of(self._nic(), self._history.answers, time.monotonic())

    def _pair(self, host: str) -> dict[str, Any]:
        status = services.service_status(self._plan, host)
        return dict(status["pairs"][0]) if status and status["pairs"] else {}

    def _promoted(self) -> bool:
        return bool(self._pair("secondary").get("state") == "promoted")

    def _commits(self) -> int:
        return sum(self._pair("primary")["checkpoints"].values())

    def _count(self, pauses: Pauses) -> None:
        nic, pair = self._nic(), self._pair("primary")
        stood = sorted(pauses.seconds)
        self._check("the machine stood still for each checkpoint and went on", len(stood) >= ON_DEMAND)
        self._facts += [
            ("checkpoints", ", ".join(f"{n} {why}" for why, n in pair["checkpoints"].items())),
            ("divergences", ", ".join(f"{n} {why}" for why, n in nic["divergences"].items() if n) or "none"),
            ("PVM stood still", f"{duration(_median(stood) * 1e9)}, {duration(max(stood, default=0) * 1e9)} at most"),
            ("compared", f"{amount(nic['compared_bytes'])} in {nic['compared_packets']:,} packets"),
            ("holding time", f"p50 {duration(nic['holding_ns']['p50'])}, p99 {duration(nic['holding_ns']['p99'])}"),
        ]

    def _check(self, text: str, held: bool) -> None:
        self._checks.append((text, held))


def run(name: str, out: TextIO = sys.stdout) -> int:
    """Make a lab, run the show in it, take it down; 0 if all held."""
    needs.check(needs.VIRTUAL)
    plan = LabPlan(name, "qemu", service=True, peer_timeout_ms=PEER_TIMEOUT_MS)
    display = Display(out)
    display.say("Building two hosts with their services, a client, and a virtual machine that is protected ...")
    with commands.temporary(plan, services.bring_up):
        try:
            held = VirtualShow(plan, display).run()
        finally:
            display.settle()
    return 0 if held else 1


def _of(ordered: list[float], part: float) -> float:
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] if ordered else 0.0


def _median(values: list[float]) -> float:
    return _of(sorted(values), 0.5)
