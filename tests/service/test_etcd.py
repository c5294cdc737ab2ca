"""The arbiter in etcd, against real ones: frozen, killed, restarted, cut off, without their data; alone and as three."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from coloebpf.errors import ArbiterError
from coloebpf.model import Role
from coloebpf.netns import inside
from coloebpf.service.arbiters.base import Grant, Refusal
from coloebpf.service.arbiters.etcd import HEDGE_S, EtcdArbiter
from coloebpf.service.config import EtcdConfig
from coloebpf.service.peer.witness import DRIFT, IN_FLIGHT_NS
from tests.service import etcds
from tests.service.etcds import Member

NS = 1_000_000_000
TTL = 2  # seconds: the least that etcd gives with its own election timeout
PATIENCE = 20.0  # seconds
HASTY_MS = 500  # a request's time where none is to be answered; elsewhere a busy machine would miss it
pytestmark = pytest.mark.real_time


@dataclass(frozen=True)
class Pair:
    name: str
    role: Role = Role.PRIMARY


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Member]]:
    """One etcd, in a network namespace whose packets tests can drop."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    name = f"coloebpf-etcd-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        with inside(name):
            started = etcds.cluster(tmp_path_factory.mktemp("etcd"), 1)
            try:
                yield started
            finally:
                etcds.end(started)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.fixture
def member(members: list[Member]) -> Iterator[Member]:
    """The one; whatever a test did to it is mended afterwards."""
    (one,) = members
    yield one
    one.mend()


@pytest.fixture
def three(tmp_path: Path) -> Iterator[list[Member]]:
    started = etcds.cluster(tmp_path, 3)
    try:
        yield started
    finally:
        for one in started:
            one.kill()


@pytest.fixture
def pair(request: pytest.FixtureRequest) -> Pair:
    """A pair that no other test has a record of."""
    return Pair(f"pair-{abs(hash(request.node.name)) % 10**9}")


def arbiter(
    host: str,
    *members: Member,
    clock: Callable[[], int] = time.monotonic_ns,
    timeout_ms: int = 5000,
    lease_s: int = TTL,
) -> EtcdArbiter:
    urls = tuple(one.url for one in members)
    return EtcdArbiter(EtcdConfig(endpoints=urls, lease_s=lease_s, request_timeout_ms=timeout_ms), host, clock)


def run(work: Awaitable[object]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(4 * PATIENCE):
            await work

    asyncio.run(bounded())


@contextmanager
def dropped(port: int, direction: str) -> Iterator[None]:
    """Packets to etcd ("dport") or from it ("sport") are lost. In the namespace that the test is in."""
    subprocess.run(["nft", "add", "table", "ip", "cut"], check=True)
    try:
        chain = "{ type filter hook input priority 0 ; }"
        subprocess.run(["nft", "add", "chain", "ip", "cut", "in", chain], check=True)
        subprocess.run(["nft", "add", "rule", "ip", "cut", "in", "tcp", direction, str(port), "drop"], check=True)
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "ip", "cut"], check=True)


async def value(a: EtcdArbiter, pair: Pair, what: str) -> str | None:
    return (await a._get(a._key(pair, what)))[0]


async def gone(a: EtcdArbiter, pair: Pair) -> None:
    """Waits until the lease of whoever is alone has ended."""
    async with asyncio.timeout(PATIENCE):
        while await value(a, pair, "speaker") is not None:
            await asyncio.sleep(0.05)


# ---- the decision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["a", "b"])
def test_one_gets_it_and_the_other_does_not_however_often_they_ask(
    members: list[Member], pair: Pair, first: str
) -> None:
    async def work() -> None:
        hosts = {name: arbiter(name, *members) for name in "ab"}
        winner, loser = hosts.pop(first), next(iter(hosts.values()))
        pair_of_first = Pair(f"{pair.name}{first}")
        await winner.begin(pair_of_first)
        for _ in range(3):
            assert isinstance(await winner.acquire(pair_of_first), Grant)
            assert await loser.acquire(pair_of_first) == Refusal(f"alone {first} by etcd's record")

    run(work())


