"""Does the other host live? Heartbeats on two paths: the services' link, and frames on each forward device.

One path lost: a warning, metrics, nothing else. Both lost for a pair: its owner is told, and asks the arbiter. A
host whose own service stood still for longer than the timeout knows nothing: it listens for a whole timeout first.

A beat also answers the other side's beats, and on the secondary carries the primary's right to speak (peer/witness.py).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from coloebpf.model import FwdBeat, Role
from coloebpf.service.beat_frames import FwdSender
from coloebpf.service.log import say
from coloebpf.service.paths import NEVER_NS, Paths, Watch, verdict
from coloebpf.service.peer.leaves import Leaves
from coloebpf.service.peer.messages import Beat, Hello, Settled
from coloebpf.service.peer.witness import NS_PER_MS, Granter, Speaker, newer
from coloebpf.service.status import PathStatus

log = logging.getLogger(__name__)

NS_PER_S = 1_000_000_000


@dataclass(frozen=True)
class Reports:
    """Who is told what; all of them run on the event loop and must not block.

    `lost(pair)`: neither path brings anything, ask the arbiter now. On a secondary its grants have stopped before. On a
    primary also when beats come, but its leave to speak has ended: the other side does not hear it, or has asked.
    `back(pair)`: that is over. `lease(pair, deadline_ns)`: the primary may speak until then.
    `expect(cookie)`: the session of the peer whose frames on fwd count from now on.
    """

    lost: Callable[[int], None]
    back: Callable[[int], None]
    lease: Callable[[int, int], None]
    expect: Callable[[bytes], None]


class Heartbeat:
    """Both directions of both paths, for all pairs of this host.

    `session`: this service's cookie. `send`: the link's. `fwd_beats`: what the programs have noted, by NIC. Without a
    hello of the peer nobody is judged for `grace_ns` from the start.
    """

    def __init__(
        self,
        *,
        session: bytes,
        interval_ns: int,
        timeout_ns: int,
        lease_ns: int,
        clock: Callable[[], int],
        send: Callable[[Beat | Settled], bool],
        fwd_beats: Callable[[], Mapping[int, FwdBeat]],
        reports: Reports,
        grace_ns: int = 0,
    ) -> None:
        now = clock()
        self.interval_ns, self.timeout_ns = interval_ns, timeout_ns
        self.granter, self.speaker = Granter(lease_ns, now), Speaker(lease_ns)
        self.paths = Paths(False)
        self.rtt_ns: int | None = None
        self.mgmt_beats = 0
        self.fwd_counts: dict[int, int] = {}  # NIC -> beats seen; two between two looks count as one
        self.stalls = 0
        self.last_mgmt_ns = NEVER_NS
        self.last_fwd_ns: dict[int, int] = {}  # NIC -> when
        self._session, self._clock, self._send, self._fwd_beats = session, clock, send, fwd_beats
        self._reports = reports
        self._watches: dict[int, Watch] = {}
        self._senders: dict[int, FwdSender] = {}
        self._lost: set[int] = set()
        # A random start: the echo of a beat of this service's predecessor is not taken for one of its own.
        self._number = secrets.randbelow(1 << 31) + 1
        self._peer_cookie = b""
        self._heard = 0  # the peer's newest beat, on any path; 0: none of this session
        self._heard_ns = NEVER_NS
        self._tick_ns = now
        # A service that has just started knows no cookie before the peer's hello, which may take its time.
        self._judge_from_ns = now + timeout_ns + grace_ns
        self._grace = bool(grace_ns)
        self._passed_over = False
        self._fwd_numbers: dict[int, int] = {}  # NIC -> the newest of the peer's present session
        self.leaves = Leaves(self.speaker, reports.lease, send)
        self.bear_until_ns = 0  # a planned restart of the peer's service is to be over by then: farewell.py

    # ---- for the owner ---------------------------------------------------------------------------------------------

    def watch(self, watches: Iterable[Watch]) -> None:
        """From here on just these pairs. Those that are new are not judged before a whole timeout has passed."""
        before, self._watches = self._watches, {watch.pair: watch for watch in watches}
        wanted = {nic: fwd for watch in self._watches.values() for nic, fwd in watch.fwds.items()}
        for nic, sender in list(self._senders.items()):
            if wanted.get(nic) != (sender.device, sender.vlan):
                self._senders.pop(nic).close()
        for nic, (device, vlan) in wanted.items():
            if nic not in self._senders:
                self._senders[nic] = FwdSender(device, vlan)
        for pair in before.keys() - self._watches.keys():
            self._lost.discard(pair)
            self.set_granting(pair, False)
        leased = [w.pair for w in self._watches.values() if w.leased and w.role is Role.PRIMARY]
        self.leaves.need(leased, before)
        if self._watches.keys() - before.keys():
            self._judge_from_ns = max(self._judge_from_ns, self._clock() + self.timeout_ns)

    def set_granting(self, pair: int, on: bool) -> None:
        """On a secondary: the primary may speak because of our beats. Ends by itself when `lost` is reported."""
        self.granter.set_granting(pair, on)

    def is_lost(self, pair: int) -> bool:
        """That was told, and is still so."""
        watch, now, deadline = self._watches.get(pair), self._clock(), self.leaves.deadline_ns(pair)
        if watch is None or pair not in self._lost:
            return False
        last_ns = max(self.last_mgmt_ns, self._last_fwd(watch))
        return last_ns <= now - self.timeout_ns or (deadline is not None and deadline < now)

    def status(self) -> list[PathStatus]:
        """The management path, and each forward device."""
        now, noted = self._clock(), self._fwd_beats()
        found = {"management": PathStatus(name="management", beats=self.mgmt_beats)}
        last = {"management": self.last_mgmt_ns}
        for nic, sender in self._senders.items():  # several NICs may share a device
            path = found.setdefault(sender.device, PathStatus(name=sender.device))
            path.beats += self.fwd_counts.get(nic, 0)
            path.strangers += noted[nic].strangers if nic in noted else 0
            last[sender.device] = max(last.get(sender.device, NEVER_NS), self.last_fwd_ns.get(nic, NEVER_NS))
        for name, path in found.items():
            path.alive = last[name] > now - self.timeout_ns
            path.seen_ago_ms = (now - last[name]) / NS_PER_MS if last[name] != NEVER_NS else None
        return list(found.values())

    async def wait_safe(self, pair: int) -> None:
        """On a secondary, with grants stopped: returns when the primary can't be speaking any more."""
        while (left := self.granter.safe_at_ns(pair) - self._clock()) > 0:
            await asyncio.sleep(left / NS_PER_S)

    def peer_up(self, hello: Hello) -> None:
        """The link has a session. A hello is a sign of life, too: who protects now need not wait for a beat."""
        self.last_mgmt_ns = self._clock()
        if self._grace:
            self._grace, self._judge_from_ns = False, self._clock() + self.timeout_ns
        cookie = bytes.fromhex(hello.session)
        if cookie != self._peer_cookie:  # a new service: it numbers its beats anew
            self._peer_cookie, self._heard, self._heard_ns = cookie, 0, NEVER_NS
            self._fwd_numbers.clear()
            self._reports.expect(cookie)
            self.leaves.begin_session()
            self.bear_until_ns = 0
            self._judge_from_ns = max(self._judge_from_ns, self._clock() + self.timeout_ns)
        for pair in sorted(self._lost):
            if not self.is_lost(pair):
                self._lost.discard(pair)
                self._reports.back(pair)
        # Each side counts with the shorter of the two leases where it speaks, and with its own where it is silent.
        self.speaker.lease_ns = min(self.granter.lease_ns, hello.lease_ns)

    def received(self, beat: Beat) -> None:
        """A beat on the link."""
        now = self._clock()
        self.mgmt_beats += 1
        self.last_mgmt_ns = now
        self._hear(beat.number, now)
        sent = self.speaker.sent_at_ns(beat.echo)
        if sent is not None:
            self.rtt_ns = max(0, now - sent - beat.echo_age_ns)
        for pair in beat.granted:
            self.leaves.granted(pair, beat.echo)

    @property
    def bears_for_ns(self) -> int:
        """How much longer the peer's silence means nothing, because it restarts; 0: it does mean something."""
        return max(0, self.bear_until_ns - self._clock())

    @property
    def granted(self) -> tuple[int, ...]:
        """The pairs that the peer may speak for."""
        return tuple(sorted(self.granter.pairs & self._watches.keys()))

    def promises(self) -> tuple[int, tuple[int, ...]]:
        """The peer's newest beat (0: none of late), and the pairs that it may speak for by an answer to it."""
        if not self._heard or self._clock() - self._heard_ns >= self.granter.lease_ns:
            return 0, ()
        return self._heard, self.granted

    async def run(self) -> None:
        """Beats, until it is cancelled. What it raises is the end of the service: nobody would be heard any more."""
        try:
            while True:
                self.tick()
                behind = self._clock() - self._tick_ns
                await asyncio.sleep(max(0, self.interval_ns - behind) / NS_PER_S)
        finally:
            for sender in self._senders.values():
                sender.close()
            self._senders.clear()

    # ---- one beat --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Looks, judges, sends. `run` calls it each interval."""
        now = self._clock()
        late = now - self._tick_ns
        self._tick_ns = now
        self._look()
        if late > self.timeout_ns:
            self.stalls += 1
            self._judge_from_ns = now + self.timeout_ns
            say(log, logging.WARNING, "this service stood still, so it judges nobody for a while", ms=late // 1_000_000)
        # After a shorter pause what has come meanwhile may still be in the link's socket: judge at the next tick.
        self._passed_over = late > 2 * self.interval_ns and not self._passed_over
        if now >= self._judge_from_ns and not self._passed_over:
            self._judge(now)
        self._beat(now)

    def _look(self) -> None:
        """Takes over what the programs have noted. A counter that stands still, or a foreign cookie, is no beat."""
        nics = {nic: watch for watch in self._watches.values() for nic in watch.fwds}
        noted = self._fwd_beats()
        now = self._clock()  # behind the reading: nothing in it was sent later
        for nic, beat in noted.items():
            watch = nics.get(nic)
            if watch is None or not self._peer_cookie or beat.cookie != self._peer_cookie:
                continue
            known = self._fwd_numbers.get(nic)
            if known is not None and not newer(beat.number, known):
                continue
            self._fwd_numbers[nic] = beat.number
            self.last_fwd_ns[nic] = beat.last_ns
            self.fwd_counts[nic] = self.fwd_counts.get(nic, 0) + 1
            # Heard now, not at last_ns: that may be of the beat before, if the program was writing while we read.
            self._hear(beat.number, now)
            if beat.echo:
                self.leaves.granted(watch.pair, beat.echo)

    def _hear(self, number: int, at_ns: int) -> None:
        if not self._heard or newer(number, self._heard):
            self._heard, self._heard_ns = number, at_ns

    def _judge(self, now: int) -> None:
        last_fwd = {pair: self._last_fwd(watch) for pair, watch in self._watches.items()}
        paths, before = verdict(now, self.last_mgmt_ns, last_fwd, self.timeout_ns), self.paths
        self.paths = paths
        if self._watches:
            self._warn("management", before.mgmt, paths.mgmt, None)
        for pair, alive in paths.fwd.items():
            self._warn("forward", before.fwd.get(pair, False), alive, pair)
        for pair, watch in self._watches.items():
            deadline = self.leaves.deadline_ns(pair)
            silenced = deadline is not None and deadline < now
            if pair not in paths.lost and not silenced:
                if pair in self._lost:
                    self._lost.discard(pair)
                    self._reports.back(pair)
            elif pair not in self._lost and (
                silenced or now >= self._patience_ends(watch, max(self.last_mgmt_ns, last_fwd[pair]))
            ):
                self._lost.add(pair)
                self.granter.set_granting(pair, False)
                why = (
                    "the peer is lost on both paths" if pair in paths.lost else "the peer has ended our leave to speak"
                )
                say(log, logging.ERROR, why, pair=pair, role=watch.role.name.lower())
                self._reports.lost(pair)

    def _patience_ends(self, watch: Watch, last_ns: int) -> int:
        """When the arbiter is asked: a primary at once, a secondary later, so that a living primary is first."""
        if watch.role is Role.PRIMARY:  # before its right to speak ends
            early = self.granter.lease_ns - self.timeout_ns
            return max(last_ns + self.timeout_ns, self.bear_until_ns - early)
        return max(last_ns + self.granter.lease_ns, self.bear_until_ns)

    def _last_fwd(self, watch: Watch) -> int:
        return max((self.last_fwd_ns.get(nic, NEVER_NS) for nic in watch.fwds), default=NEVER_NS)

    def _warn(self, path: str, before: bool, now: bool, pair: int | None) -> None:
        if before and not now:
            say(log, logging.WARNING, "a path to the peer is lost", path=path, pair=pair)
        elif now and not before:
            say(log, logging.INFO, "a path to the peer is alive", path=path, pair=pair)

    def _beat(self, now: int) -> None:
        self._number = self._number % 0xFFFFFFFF + 1  # never 0, which stands for none
        self.speaker.sending(self._number, now)
        age = max(0, now - self._heard_ns)  # heard since the tick began, perhaps
        # An answer that comes too late to renew anything is none: the peer's service may be another one by now.
        echo = self._heard if self._heard and age < self.granter.lease_ns else 0
        granted = self.granted if echo else ()
        for pair in granted:
            self.granter.promise(pair, self._heard_ns)
        self._send(Beat(self._number, echo, age if echo else 0, granted))
        for pair, watch in self._watches.items():
            for nic in watch.fwds:
                self._senders[nic].send(self._session, self._number, echo if pair in granted else 0)
