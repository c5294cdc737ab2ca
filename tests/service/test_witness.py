"""The primary's leave to speak: whatever is lost, late or frozen, it has ended before the secondary may promote itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloebpf.model import FwdBeat, Role
from coloebpf.service.farewell import Farewell
from coloebpf.service.heartbeat import Heartbeat, Reports
from coloebpf.service.paths import Watch
from coloebpf.service.peer.messages import Beat, Hello, Message, Patience, Restarting, Settled
from coloebpf.service.peer.witness import DRIFT, GRACE_MAX_MS, IN_FLIGHT_NS, Granter, Speaker, lease_of, newer

MS = 1_000_000
INTERVAL, TIMEOUT = 50 * MS, 200 * MS
LEASE = lease_of(TIMEOUT)
PAIR = 5
GRACE_MS = 1000


def test_the_lease_leaves_time_to_ask() -> None:
    assert lease_of(200 * MS) == 300 * MS


@pytest.mark.parametrize(
    ("number", "than", "is_newer"),
    [(2, 1, True), (1, 1, False), (1, 2, False), (1, 0xFFFFFFFF, True), (0xFFFFFFFF, 1, False), (0x80000001, 1, False)],
)
def test_numbers_begin_again(number: int, than: int, is_newer: bool) -> None:
    assert newer(number, than) is is_newer


def test_the_deadline_counts_from_the_sending() -> None:
    speaker = Speaker(LEASE)
    speaker.sending(7, 1000)
    speaker.sending(8, 2000)
    assert speaker.deadline_ns(7) == 1000 + LEASE
    assert speaker.deadline_ns(9) is None
    speaker.sending(9, 2000 + LEASE)  # 7 can't renew anything any more, 8 just can
    assert speaker.deadline_ns(7) is None
    assert speaker.deadline_ns(8) == 2000 + LEASE


def test_the_secondary_waits_for_what_it_or_its_predecessor_has_granted() -> None:
    granter = Granter(LEASE, started_ns=50)
    after, longest = LEASE + LEASE // DRIFT + IN_FLIGHT_NS, GRACE_MAX_MS * MS
    unknown = 50 + longest + longest // DRIFT + IN_FLIGHT_NS  # its predecessor may have given as much
    assert granter.safe_at_ns(PAIR) == unknown
    granter.promise(PAIR, 1000)
    assert granter.safe_at_ns(PAIR) == unknown
    granter.settle(PAIR)
    assert granter.safe_at_ns(PAIR) == 1000 + after
    granter.promise(PAIR, 900)  # heard on the other path before
    assert granter.safe_at_ns(PAIR) == 1000 + after
    granter.promise_grace(PAIR, 2000, 2 * LEASE)
    assert granter.safe_at_ns(PAIR) == 2000 + 2 * LEASE + 2 * LEASE // DRIFT + IN_FLIGHT_NS


@dataclass
class Host:
    """One side with a clock of its own: an offset, and a speed in millionths."""

    role: Role
    world: World
    offset: int
    ppm: int
    session: bytes = b""
    lost: list[int] = field(default_factory=list)
    deadline: int = 0
    due: int = 0
    noted: FwdBeat | None = None
    beat: Heartbeat = field(init=False)
    farewell: Farewell = field(init=False)

    def __post_init__(self) -> None:
        self.start(1)

    def start(self, instance: int) -> None:
        """The service begins, with nothing in its memory; the map with the deadline stays."""
        self.session = bytes([self.role, instance]).ljust(16, b"\0")
        self.lost = []
        self.beat = Heartbeat(
            session=self.session,
            interval_ns=INTERVAL,
            timeout_ns=TIMEOUT,
            lease_ns=LEASE,
            clock=self.clock,
            send=lambda beat: self.world.send(self, beat),
            fwd_beats=lambda: {} if self.noted is None else {PAIR: self.noted},
            reports=Reports(self.lost.append, lambda pair: None, self._lease, lambda cookie: None),
        )
        self.beat.watch([Watch(PAIR, self.role, {PAIR: ("none", 0)}, leased=True)])
        self.beat._senders[PAIR] = self  # type: ignore[assignment]
        self.farewell = Farewell(self.beat, lambda message: self.world.send(self, message), GRACE_MS, self.clock)
        if self.role is Role.SECONDARY:
            self.beat.set_granting(PAIR, True)

    def clock(self) -> int:
        return self.offset + self.world.now + self.world.now * self.ppm // 1_000_000

    def _lease(self, pair: int, deadline: int) -> None:
        assert pair == PAIR
        self.deadline = deadline

    def send(self, cookie: bytes, number: int, echo: int) -> bool:
        self.world.frame(self, cookie, number << 32 | echo)
        return True

    def close(self) -> None: ...

    @property
    def speaks(self) -> bool:
        """What the primary's programs would say to a packet now."""
        return self.clock() <= self.deadline

    @property
    def may_promote(self) -> bool:
        """What the secondary does with the arbiter's yes: it has been told to ask, and has waited."""
        return bool(self.lost) and self.clock() >= self.beat.granter.safe_at_ns(PAIR)


