"""Arbiters but for etcd: the one that never says yes to a secondary, fencing by real commands, and keeping a grant."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from coloebpf.errors import ArbiterError, ConfigError
from coloebpf.model import Role
from coloebpf.service import arbiters
from coloebpf.service.arbiters import command as command_module
from coloebpf.service.arbiters.base import Grant, Refusal, keep
from coloebpf.service.arbiters.command import CommandArbiter
from coloebpf.service.config import ArbiterConfig, CommandConfig, EtcdConfig

MS = 1_000_000


@dataclass(frozen=True)
class Pair:
    name: str = "web"
    role: Role = Role.PRIMARY


PRIMARY, SECONDARY = Pair(), Pair(role=Role.SECONDARY)


# ---- none ------------------------------------------------------------------------------------------------------------


def test_without_an_arbiter_only_the_primary_goes_on_and_it_is_said_at_start(caplog: pytest.LogCaptureFixture) -> None:
    none = arbiters.make("none", ArbiterConfig(), "a", time.monotonic_ns)
    assert "nobody takes over until an operator says so" in caplog.text
    assert not none.promotes
    assert not none.leased
    assert asyncio.run(none.acquire(PRIMARY)) == Grant()
    refused = asyncio.run(none.acquire(SECONDARY))
    assert isinstance(refused, Refusal)
    assert "the primary may be alive" in refused.reason


def test_a_pair_whose_arbiter_has_no_table() -> None:
    with pytest.raises(ConfigError, match=r"no table \[arbiter\.etcd\]"):
        arbiters.make("etcd", ArbiterConfig(), "a", time.monotonic_ns)


def test_each_kind_is_made() -> None:
    config = ArbiterConfig(
        etcd=EtcdConfig(endpoints=("http://127.0.0.1:2379",)), command=CommandConfig(fence=("true",))
    )
    for kind in ("none", "etcd", "command"):
        assert arbiters.make(kind, config, "a", time.monotonic_ns).name == kind


# ---- command ---------------------------------------------------------------------------------------------------------


def fencing(*command: str, timeout_s: int = 10, clock: Callable[[], int] = time.monotonic_ns) -> CommandArbiter:
    return CommandArbiter(CommandConfig(fence=command, timeout_s=timeout_s), clock)


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_exit_code_0_means_that_the_other_host_is_off(caplog: pytest.LogCaptureFixture) -> None:
    arbiter = fencing(*python("import sys; print('node b'); print('is off', file=sys.stderr)"))
    assert asyncio.run(arbiter.acquire(SECONDARY)) == Grant()
    assert (arbiter.runs, arbiter.failures) == (1, 0)
    said = [record.message for record in caplog.records]
    assert 'fencing command says text="node b"' in said
    assert 'fencing command says text="is off"' in said


def test_anything_else_is_tried_again_and_nobody_goes_on_meanwhile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "PAUSE_FIRST_S", 0.01)
    count = tmp_path / "count"
    code = f"import sys; f = open({str(count)!r}, 'a'); f.write('x'); f.flush(); sys.exit(f.tell() < 3)"
    arbiter = fencing(*python(code))
    assert asyncio.run(arbiter.acquire(SECONDARY)) == Grant()
    assert count.read_text() == "xxx"
    assert arbiter.failures == 2
    assert caplog.text.count('how="exit code 1"') == 2


def test_a_command_that_takes_too_long_is_killed_with_all_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(command_module, "PAUSE_FIRST_S", 60)
    child = tmp_path / "child"
    child.touch()

    async def run() -> None:
        arbiter = fencing("sh", "-c", f"sleep 100 & echo $! >{child}; wait", timeout_s=1)
        async with asyncio.timeout(60):
            while not child.read_text():  # a busy machine may not come to start it within a second
                before = arbiter.failures
                asking = asyncio.create_task(arbiter.acquire(SECONDARY))
                while arbiter.failures == before:
                    await asyncio.sleep(0.02)
                assert not asking.done()
                asking.cancel()
            while running(child.read_text()):  # the signal is on its way
                await asyncio.sleep(0.02)

    asyncio.run(run())
    assert "took longer than 1 s and was killed" in caplog.text


def running(process: str) -> bool:
    try:
        return Path(f"/proc/{process.strip()}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_command_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        arbiter = fencing("/nowhere/stonith_admin")
        with pytest.raises(ArbiterError, match="/nowhere/stonith_admin is no program"):
            await arbiter.check()
        asking = asyncio.create_task(arbiter.acquire(SECONDARY))
        async with asyncio.timeout(5):
            while not arbiter.failures:
                await asyncio.sleep(0.01)
        asking.cancel()
        await fencing("true").check()

    asyncio.run(run())
    assert "can't be run: No such file or directory" in caplog.text


def test_many_pairs_are_one_run(tmp_path: Path) -> None:
    """All pairs of the host are lost together; fencing twice would turn the host on again, or off in mid-boot."""
    count = tmp_path / "count"
    now = [0]

    async def run() -> None:
        arbiter = fencing("sh", "-c", f"echo x >>{count}; sleep 0.2", clock=lambda: now[0])
        pairs = [Pair(f"guest{number}", Role.SECONDARY) for number in range(20)]
        assert await asyncio.gather(*map(arbiter.acquire, pairs)) == [Grant()] * 20
        now[0] += 1000 * MS
        assert await arbiter.acquire(SECONDARY) == Grant()  # one that comes late
        assert count.read_text() == "x\n"
        now[0] += 1000 * MS
        assert await arbiter.acquire(SECONDARY) == Grant()  # lost another time
        assert count.read_text() == "x\nx\n"

    asyncio.run(run())


def test_who_no_longer_waits_does_not_stop_the_command(tmp_path: Path) -> None:
    began, ended = tmp_path / "began", tmp_path / "ended"

    async def run() -> None:
        arbiter = fencing("sh", "-c", f"touch {began}; sleep 0.3; touch {ended}")
        asking = asyncio.create_task(arbiter.acquire(SECONDARY))
        async with asyncio.timeout(5):
            while not began.exists():
                await asyncio.sleep(0.01)
        asking.cancel()
        assert await arbiter.acquire(PRIMARY) == Grant()  # joins the run
        assert ended.exists()
        assert arbiter.runs == 1

    asyncio.run(run())


def test_a_flood_of_output_neither_blocks_the_command_nor_fills_the_log(caplog: pytest.LogCaptureFixture) -> None:
    arbiter = fencing(*python("print('x' * 99 + '\\n', end='') or [print('y' * 99) for _ in range(20000)]"))
    assert asyncio.run(arbiter.acquire(SECONDARY)) == Grant()
    logged = sum(len(record.message) for record in caplog.records)
    assert logged < 4 * command_module.OUTPUT_BYTES


def test_what_the_command_leaves_behind_holds_nobody_up() -> None:
    """A daemon that it started keeps its output open."""
    start = time.monotonic()
    arbiter = fencing("sh", "-c", "sleep 30 & exit 0")
    assert asyncio.run(arbiter.acquire(SECONDARY)) == Grant()
    assert time.monotonic() - start < 10


# ---- keeping a grant -------------------------------------------------------------------------------------------------


class Scripted:
    """Answers a renewal with the next of its list."""

    name, promotes, leased = "scripted", True, True

    def __init__(self, clock: Callable[[], int], *answers: Grant | Refusal | ArbiterError) -> None:
        self.clock, self.answers, self.asked_ns = clock, list(answers), [clock()]

    def gaps_ms(self) -> list[int]:
        """From one question to the next."""
        return [(after - before) // MS for before, after in pairwise(self.asked_ns)]

    async def check(self) -> None: ...
    async def begin(self, pair: object) -> None: ...
    async def close(self) -> None: ...

    async def acquire(self, pair: object) -> Grant | Refusal:
        raise AssertionError

    async def release(self, pair: object) -> Grant | Refusal:
        raise AssertionError

    async def renew(self, pair: object, seconds: int = 0) -> Grant | Refusal:
        self.asked_ns.append(self.clock())
        answer = self.answers.pop(0)
        if isinstance(answer, ArbiterError):
            raise answer
        return answer


class Time:
    """Goes on when somebody sleeps, and only then."""

    def __init__(self) -> None:
        self.now_ns = 10**12

    def __call__(self) -> int:
        return self.now_ns

    async def sleep(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1000) * MS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    made = Time()
    monkeypatch.setattr(asyncio, "sleep", made.sleep)
    return made


def test_a_grant_is_kept_until_the_arbiter_says_no(clock: Time, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    start, deadlines = clock(), list[int]()
    no_answer = ArbiterError("etcd does not answer")
    answers = (Grant(start + 900 * MS), no_answer, no_answer, Grant(start + 1100 * MS), Refusal("alone b"))
    scripted = Scripted(clock, *answers)
    kept = keep(scripted, PRIMARY, Grant(start + 600 * MS), clock, deadlines.append)
    assert asyncio.run(kept) == Refusal("alone b")
    assert deadlines == [start + 900 * MS, start + 1100 * MS]
    assert scripted.gaps_ms() == [200, 233, 156, 104, 136]  # a third of what is left
    said = [record.message for record in caplog.records]
    assert said == [
        'the right to speak could not be renewed pair=web error="etcd does not answer"',
        "the right to speak is renewed again pair=web",
    ]


def test_an_arbiter_that_is_gone_for_good_is_asked_on_and_on(clock: Time) -> None:
    """The deadline halts the host; there is nothing to be said twice."""
    scripted = Scripted(clock, *[ArbiterError("gone")] * 3, Refusal("alone b"))
    over = Grant(clock() - 1)
    assert asyncio.run(keep(scripted, PRIMARY, over, clock, lambda _: None)) == Refusal("alone b")
    assert scripted.gaps_ms() == [100] * 4  # and not in a busy loop


def test_a_grant_without_end_is_never_renewed() -> None:
    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(
                keep(Scripted(time.monotonic_ns), PRIMARY, Grant(), time.monotonic_ns, lambda _: None), 0.3
            )

    asyncio.run(run())
