"""What was turned away: counted by kind, logged without letting strangers fill the log."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Callable

from coloebpf.service.log import say
from coloebpf.service.status import REFUSALS

QUIET_NS = 60_000_000_000  # between two lines of one kind


class Refusals:
    """`counts` has every kind of REFUSALS from the start, so that a metric exists before it is needed."""

    def __init__(self, log: logging.Logger, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.counts = dict.fromkeys(REFUSALS, 0)
        self._log, self._clock = log, clock
        self._silent_until: dict[str, int] = {}
        self._unsaid = dict.fromkeys(REFUSALS, 0)

    def note(self, kind: str, source: str, detail: str) -> None:
        """One more of `kind`, from address `source`."""
        self.counts[kind] += 1
        now = self._clock()
        if now < self._silent_until.get(kind, 0):
            self._unsaid[kind] += 1
            return
        self._silent_until[kind] = now + QUIET_NS
        unsaid, self._unsaid[kind] = self._unsaid[kind], 0
        more = unsaid or None
        say(self._log, logging.WARNING, "refused", kind=kind, source=source, detail=detail, unsaid_before=more)


def kind_of(error: ssl.SSLError) -> str:
    """What a failed handshake counts as. An alert is the other side's word, and what it says is that ours won't do."""
    reason = error.reason or ""
    if reason in ("UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION"):
        return "version"
    about_certificates = "CERTIFICATE" in reason or "ALERT" in reason or isinstance(error, ssl.SSLCertVerificationError)
    return "certificate" if about_certificates else "malformed"