class World:
    """Two hosts, and messages that take their time."""

    def __init__(self, offset: int = 0, ppm: int = 0) -> None:
        self.now = 0
        self.mgmt_delay: int | None = MS  # None: cut
        self.fwd_delay: int | None = MS
        self.deaf: set[Role] = set()  # nothing arrives there
        self.frozen: set[Role] = set()
        self.link = 0  # number of the link's session; 0: none
        self.sessions = 0
        self.flying: list[tuple[int, Role, object, int]] = []
        self.primary = Host(Role.PRIMARY, self, offset, ppm)
        self.secondary = Host(Role.SECONDARY, self, 0, 0, due=17 * MS)  # they tick at different phases
        self.greet()

    def hosts(self) -> tuple[Host, Host]:
        return self.primary, self.secondary

    def other(self, host: Host) -> Host:
        return self.secondary if host is self.primary else self.primary

    def greet(self) -> None:
        """The link comes up."""
        self.sessions += 1
        self.link = self.sessions
        for host in self.hosts():
            host.beat.peer_up(Hello("x", self.other(host).session.hex(), 1, LEASE, ()))

    def send(self, host: Host, message: Message) -> bool:
        if self.mgmt_delay is not None and self.link:
            self.flying.append((self.now + self.mgmt_delay, self.other(host).role, message, self.link))
        return bool(self.link)

    def restart(self, role: Role, instance: int) -> None:
        """A service ends and the next one starts, there is no link for now."""
        self.link = 0
        self.frozen.discard(role)
        next(host for host in self.hosts() if host.role is role).start(instance)

    def leave(self, role: Role) -> None:
        """A service says goodbye and ends."""
        next(host for host in self.hosts() if host.role is role).farewell.ask()
        self.step(10)
        self.frozen.add(role)
        self.link = 0

    def frame(self, host: Host, cookie: bytes, counter: int) -> None:
        if self.fwd_delay is not None:
            self.flying.append((self.now + self.fwd_delay, self.other(host).role, (cookie, counter), 0))

    def step(self, ms: int) -> None:
        """Time goes on by 1 ms each. Checks the promise all the time."""
        for _ in range(ms):
            self.now += MS
            for item in [item for item in self.flying if item[0] <= self.now]:
                self.arrive(item)
            for host in self.hosts():
                if self.now >= host.due and host.role not in self.frozen:
                    host.due = self.now + INTERVAL
                    host.beat.tick()
            assert not (self.primary.speaks and self.secondary.may_promote), "two may speak"

    def arrive(self, item: tuple[int, Role, object, int]) -> None:
        _, role, what, link = item
        host = next(h for h in self.hosts() if h.role is role)
        if role in self.deaf or (link and link != self.link):  # what a session has not delivered is lost with it
            self.flying.remove(item)
        elif isinstance(what, tuple):  # the kernel notes it, frozen service or not
            self.flying.remove(item)
            host.noted = FwdBeat(host.clock(), what[0], what[1], 0)
        elif role not in self.frozen:
            self.flying.remove(item)
            if isinstance(what, Beat):
                host.beat.received(what)
            else:
                assert isinstance(what, Restarting | Patience | Settled)
                host.farewell.received(what)


