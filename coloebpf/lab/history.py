"""Clients that write to and read from redis all the time, and note what they asked and were answered, and when.

Afterwards check() says what is wrong with it: registers that many clients share must be linearizable, and every element
that a client has put on its own list must be there, in order.
"""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

from coloebpf.errors import ColoError
from coloebpf.lab import linearizable
from coloebpf.lab.linearizable import Operation
from coloebpf.lab.plan import LabPlan
from coloebpf.lab.redis import NIL, Connection

KEYS = 4  # registers that all clients share
PATIENCE = 120.0  # seconds for one answer: longer than any failover, so that only a broken connection ends a client
WRITES, LISTS = 0.4, 0.2  # parts of the requests; the rest reads


@dataclass
class Record:
    """What one client saw; times are of time.monotonic()."""

    operations: list[Operation] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)  # acknowledged elements of the client's list
    in_doubt: str = ""  # an element whose answer never came
    wrong: list[str] = field(default_factory=list)  # answers that can't be
    broken: str = ""  # why the connection ended, if it did
    answers: int = 0
    longest_s: float = 0.0  # between two answers
    last: float = 0.0  # time of the last answer
    latencies: list[float] = field(default_factory=list)  # seconds


class Client(threading.Thread):
    """One connection, one request after the other with `pause_s` in between."""

    def __init__(self, connection: Connection, number: int, pause_s: float) -> None:
        super().__init__(daemon=True)
        self.record, self.number = Record(), number
        self._connection, self._pause_s = connection, pause_s
        self._random = random.Random(number)
        self._ended = threading.Event()
        self._written = 0

    @property
    def list_name(self) -> str:
        return f"list-{self.number}"

    def run(self) -> None:
        self.record.last = time.monotonic()
        try:
            while not self._ended.is_set():
                self._once()
                self._ended.wait(self._pause_s)
        except (OSError, ColoError) as e:
            self.record.broken = str(e) or type(e).__name__

    def finish(self) -> None:
        """After the request that is under way."""
        self._ended.set()
        self.join()
        self._connection.close()

    def _once(self) -> None:
        kind, key = self._random.random(), f"register-{self._random.randrange(KEYS)}"
        if kind < WRITES:
            self._write(key)
        elif kind < WRITES + LISTS:
            self._push()
        else:
            self._read(key)

    def _value(self) -> str:
        self._written += 1
        return f"{self.number}-{self._written}"

    def _ask(self, *words: str) -> tuple[bytes, float, float]:
        began = time.monotonic()
        answer = self._connection.ask(*words)
        ended = time.monotonic()
        record = self.record
        record.answers += 1
        record.longest_s = max(record.longest_s, ended - record.last)
        record.last = ended
        record.latencies.append(ended - began)
        return answer, began, ended

    def _write(self, key: str) -> None:
        value, began = self._value(), time.monotonic()
        try:
            answer, began, ended = self._ask("SET", key, value)
        except (OSError, ColoError):
            self.record.operations.append(Operation(key, True, value, began, None))
            raise
        self._expect(answer, b"OK")
        self.record.operations.append(Operation(key, True, value, began, ended))

    def _read(self, key: str) -> None:
        answer, began, ended = self._ask("GET", key)
        value = None if answer == NIL else answer.decode()
        self.record.operations.append(Operation(key, False, value, began, ended))

    def _push(self) -> None:
        value = self.record.in_doubt = self._value()
        answer, _, _ = self._ask("RPUSH", self.list_name, value)
        self.record.in_doubt = ""
        self.record.pushed.append(value)
        self._expect(answer, b"%d" % len(self.record.pushed))

    def _expect(self, answer: bytes, right: bytes) -> None:
        if answer != right:
            self.record.wrong.append(f"client {self.number}: {answer.decode()} instead of {right.decode()}")


class History:
    """Some clients at work."""

    def __init__(self, plan: LabPlan, clients: int, pause_s: float) -> None:
        self._plan = plan
        self.clients = [Client(self._connect(), number, pause_s) for number in range(clients)]

    def _connect(self) -> Connection:
        return Connection(self._plan, "client", self._plan.nic_list()[0].guest_v4, answer_timeout=PATIENCE)

    def start(self) -> None:
        for client in self.clients:
            client.start()

    def finish(self) -> None:
        """Ends the clients; each gets its last answer first."""
        for client in self.clients:
            client.finish()

    @property
    def answers(self) -> int:
        return sum(client.record.answers for client in self.clients)

    @property
    def broken(self) -> list[str]:
        """Connections that ended, with the reason."""
        return [f"client {c.number}: {c.record.broken}" for c in self.clients if c.record.broken]

    def gap(self) -> float:
        """The longest time, since this was asked last, from one answer of a client to the next; seconds.

        Also to one that has not come yet.
        """
        now = time.monotonic()
        gaps = [now - client.record.last for client in self.clients if client.is_alive()]
        for client in self.clients:
            gaps.append(client.record.longest_s)
            client.record.longest_s = 0.0
        return max(gaps)

    def latencies(self) -> list[float]:
        """Of all requests, in seconds, sorted."""
        return sorted(latency for client in self.clients for latency in client.record.latencies)

    def check(self) -> list[str]:
        """Everything that is wrong, after finish(): asks the server for what it has now."""
        try:
            return self._check()
        except (OSError, ColoError) as e:
            return [f"the server can't be asked for what it has: {e}"]

    def _check(self) -> list[str]:
        connection = self._connect()
        operations = [operation for client in self.clients for operation in client.record.operations]
        found = [wrong for client in self.clients for wrong in client.record.wrong]
        for key in sorted({operation.key for operation in operations}):
            began = time.monotonic()
            answer = connection.ask("GET", key)
            value = None if answer == NIL else answer.decode()
            operations.append(Operation(key, False, value, began, time.monotonic()))
        for client in self.clients:
            found += self._check_list(connection, client)
        with suppress(OSError):
            connection.close()
        return found + linearizable.check(operations)

    @staticmethod
    def _check_list(connection: Connection, client: Client) -> list[str]:
        there = connection.ask_list("LRANGE", client.list_name, "0", "-1")
        wanted = client.record.pushed
        if there == wanted or there == [*wanted, client.record.in_doubt]:
            return []
        missing = [value for value in wanted if value not in set(there)]
        return [f"{client.list_name}: {len(missing)} of {len(wanted)} acknowledged writes are missing: {missing[:5]}"]
