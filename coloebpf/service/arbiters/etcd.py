"""The arbiter in etcd: one decision for each time that a pair was in lock-step, and a lease for whoever goes on alone.

Two keys a pair, below the prefix of the configuration:

    /<prefix>/<pair>/right      "both", or "alone <host>"; no lease
    /<prefix>/<pair>/speaker    "<host>", of the one that is alone; goes with its lease

A prefix is for one couple of hosts: two couples with a pair of the same name would take it from each other.

Who holds what, when:

    lock-step      right is "both", written by the primary (`begin`) before it tells the secondary that it may ever take
                   over. Nobody holds a lease of etcd's, and nothing is asked of it: an etcd that is down disturbs
                   nobody as long as the hosts hear each other. The primary speaks by the secondary's leave, for some
                   hundred ms at a time (peer/witness.py).
    apart          each host asks: one transaction, "if right is both, then it is alone <me>, and speaker is <me>". etcd
                   takes one and refuses the other, for good. The refused one halts.
    no answer      the primary's leave runs out and the programs halt it. The secondary was silent all along. Both go on
                   asking. A request that was carried out but whose answer was lost is recognized when it is repeated.
    alone          the speaker renews its lease each third of it. If etcd can't be reached until the deadline, the
                   programs halt the host; an answer that comes later moves the deadline, and it speaks again.
    well again     the one that is alone makes a new copy, then `begin`: right is "both" again.

Why the decision has no lease. When the one that went on alone is gone for longer than its lease, the other one still
must not take over: its copy ends where the two were separated, and what clients have been sent since is not in it. So
`right` stays, and only `begin` changes it: by the one that is alone, or, when the other host's lease has expired, by an
operator's new protection. A key that is missing is no right either: an etcd that has lost its data grants nothing.

The lease is for what is frozen, or cut off, while it is alone: the guest can be started elsewhere when `speaker` is
gone, because the frozen host finds its deadline passed before its next packet leaves.

The arithmetic of the lease, TTL in seconds as etcd's answer has it (at least one and a half of its election timeouts: 2
with Debian's defaults). t is this host's CLOCK_MONOTONIC before the request was sent.

    etcd            ends the lease no sooner than TTL after it got the request; a new leader begins a whole TTL anew
    this host       deadline = t + TTL - TTL / DRIFT - IN_FLIGHT

t is before etcd's beginning, so the deadline is before its end, by the margins: DRIFT for clocks of different speed,
IN_FLIGHT for packets that were let pass just before (both as in peer/witness.py).

A takeover takes two writes to etcd, the lease and the transaction. A member that does not answer costs HEDGE_S, then
the next one is asked too. If it was the leader, the others elect a new one first, which takes an election timeout.

Client: etcd3gw, OpenStack's, over etcd's JSON gateway. It is synchronous, so each request runs in a thread.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import requests
from etcd3gw.client import Etcd3Client
from etcd3gw.exceptions import Etcd3Exception
from etcd3gw.lease import Lease

from coloebpf.errors import ArbiterError
from coloebpf.service.arbiters.base import NS_PER_S, RETRY_S, Grant, Protected, Refusal
from coloebpf.service.arbiters.etcd_access import client
from coloebpf.service.config import EtcdConfig
from coloebpf.service.log import say
from coloebpf.service.peer.witness import DRIFT, IN_FLIGHT_NS

log = logging.getLogger(__name__)
T = TypeVar("T")

BOTH, ALONE = "both", "alone "
HEDGE_S = 0.05  # seconds without an answer after which the next member is asked as well
WORKERS = 8  # requests at the same time and member: as many pairs may ask at once without waiting for each other
CHANGES = 5  # tries to change a key that others change, too
# What a request may fail with: etcd's own no, HTTP that ends in the middle, and answers that are no JSON or lack a key.
FAILURES = (Etcd3Exception, requests.RequestException, OSError, ValueError, KeyError, TypeError)


class EtcdArbiter:
    """Leases in etcd, for all pairs of `host` that want it."""

    name, promotes, leased = "etcd", True, True

    def __init__(self, config: EtcdConfig, host: str, clock: Callable[[], int]) -> None:
        self._host, self._clock = host, clock
        self._ttl, self._timeout = config.lease_s, config.request_timeout_ms / 1000
        self._prefix = config.prefix
        self._members = [client(url, config) for url in config.endpoints]  # the one that answered last in front
        self._pools = {id(m): ThreadPoolExecutor(WORKERS, thread_name_prefix="etcd") for m in self._members}
        self._leases: dict[str, int] = {}  # pair -> number of the lease that its speaker has

    # ---- the arbiter -----------------------------------------------------------------------------------------------

    async def check(self) -> None:
        """Raises ArbiterError unless a quorum answers."""
        await self._get(f"/{self._prefix}/check")

    async def begin(self, pair: Protected) -> None:
        right, speaker = self._key(pair, "right"), self._key(pair, "speaker")
        for _ in range(CHANGES):
            value, revision = await self._get(right)
            if value == BOTH:
                return
            compare = [_revision_is(right, revision)]
            if value is not None and value != ALONE + self._host:
                if (await self._get(speaker))[0] is not None:
                    raise ArbiterError(f"pair {pair.name}: {value} by etcd's record, and that host has not ended")
                compare.append(_revision_is(speaker, 0))
            await self._transact(compare, [_put(right, BOTH), _delete(speaker)])
        raise ArbiterError(f"pair {pair.name}: etcd's record of it is changed by others all the time")

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        told = False
        while True:
            try:
                answer = await self._claim(pair, from_both=True)
            except ArbiterError as e:
                if not told:
                    say(log, logging.ERROR, "the arbiter gives no answer", pair=pair.name, error=e)
                told = True
                await asyncio.sleep(RETRY_S)
                continue
            if isinstance(answer, Refusal) or (answer.deadline_ns or 0) > self._clock():
                return answer

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        lease = self._leases.get(pair.name)
        if lease is not None and seconds <= self._ttl:
            asked = self._clock()
            ttl = await self._ask(lambda member: Lease(lease, member).refresh())
            if ttl > 0:
                return self._grant(asked, ttl)
        return await self._claim(pair, from_both=False, seconds=seconds)

    async def release(self, pair: Protected) -> Grant | Refusal:
        right, speaker = self._key(pair, "right"), self._key(pair, "speaker")
        for _ in range(CHANGES):
            value, revision = await self._get(right)
            if value is None:
                self._leases.pop(pair.name, None)
                return Grant()
            compare = [_revision_is(right, revision)]
            if value not in (BOTH, ALONE + self._host):
                if (await self._get(speaker))[0] is not None:
                    return Refusal(f"{value} by etcd's record")
                compare.append(_revision_is(speaker, 0))
            await self._transact(compare, [_delete(right), _delete(speaker)])
        raise ArbiterError(f"pair {pair.name}: etcd's record of it is changed by others all the time")

    async def close(self) -> None:
        """What is still asked ends by its own timeout."""
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- the decision ----------------------------------------------------------------------------------------------

    async def _claim(self, pair: Protected, *, from_both: bool, seconds: int = 0) -> Grant | Refusal:
        """Takes the right, if it may be taken, or takes it up again with a new lease. Raises ArbiterError."""
        length = max(seconds, self._ttl)
        right, speaker, mine = self._key(pair, "right"), self._key(pair, "speaker"), ALONE + self._host
        asked = self._clock()
        granted = await self._ask(lambda member: _grant_lease(member, length))
        lease, ttl = granted
        take = [_put(right, mine), _put(speaker, self._host, lease)]
        if from_both and await self._transact([_value_is(right, BOTH)], take):
            say(log, logging.WARNING, "etcd says yes: this host goes on alone", pair=pair.name, lease_s=ttl)
        elif not await self._transact([_value_is(right, mine)], take[1:]):
            value, _ = await self._get(right)
            if value == mine or (value == BOTH and from_both):
                raise ArbiterError("etcd's record changed between two questions")
            return Refusal(f"{value} by etcd's record" if value else "etcd has no record of this pair in lock-step")
        self._leases[pair.name] = lease
        return self._grant(asked, ttl)

    @staticmethod
    def _grant(asked_ns: int, ttl_s: int) -> Grant:
        length = ttl_s * NS_PER_S
        return Grant(asked_ns + length - length // DRIFT - IN_FLIGHT_NS)

    # ---- requests --------------------------------------------------------------------------------------------------

    def _key(self, pair: Protected, what: str) -> str:
        return f"/{self._prefix}/{pair.name}/{what}"

    async def _get(self, key: str) -> tuple[str | None, int]:
        """Value and revision of a key, as a quorum has it; None and 0 if it is not there."""
        found = await self._ask(lambda member: member.get(key, metadata=True))
        if not found:
            return None, 0
        value, about = found[0]
        return value.decode(errors="replace"), int(about["mod_revision"])

    async def _transact(self, compare: list[dict[str, Any]], success: list[dict[str, Any]]) -> bool:
        request = {"compare": compare, "success": success, "failure": []}
        answer = await self._ask(lambda member: member.transaction(request))
        return bool(answer.get("succeeded", False))  # JSON of protobuf leaves out what is false

    async def _ask(self, question: Callable[[Etcd3Client], T]) -> T:
        """The first answer of any member. Every question can be asked twice with the same effect.

        Raises ArbiterError if none answers in the configuration's time.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + self._timeout
        waiting: dict[asyncio.Future[T], Etcd3Client] = {}
        left, failures = list(self._members), []
        while left or waiting:
            if left:
                member = left.pop(0)
                waiting[loop.run_in_executor(self._pools[id(member)], question, member)] = member
            patience = min(HEDGE_S, end - loop.time()) if left else end - loop.time()
            done, _ = await asyncio.wait(waiting, timeout=max(0.0, patience), return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                member = waiting.pop(future)
                try:
                    answer = future.result()
                except FAILURES as e:
                    failures.append(f"{member.base_url}: {_why(e)}")
                    continue
                self._members.sort(key=lambda m: m is not member)
                self._forget(waiting)
                return answer
            if loop.time() >= end:
                failures += [f"{member.base_url}: nothing in {self._timeout:g} s" for member in waiting.values()]
                break
        self._forget(waiting)
        raise ArbiterError(f"etcd does not answer ({'; '.join(failures)})")

    @staticmethod
    def _forget(waiting: dict[asyncio.Future[T], Etcd3Client]) -> None:
        for future in waiting:
            future.cancel()  # one that runs already ends by its own timeout, unheard


def _why(error: Exception) -> str:
    """What an operator wants to know of a failure: etcd's own words, or the innermost of the client's."""
    if isinstance(error, requests.JSONDecodeError):
        return "what answers there is no etcd"
    if isinstance(error, OSError) and error.strerror and error.filename:  # of the configuration's files
        return f"{error.filename}: {error.strerror}"
    text = getattr(error, "detail_text", None) or str(error)
    if "SSLEOFError" in text or "Connection reset" in text:  # in a race with the server's own word for it
        return "it closes the connection in the TLS handshake; does it ask for another client certificate?"
    try:
        return str(json.loads(text)["error"])
    except (ValueError, LookupError, TypeError):
        return str(text).rsplit(": ", 1)[-1].strip("()'\" \n")[:100] or type(error).__name__


def _grant_lease(member: Etcd3Client, ttl_s: int) -> tuple[int, int]:
    """Number and real length (seconds) of a new lease. The library's own call does not tell the length."""
    answer = member.post(member.get_url("/lease/grant"), json={"TTL": ttl_s, "ID": 0})
    return int(answer["ID"]), int(answer["TTL"])


def _text(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _put(key: str, value: str, lease: int = 0) -> dict[str, Any]:
    return {"request_put": {"key": _text(key), "value": _text(value), "lease": lease}}


def _delete(key: str) -> dict[str, Any]:
    return {"request_delete_range": {"key": _text(key)}}


def _value_is(key: str, value: str) -> dict[str, Any]:
    return {"key": _text(key), "result": "EQUAL", "target": "VALUE", "value": _text(value)}


def _revision_is(key: str, revision: int) -> dict[str, Any]:
    """Unchanged since it was read; revision 0: still not there."""
    return {"key": _text(key), "result": "EQUAL", "target": "MOD", "mod_revision": revision}