def test_in_lock_step_the_primary_always_has_leave() -> None:
    world = World()
    world.step(200)
    for _ in range(1000):
        world.step(1)
        assert world.primary.speaks
    assert not world.primary.lost
    assert not world.secondary.lost


@pytest.mark.parametrize("cut", ["mgmt_delay", "fwd_delay"])
def test_either_path_alone_is_enough(cut: str) -> None:
    world = World()
    world.step(300)
    setattr(world, cut, None)
    for _ in range(1000):
        world.step(1)
        assert world.primary.speaks
    assert not world.primary.lost
    assert not world.secondary.lost


def test_a_dead_primary_is_followed_within_a_lease_and_the_margins() -> None:
    world = World()
    world.step(500)
    died = world.now
    world.frozen.add(Role.PRIMARY)
    while not world.secondary.may_promote:
        world.step(1)
    assert world.now - died <= LEASE + LEASE // DRIFT + IN_FLIGHT_NS + 5 * MS
    assert world.secondary.clock() >= world.primary.deadline + LEASE // DRIFT + IN_FLIGHT_NS


def test_when_the_links_are_cut_the_primary_asks_first_and_while_it_may_still_speak() -> None:
    world = World()
    world.step(500)
    world.mgmt_delay = world.fwd_delay = None
    while not world.primary.lost:
        world.step(1)
        assert not world.secondary.lost
    assert world.primary.speaks
    while not world.secondary.lost:
        world.step(1)
    assert not world.secondary.beat.granter.pairs


