"""A client that asks what the two replicas answer differently, and notes each answer that it should not have got."""

from __future__ import annotations

import threading
from contextlib import suppress

from coloebpf.control import Control, PairState, State
from coloebpf.errors import ColoError
from coloebpf.lab.plan import HOSTS, PAIR
from tests.lab.service_lab import PATIENCE_S, SOON, ServiceLab

KEY, PVM, SVM = "who", "the primary's word", "the replica's word"  # of one length, for nothing is copied
OPEN = (State.UNPROTECTED, State.SYNCING, State.PASSTHROUGH)  # a primary in these owes nobody a proof


class Probe(threading.Thread):
    """Each of its answers needs a checkpoint behind the question. `answers`: how many came; `wrong`: what was wrong."""

    def __init__(self, lab: ServiceLab, pause_s: float = 0.5) -> None:
        super().__init__(daemon=True)
        self.answers, self.wrong = 0, ""
        self._ended, self._pause_s = threading.Event(), pause_s
        lab.set_apart(KEY, PVM, SVM)
        self._connection = lab.connect(PATIENCE_S)
        self._control = {host: Control.open(lab.plan.pin_dir(host)) for host in HOSTS}
        self.start()

    def run(self) -> None:
        with suppress(OSError, ColoError):  # whether connections live, the counter tells
            while not self._ended.wait(self._pause_s):
                before = self._word("primary")
                answer = self._connection.ask("GET", KEY).decode()
                self.answers += 1
                wrong = self._judged(answer, before)
                if wrong:
                    self.wrong = wrong
                    return

    def _judged(self, answer: str, before: PairState) -> str:
        primary, secondary = self._word("primary"), self._word("secondary")
        if answer == SVM:
            return "" if secondary.state is State.PROMOTED else "the replica was heard, and is not promoted"
        if answer != PVM:
            return f"nobody says {answer!r}"
        # The epoch goes up when the PVM stands still; that copy has not been committed yet.
        committed = primary.epoch - (primary.state is State.CHECKPOINTING)
        if primary.state in OPEN or committed > before.epoch:
            return ""
        return f"unproven: asked in epoch {before.epoch}, answered in {primary.epoch} ({primary.state.name.lower()})"

    def _word(self, host: str) -> PairState:
        return self._control[host].state(PAIR)

    def check(self) -> None:
        assert not self.wrong, self.wrong

    def finish(self) -> None:
        self._ended.set()
        self._connection.interrupt()
        self.join(SOON)
        self._connection.close()
        for control in self._control.values():
            control.close()
