"""A client of a guest's server: it counts on one connection, and never sees the count go back."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from coloebpf.netns import inside
from tests.xen import service
from tests.xen.lab import Lab

REDIS = 6379
PATIENCE_S = 1200.0  # seconds; only bounds a hang


def until(there: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while not there():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(1)


def pair(lab: Lab, host: int, name: str = "web") -> dict[str, Any]:
    """What a host's service says of a pair."""
    [found] = [pair for pair in service.status(lab, host)["service"]["pairs"] if pair["name"] == name]
    return dict(found)


class Counter:
    """A redis client on one connection that counts; what it was told never goes back."""

    def __init__(self, lab: Lab, address: str, key: str = "n") -> None:
        self._address, self._key = address, key
        with inside(lab.plan.name):
            until(self._connects, "the guest's server, which is up later than its answer to a ping")
        self._said = self._socket.makefile("rb")
        self.value = 0
        self.longest_s = 0.0  # that an answer took
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self._thread: threading.Thread | None = None

    def _connects(self) -> bool:
        try:
            self._socket = socket.create_connection((self._address, REDIS), timeout=PATIENCE_S)
        except ConnectionRefusedError:
            return False
        return True

    def ask(self, command: str) -> str:
        """One line of answer."""
        self._socket.sendall(command.encode() + b"\r\n")
        return self._said.readline().decode().strip()

    def line(self) -> str:
        """The next line of an answer that has more of them."""
        return self._said.readline().decode().strip()

    def time(self) -> str:
        """redis' TIME: what two guests never answer alike."""
        lines = [self.ask("TIME"), *(self.line() for _ in range(4))]
        assert lines[0] == "*2", lines
        return f"{lines[2]}.{lines[4]}"

    def count(self) -> None:
        """One more; the answer must be the next number."""
        begun = time.monotonic()
        answer = self.ask(f"INCR {self._key}")
        assert answer == f":{self.value + 1}", (answer, self.value)
        self.value += 1
        self.longest_s = max(self.longest_s, time.monotonic() - begun)

    def close(self) -> None:
        self._socket.close()

    # ---- on and on -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Counts from here on, without a pause."""
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No longer; fails if anything was wrong meanwhile."""
        assert self._thread is not None
        self._stop.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), f"no answer behind {self.value}"
        if self._failed is not None:
            raise self._failed

    def goes_on(self, more: int) -> None:
        """Returns when so many more have been counted."""
        goal = self.value + more
        until(lambda: self.value >= goal or self._failed is not None, f"the count of {goal}, it is {self.value}")
        if self._failed is not None:
            raise self._failed

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.count()
        except BaseException as e:  # of a thread: told by whoever waits for it
            self._failed = e


def diverge(lab: Lab, counter: Counter, server: Counter, wanted: int) -> None:
    """Until the traffic has asked for so many checkpoints by divergences, while `counter` goes on.

    An answer that is late for another reason asks for one too, as a timeout.
    """
    before = pair(lab, 1)["checkpoints"].get("divergence", 0)
    times: list[float] = []
    made = 0
    while made < wanted:
        assert len(times) < 3 * wanted, f"{made} divergences behind {len(times)} answers"
        began = time.monotonic()
        times.append(float(server.time()))
        made = pair(lab, 1)["checkpoints"].get("divergence", 0) - before
        print(
            f"answer {len(times)} after {time.monotonic() - began:.1f} s, divergence {made}, the count is {counter.value}"
        )
    assert times == sorted(times)
    print(
        f"{pair(lab, 1)['checkpoints']}; the longest that one of {counter.value} answers took: {counter.longest_s:.1f} s"
    )
    counter.goes_on(1)