def test_a_primary_that_is_not_heard_asks_when_its_leave_has_ended() -> None:
    """It hears the other side all the time; without this it would be silent for ever, and nobody would know."""
    world = World()
    world.step(500)
    world.deaf.add(Role.SECONDARY)
    while world.primary.speaks:
        world.step(1)
        assert not world.primary.lost
    world.step(2 * INTERVAL // MS)
    assert world.primary.lost == [PAIR]
    assert world.primary.beat.paths.mgmt


def test_a_frozen_primary_wakes_up_without_leave_and_old_beats_give_it_none() -> None:
    world = World()
    world.step(500)
    world.frozen.add(Role.PRIMARY)
    world.step(5000)
    assert world.secondary.may_promote
    assert not world.primary.speaks
    world.frozen.clear()  # what had come in the meantime is delivered now
    for _ in range(1000):
        world.step(1)
        assert not world.primary.speaks


def test_the_echo_of_a_predecessors_beat_gives_no_leave() -> None:
    world = World()
    world.step(500)
    world.mgmt_delay = None  # the secondary does not hear that it is another service now
    world.primary.start(2)
    world.primary.beat.peer_up(Hello("x", world.secondary.session.hex(), 1, LEASE, ()))
    world.primary.beat._number = world.secondary.beat._heard - 20  # it would come to the number that is echoed
    before = world.primary.deadline
    world.step(2000)
    assert world.primary.deadline == before


def test_a_primary_whose_service_restarts_speaks_all_the_time_and_the_secondary_does_not_ask() -> None:
    world = World()
    world.step(500)
    world.leave(Role.PRIMARY)
    for _ in range(GRACE_MS - 50):
        world.step(1)
        assert world.primary.speaks
    world.restart(Role.PRIMARY, 2)
    world.greet()
    for _ in range(2000):
        world.step(1)
        assert world.primary.speaks
    assert not world.secondary.lost
    died = world.now  # the grace of before does not make a takeover later
    world.frozen.add(Role.PRIMARY)
    while not world.secondary.may_promote:
        world.step(1)
    assert world.now - died <= LEASE + LEASE // DRIFT + IN_FLIGHT_NS + 5 * MS


def test_a_primary_whose_service_does_not_come_back_is_followed_when_the_grace_is_over() -> None:
    world = World()
    world.step(500)
    world.leave(Role.PRIMARY)
    left = world.now
    while not world.secondary.may_promote:
        world.step(1)
    grace = GRACE_MS * MS
    assert grace - 10 * MS <= world.now - left <= grace + grace // DRIFT + IN_FLIGHT_NS + INTERVAL


@pytest.mark.parametrize("role", [Role.PRIMARY, Role.SECONDARY])
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_goodbye_at_any_moment_of_a_session_is_counted_by_who_grants(role: Role, comes_back: bool) -> None:
    """Also before the first `settled`, or while it is under way. step() looks whether two may speak."""
    for start in range(2 * INTERVAL // MS):
        world = World()
        world.step(start)
        next(host for host in world.hosts() if host.role is role).farewell.ask()
        world.step(5)
        if comes_back:  # the grace is over for who waited, but not what it granted
            world.restart(role, 2)
            world.greet()
        world.mgmt_delay = world.fwd_delay = None
        world.step(GRACE_MS)


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_secondary_whose_service_restarts_leaves_the_primary_its_right(comes_back: bool) -> None:
    world = World()
    world.step(500)
    world.leave(Role.SECONDARY)
    for _ in range(GRACE_MS // 2):
        world.step(1)
        assert world.primary.speaks
    assert not world.primary.lost
    if comes_back:
        world.restart(Role.SECONDARY, 2)
        world.greet()
        for _ in range(2000):
            world.step(1)
            assert world.primary.speaks
        assert not world.primary.lost
        assert world.secondary.beat.granter.safe_at_ns(PAIR) < world.secondary.clock() + 2 * LEASE
    else:
        while not world.primary.lost:
            world.step(1)
            assert world.primary.speaks  # so that it can ask the arbiter before it has to be silent


steps = st.one_of(
    st.tuples(st.just("wait"), st.integers(1, 400)),
    st.tuples(st.just("mgmt"), st.sampled_from([None, MS, 30 * MS, 250 * MS])),
    st.tuples(st.just("fwd"), st.sampled_from([None, MS])),
    st.tuples(st.just("freeze"), st.sampled_from([Role.PRIMARY, Role.SECONDARY])),
    st.tuples(st.just("deaf"), st.sampled_from([Role.PRIMARY, Role.SECONDARY])),
    st.tuples(st.just("hearing"), st.just(0)),
    st.tuples(st.just("thaw"), st.just(0)),
    st.tuples(st.just("restart"), st.sampled_from([Role.PRIMARY, Role.SECONDARY])),
    st.tuples(st.just("leave"), st.sampled_from([Role.PRIMARY, Role.SECONDARY])),
    st.tuples(st.just("greet"), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**15), st.integers(-1000, 1000), st.lists(steps, max_size=12))
def test_never_two(offset: int, ppm: int, plan: list[tuple[str, int | None]]) -> None:
    """Any sequence of cuts, delays, freezes and restarts; step() checks at each millisecond."""
    world = World(offset, ppm)
    world.step(150)
    for instance, (what, how) in enumerate(plan, start=2):
        if what == "wait":
            world.step(how or 0)
        elif what == "mgmt":
            world.mgmt_delay = how
        elif what == "fwd":
            world.fwd_delay = how
        elif what == "freeze":
            world.frozen.add(Role(how or 0))
        elif what == "deaf":
            world.deaf.add(Role(how or 0))
        elif what == "hearing":
            world.deaf.clear()
        elif what == "thaw":
            world.frozen.clear()
        elif what == "restart":
            world.restart(Role(how or 0), instance)
        elif what == "leave":
            world.leave(Role(how or 0))
        elif world.mgmt_delay is not None and not world.frozen and not world.deaf:
            world.greet()
        world.step(1)
    world.step(700)
