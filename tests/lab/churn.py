"""Clients whose connections come and go, each with answers that can be told beforehand."""

from __future__ import annotations

import socket
import threading
from random import Random

from coloebpf.errors import ColoError
from coloebpf.lab import redis
from coloebpf.netns import inside
from tests.lab.service_lab import PATIENCE_S, ServiceLab

LONGEST = 9000  # bytes of an answer: several segments
MOST_COMMANDS = 8  # of one connection
DISCARD_PORT = 9  # nobody listens at the guests: both answer with the same ICMP error


class Churner(threading.Thread):
    """Opens a connection, asks a few things, and closes it with a FIN or a RST, until finish().

    `wrong`: the first answer that was not the right one; `broken`: the first connection that broke.
    """

    def __init__(self, lab: ServiceLab, number: int, dice: Random) -> None:
        super().__init__(daemon=True)
        self.connections = self.answers = self.datagrams = 0
        self.wrong = self.broken = ""
        self._lab, self._dice, self._key = lab, dice, f"churn{number}"
        self._value = ""
        self._ended = threading.Event()
        with inside(lab.plan.namespace("client")):
            self._port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.start()

    def run(self) -> None:
        try:
            self._ask(self._lab.connect(PATIENCE_S), "SET", self._key, "")
            while not (self._ended.is_set() or self.wrong):
                self._one()
        except (OSError, ColoError) as e:
            self.broken = str(e) or type(e).__name__

    def _one(self) -> None:
        connection = self._lab.connect(PATIENCE_S)
        self.connections += 1
        for _ in range(self._dice.randint(0, MOST_COMMANDS)):
            match self._dice.choice(("SET", "GET", "ECHO")):
                case "SET":
                    self._value = str(self._dice.random())
                    right, answer = "OK", self._ask(connection, "SET", self._key, self._value)
                case "GET":
                    right, answer = self._value, self._ask(connection, "GET", self._key)
                case _:
                    right = "x" * self._dice.randint(1, LONGEST)
                    answer = self._ask(connection, "ECHO", right)
            if answer != right:
                self.wrong = f"{answer[:40]!r} instead of {right[:40]!r}"
                return
        if self._dice.random() < 0.5:
            connection.close()
        else:
            connection.abort()
        if self._dice.random() < 0.2:
            self._port.sendto(b"nobody listens", (self._lab.plan.nic_list()[0].guest_v4, DISCARD_PORT))
            self.datagrams += 1
        self._ended.wait(self._dice.uniform(0, 0.05))

    def _ask(self, connection: redis.Connection, *words: str) -> str:
        answer = connection.ask(*words).decode()
        self.answers += 1
        return answer

    def finish(self) -> None:
        self._ended.set()
        self.join(PATIENCE_S)
        self._port.close()