def test_both_ask_at_once_for_many_pairs(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", *members), arbiter("b", *members)
        pairs = [Pair(f"{pair.name}-{number}") for number in range(20)]
        await asyncio.gather(*map(a.begin, pairs))
        answers = await asyncio.gather(*[host.acquire(one) for one in pairs for host in (a, b)])
        for mine, others in zip(answers[::2], answers[1::2], strict=True):
            assert {type(mine), type(others)} == {Grant, Refusal}

    run(work())


def test_without_a_record_of_lock_step_nobody_gets_it(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        answer = await arbiter("a", *members).acquire(pair)
        assert answer == Refusal("etcd has no record of this pair in lock-step")

    run(work())


def test_the_deadline_is_before_the_end_of_etcds_lease(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a = arbiter("a", *members)
        await a.begin(pair)
        asked = time.monotonic_ns()
        answer = await a.acquire(pair)
        answered = time.monotonic_ns()
        assert isinstance(answer, Grant)
        assert answer.deadline_ns is not None
        length = TTL * NS - TTL * NS // DRIFT - IN_FLIGHT_NS
        assert asked + length <= answer.deadline_ns <= answered + length
        await gone(a, pair)
        assert time.monotonic_ns() > answer.deadline_ns

    run(work())


def test_a_renewal_moves_it_and_the_lease(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a = arbiter("a", *members)
        await a.begin(pair)
        answer = await a.acquire(pair)
        end = time.monotonic_ns() + (TTL + 2) * NS
        while time.monotonic_ns() < end:
            await asyncio.sleep(0.4)
            renewed = await a.renew(pair)
            assert isinstance(renewed, Grant)
            assert isinstance(answer, Grant)
            assert (renewed.deadline_ns or 0) > (answer.deadline_ns or 0)
            answer = renewed
        assert await value(a, pair, "speaker") == "a"

    run(work())


def test_before_a_restart_the_right_is_made_to_last(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a = arbiter("a", *members)
        await a.begin(pair)
        await a.acquire(pair)
        asked = time.monotonic_ns()
        longer = await a.renew(pair, TTL + 8)
        assert isinstance(longer, Grant)
        assert (longer.deadline_ns or 0) > asked + (TTL + 7) * NS
        await asyncio.sleep(TTL + 1.5)
        assert await value(a, pair, "speaker") == "a"
        next_one = arbiter("a", *members)
        again = await next_one.acquire(pair)
        assert isinstance(again, Grant)
        assert (again.deadline_ns or 0) < time.monotonic_ns() + TTL * NS  # and is a short one from then on

    run(work())


def test_who_was_frozen_for_longer_than_its_lease_is_still_the_one(members: list[Member], pair: Pair) -> None:
    """The other one's copy is old: it must not take over, although the speaker's lease has ended."""

    async def work() -> None:
        a, b = arbiter("a", *members), arbiter("b", *members)
        await a.begin(pair)
        await a.acquire(pair)
        await gone(a, pair)
        assert await b.acquire(pair) == Refusal("alone a by etcd's record")
        assert isinstance(await a.renew(pair), Grant)
        assert await value(a, pair, "speaker") == "a"

    run(work())


def test_well_again_and_lost_again(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", *members), arbiter("b", *members)
        await a.begin(pair)
        await a.acquire(pair)
        await a.begin(pair)  # b has a new copy
        await a.begin(pair)
        assert await value(a, pair, "right") == "both"
        assert await value(a, pair, "speaker") is None
        assert isinstance(await b.acquire(pair), Grant)
        assert isinstance(await a.acquire(pair), Refusal)

    run(work())


def test_a_new_protection_waits_for_the_end_of_who_is_alone(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", *members), arbiter("b", *members)
        await a.begin(pair)
        await b.acquire(pair)
        with pytest.raises(ArbiterError, match="alone b by etcd's record, and that host has not ended"):
            await a.begin(pair)
        await gone(a, pair)
        await a.begin(pair)
        renewed = await b.renew(pair)  # b was frozen all the time
        assert renewed == Refusal("both by etcd's record")

    run(work())


def test_the_end_of_a_protection(members: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", *members), arbiter("b", *members)
        await a.begin(pair)
        assert await a.release(pair) == Grant()
        assert isinstance(await b.acquire(pair), Refusal)  # whatever it still believes
        await a.begin(pair)
        await b.acquire(pair)
        assert await a.release(pair) == Refusal("alone b by etcd's record")
        assert await b.release(pair) == Grant()
        assert await b.release(pair) == Grant()
        assert await value(b, pair, "right") is None
        assert await value(b, pair, "speaker") is None
        await a.begin(pair)
        await b.acquire(pair)
        await gone(a, pair)
        assert await a.release(pair) == Grant()

    run(work())


# ---- an etcd in trouble ----------------------------------------------------------------------------------------------


def test_a_frozen_etcd_gives_no_answer_in_time_and_then_the_same_one(member: Member, pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", member), arbiter("b", member)
        await a.begin(pair)
        first = await a.acquire(pair)
        hasty = arbiter("a", member, timeout_ms=HASTY_MS)
        hasty._leases |= a._leases
        member.freeze()
        began = time.monotonic()
        with pytest.raises(
            ArbiterError, match=r"etcd does not answer \(http://127\.0\.0\.1:\d+: (Read timed out|nothing in 0\.5 s)"
        ):
            await hasty.renew(pair)
        assert time.monotonic() - began < 4
        asking = asyncio.create_task(b.acquire(pair))
        done, _ = await asyncio.wait([asking], timeout=1.5)
        assert not done
        member.thaw()
        assert await asking == Refusal("alone a by etcd's record")
        renewed = await a.renew(pair)
        assert isinstance(renewed, Grant)
        assert isinstance(first, Grant)
        assert (renewed.deadline_ns or 0) > (first.deadline_ns or 0)

    run(work())


def test_an_answer_that_comes_late_counts_from_the_question(member: Member, pair: Pair) -> None:
    async def work() -> None:
        lease_s = 5 * TTL  # it must not end meanwhile
        a = arbiter("a", member, lease_s=lease_s)
        await a.begin(pair)
        await a.acquire(pair)
        member.freeze()
        asked = time.monotonic_ns()
        asking = asyncio.create_task(a.renew(pair))
        await asyncio.sleep(0.7)
        member.thaw()
        answer = await asking
        assert isinstance(answer, Grant)
        assert (answer.deadline_ns or 0) < asked + lease_s * NS

    run(work())


def test_a_killed_etcd_remembers_when_it_is_back(member: Member, pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", member), arbiter("b", member)
        await a.begin(pair)
        await a.acquire(pair)
        member.kill()
        with pytest.raises(ArbiterError, match=r"127\.0\.0\.1:\d+: \[Errno 111\] Connection refused\)$"):
            await a.renew(pair)
        asking = asyncio.create_task(b.acquire(pair))
        await asyncio.sleep(0.3)
        member.start()
        assert await asking == Refusal("alone a by etcd's record")
        assert isinstance(await a.renew(pair), Grant)

    run(work())


def test_an_etcd_without_its_data_says_no_to_both(member: Member, pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", member), arbiter("b", member)
        await a.begin(pair)
        await a.acquire(pair)
        member.wipe()
        member.start()
        await asyncio.to_thread(member.wait)
        assert isinstance(await a.renew(pair), Refusal)
        assert isinstance(await b.acquire(pair), Refusal)

    run(work())


def test_cut_off_before_the_question_arrives(member: Member, pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", member), arbiter("b", member)
        await a.begin(pair)
        hasty = arbiter("a", member, timeout_ms=HASTY_MS)
        with dropped(member.port, "dport"):
            asking = asyncio.create_task(hasty.acquire(pair))
            done, _ = await asyncio.wait([asking], timeout=1.5)
            assert not done
            with pytest.raises(ArbiterError):
                await hasty.check()
        assert isinstance(await asking, Grant)
        assert isinstance(await b.acquire(pair), Refusal)

    run(work())


def test_an_answer_that_is_lost_is_given_again(member: Member, pair: Pair) -> None:
    """The decision is made, and who has made it does not know."""

    async def work() -> None:
        a, b = arbiter("a", member), arbiter("b", member)
        await a.begin(pair)
        await a._transact([], [{"request_put": {"key": _base64(a._key(pair, "right")), "value": _base64("alone a")}}])
        hasty = arbiter("a", member, timeout_ms=HASTY_MS)
        with dropped(member.port, "sport"):
            asking = asyncio.create_task(hasty.acquire(pair))
            done, _ = await asyncio.wait([asking], timeout=1.5)
            assert not done
        assert isinstance(await asking, Grant)
        assert isinstance(await b.acquire(pair), Refusal)
        assert await value(b, pair, "speaker") == "a"

    run(work())


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_a_grant_whose_deadline_has_passed_is_none(members: list[Member], pair: Pair) -> None:
    """The host was frozen between etcd's answer and the next step."""

    async def work() -> None:
        late = iter([0, TTL * NS])  # the clock at the first question, and when its answer is looked at
        a = arbiter("a", *members, clock=lambda: next(late, 2 * TTL * NS))
        await a.begin(pair)
        answer = await a.acquire(pair)
        assert isinstance(answer, Grant)
        assert (answer.deadline_ns or 0) > 2 * TTL * NS

    run(work())


def test_what_is_no_etcd_gives_no_answer(pair: Pair) -> None:
    async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        writer.close()

    async def work() -> None:
        server = await asyncio.start_server(web, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        a = EtcdArbiter(EtcdConfig(endpoints=(f"http://127.0.0.1:{port}",), lease_s=TTL), "a", time.monotonic_ns)
        with pytest.raises(ArbiterError, match=r"does not answer .*what answers there is no etcd"):
            await a.check()
        server.close()

    run(work())


def test_an_answer_that_drips_is_not_waited_for(pair: Pair) -> None:
    """Each byte is in time; the client's own timeout would never end."""

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(b"H")
            await asyncio.sleep(0.1)

    async def work() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        config = EtcdConfig(endpoints=(f"http://127.0.0.1:{port}",), lease_s=TTL, request_timeout_ms=300)
        a = EtcdArbiter(config, "a", time.monotonic_ns)
        async with asyncio.timeout(2):
            with pytest.raises(ArbiterError, match=r"nothing in 0\.3 s"):
                await a.check()
        server.close()

    run(work())


# ---- three of them ---------------------------------------------------------------------------------------------------


def test_a_cluster_that_loses_members(three: list[Member], pair: Pair) -> None:
    async def work() -> None:
        a, b = arbiter("a", *three), arbiter("b", *three, timeout_ms=HASTY_MS)
        await a.begin(pair)
        # A member that hangs costs HEDGE_S, and the next question goes to one that answers.
        leads = await asyncio.to_thread(_leader, three)
        slow = next(one for one in three if one is not leads)
        a._members.sort(key=lambda m: m.base_url != slow.url)
        slow.freeze()
        began = time.monotonic()
        assert isinstance(await a.acquire(pair), Grant)
        took = time.monotonic() - began
        assert HEDGE_S <= took < 4  # and not a request's whole time
        assert a._members[0].base_url != slow.url
        slow.thaw()
        # The leader is gone, perhaps with the host that is lost: the others elect a new one.
        leads.kill()
        assert await b.acquire(pair) == Refusal("alone a by etcd's record")
        # No quorum, no answer.
        slow.kill()
        with pytest.raises(ArbiterError, match="does not answer"):
            await b.check()
        leads.start()
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await b.check()
                    break
                except ArbiterError:
                    await asyncio.sleep(0.1)
        assert isinstance(await a.renew(pair), Grant)

    run(work())


def _leader(members: list[Member]) -> Member:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:  # there is none during an election
        for one in members:
            request = urllib.request.Request(f"{one.url}/v3/maintenance/status", data=b"{}", method="POST")
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                status = json.load(answer)
            if status.get("leader") == status["header"]["member_id"]:
                return one
        time.sleep(0.1)
    raise AssertionError("no leader")
