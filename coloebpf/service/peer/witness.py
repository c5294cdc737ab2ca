"""The right to speak while both hosts are well: the secondary lets the primary speak, for some hundred ms at a time.

An etcd lease lasts seconds, and a takeover has to be over in half of one. So as long as the hosts hear each other, the
arbiter is not asked at all. The primary's right is a lease that the secondary renews with each of its heartbeats, on
either path, and the arbiter decides once, when they have lost each other (arbiters/etcd.py).

The arithmetic. L is the lease's length (`lease_of`), times are the hosts' own CLOCK_MONOTONIC.

    primary    sends beat n at p                 gets the echo of n: deadline = p + L
    secondary           hears beat n at s                                        safe_at = s + L + L * DRIFT + IN_FLIGHT

p was before s, whatever the clocks show, and the primary's deadline counts from p: the echo may have been under way for
as long as it likes. So on the secondary's clock the primary is silent from s + L on, but for clocks of different speed
(DRIFT; NTP steers by 500 ppm at most, two clocks by 1,000) and for packets that a program let pass just before the
deadline and that are still in the bridge or the NIC (IN_FLIGHT). The secondary promotes itself no sooner than safe_at,
counted from the last beat that it has answered with a grant. When it asks the arbiter it stops granting first. A
service that has just started knows nothing of its predecessor's grants. It counts GRACE_MAX from its start, until the
primary says `settled`: its deadline is by a beat of this service's own (Leaves.granted).

The deadline is in the pair's map entry, and the programs compare it with the clock for each packet. A host that was
frozen finds it passed, no process of its has to run first. What this does not cover is a clock that stands still: a
host suspended to RAM, or a virtual machine whose hypervisor stops its clock with it (kvm-clock stands still during a
pause, the TSC does not). Such hosts need an arbiter that turns the other one off (arbiters/command.py).

Who goes first. The secondary asks the arbiter only L after it last heard the primary; the primary asks as soon as it
misses the secondary, which is earlier. So when only the links between two healthy hosts are cut, the primary wins. A
primary that hears the secondary and yet has lost its leave (it is not heard, or the secondary has asked) asks, too.

A service that is gone for longer than L without a word is therefore as good as a host that is gone: the secondary takes
over. One that ends on purpose asks for patience first (farewell.py): the grants of both sides, given once more, for as
long as a restart may take. The arithmetic is the same with that time in L's place.

What the two sides of a pair have to keep to:
- The secondary grants from SYNCING on; the primary is in lock-step, and says so, only with a deadline in its map.
- Nobody goes back from having asked: the answer is waited for, also if the other host comes back meanwhile.
- A shorter heartbeat timeout is given to the primary's service first: it never counts with more than its own.
"""

from __future__ import annotations

from collections import deque

NS_PER_MS = 1_000_000
GRACE_MAX_MS = 10_000  # a planned restart may take so long at most
DRIFT = 500  # one part in so many: 2,000 ppm between two clocks, twice what NTP's steering can make of them
IN_FLIGHT_NS = 20 * NS_PER_MS  # from a program's look at the clock to the packet on the wire
HALF_OF_U32 = 1 << 31


def lease_of(timeout_ns: int) -> int:
    """L for a heartbeat timeout: half as much again, so that the primary can ask the arbiter before it falls silent."""
    return timeout_ns * 3 // 2


def newer(number: int, than: int) -> bool:
    """`number` was sent after `than`; both have 32 bits and begin again at 0."""
    return 0 < (number - than) & 0xFFFFFFFF < HALF_OF_U32


class Granter:
    """The secondary's half: what it has promised, and until when it must therefore be silent. One for all pairs."""

    def __init__(self, lease_ns: int, started_ns: int) -> None:
        self.lease_ns = lease_ns
        self._pairs: set[int] = set()
        self._before_ns = _silent(started_ns, max(lease_ns, GRACE_MAX_MS * NS_PER_MS))  # by what a predecessor granted
        self._safe_ns: dict[int, int] = {}  # pair -> by its own grants with beats
        self._grace_ns: dict[int, int] = {}  # pair -> by all others

    @property
    def pairs(self) -> frozenset[int]:
        """That are granted."""
        return frozenset(self._pairs)

    def set_granting(self, pair: int, on: bool) -> None:
        if on:
            self._pairs.add(pair)
        else:
            self._pairs.discard(pair)

    def promise(self, pair: int, heard_ns: int) -> None:
        """A grant goes out, as the answer to a beat that was heard at `heard_ns`. Call it before sending."""
        self._safe_ns[pair] = max(_silent(heard_ns, self.lease_ns), self._safe_ns.get(pair, 0))

    def promise_grace(self, pair: int, heard_ns: int, length_ns: int) -> None:
        """For a planned restart; heard of at `heard_ns`. Call it before sending."""
        self._grace_ns[pair] = max(_silent(heard_ns, length_ns), self._grace_ns.get(pair, self._before_ns))

    def settle(self, pair: int) -> None:
        """The primary speaks by grants with this service's beats alone."""
        self._grace_ns[pair] = 0

    def safe_at_ns(self, pair: int) -> int:
        """From then on the other host can't be speaking for `pair` by any grant of ours."""
        return max(self._safe_ns.get(pair, 0), self._grace_ns.get(pair, self._before_ns))


def _silent(heard_ns: int, length_ns: int) -> int:
    """When the primary is, by a grant of this length as the answer to what was heard at `heard_ns`."""
    return heard_ns + length_ns + length_ns // DRIFT + IN_FLIGHT_NS


class Speaker:
    """The primary's half: when it sent which beat, so that an echo becomes a deadline."""

    def __init__(self, lease_ns: int) -> None:
        self.lease_ns = lease_ns
        self._sent: deque[tuple[int, int]] = deque()  # (number, sent at), oldest first

    def sending(self, number: int, now_ns: int) -> None:
        """Call it before sending."""
        self._sent.append((number, now_ns))
        while self._sent[0][1] + self.lease_ns < now_ns:  # its echo could only tell of a deadline that has passed
            self._sent.popleft()

    def sent_at_ns(self, number: int) -> int | None:
        """None: not of this service, or so long ago that it doesn't matter."""
        return next((at for sent, at in self._sent if sent == number), None)

    def deadline_ns(self, number: int) -> int | None:
        """The end of the right to speak that the echo of beat `number`, with a grant, stands for."""
        at = self.sent_at_ns(number)
        return None if at is None else at + self.lease_ns
