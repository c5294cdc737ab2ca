"""The libxl-colo engine against libxl as the reference describes it, against Xen's own code, and against strangers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from coloebpf.errors import ConfigError, EngineError
from coloebpf.model import Role
from coloebpf.service.engine import Committed, DomainGone, Failed, Ready, SecondaryGone, Suspended
from coloebpf.service.engines import libxl_colo, libxl_session, libxl_wire, xl
from tests.service import xen_source
from tests.service.libxl_rig import (
    COLO_CHECKPOINT,
    DO_CHECKPOINT,
    INIT,
    INIT_ANSWER,
    PATIENT_NS,
    WAIT_S,
    LibxlProcess,
    Rig,
    Stranger,
    rigged,
)

FIRST = (Ready(), Suspended(requested=False), Committed())  # what libxl's start looks like
ASKED = (Suspended(requested=True), Committed())


@pytest.fixture(scope="session")
def xens_own() -> list[str]:
    """Xen's libxl_colo_proxy.c."""
    try:
        return [str(xen_source.peer())]
    except xen_source.NotToBeHadError as e:
        pytest.skip(f"Xen's source is not to be had: {e}")


@pytest.fixture(scope="module", autouse=True)
def kernel_stamps_arrivals() -> Iterator[None]:
    """The kernel begins with that some time after the first socket has asked for it; one that stays open keeps it on."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as sender,
        listener.accept()[0] as receiver,
    ):
        libxl_wire.prepare(receiver)
        receiver.setblocking(True)
        stamp = 0
        while not stamp:  # pytest's timeout would end it
            sender.send(b"x")
            stamp = libxl_wire.read(receiver, 1)[1]
        yield


@pytest.fixture(params=["reference", "xen"])
def libxl(request: pytest.FixtureRequest) -> list[str]:
    """The command of a libxl: by the reference, and Xen's own code."""
    if request.param == "reference":
        return [sys.executable, "-m", "tests.service.libxl_peer"]
    command: list[str] = request.getfixturevalue("xens_own")
    return command


# ---- with libxl --------------------------------------------------------------------------------------------------------


def test_each_request_is_one_checkpoint(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 21)
            await rig.expect(*FIRST)
            for _ in range(20):
                await rig.engine.request_checkpoint()
                await rig.expect(*ASKED)
            await rig.engine.request_checkpoint()  # the 21st lets it go
            assert await peer.rest() == 0
            assert [words[1] for words in peer.of("asked")] == ["1"] * 21
            assert isinstance(await rig.next(), SecondaryGone)
            assert rig.quiet()

    asyncio.run(body())


def test_many_wishes_between_two_checkpoints_are_one_request(libxl: list[str]) -> None:
    """Two queued requests are two checkpoints, so the second one would be for nothing."""

    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 3, ms=1000)
            await rig.expect(Ready())
            for _ in range(5):  # before the first COLO_CHECKPOINT: that one is on its way anyway
                await rig.engine.request_checkpoint()
            await rig.expect(*FIRST[1:])
            for _ in range(5):
                await rig.engine.request_checkpoint()
            await peer.until("asked")
            await rig.engine.request_checkpoint()  # while libxl works on it
            await rig.expect(*ASKED)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.until("asked"), 0.3)  # libxl would take up a queued one at once
            await rig.engine.request_checkpoint()
            await rig.expect(*ASKED)
            peer.kill()

    asyncio.run(body())


def test_libxl_begins_by_itself_after_5_s_and_the_event_says_so(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 2)
            await rig.expect(*FIRST, Suspended(requested=False), Committed())
            await rig.engine.request_checkpoint()
            assert await peer.rest() == 0
            by_itself, asked = peer.of("asked")
            assert (by_itself[1], asked[1]) == ("0", "1")
            waited = int(by_itself[2]) - int(peer.of("checkpoint")[0][3])
            assert waited > 4_900_000_000, "ns: it did not wait for a request"

    asyncio.run(body())


def test_the_message_is_here_before_the_pvm_goes_on(libxl: list[str]) -> None:
    """libxl sends header and body apart with Nagle's algorithm: with delayed ACKs it would be 40 ms later."""

    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 40, ms=5)
            told = []
            for _ in range(40):
                while not isinstance(await rig.next(), Committed):
                    pass
                told.append(time.monotonic_ns())
                await rig.engine.request_checkpoint()
            assert await peer.rest() == 0
            delays = [at - int(words[2]) for at, words in zip(told, peer.of("checkpoint"), strict=True)]
            assert statistics.median(delays) < 10_000_000, f"ns: {sorted(delays)}"

    asyncio.run(body())


def test_a_request_reaches_a_waiting_libxl_within_a_millisecond_or_so(xens_own: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(xens_own, 40, ms=5)
            asked = []
            for _ in range(40):
                while not isinstance(await rig.next(), Committed):
                    pass
                await asyncio.sleep(0.005)  # it waits by then
                asked.append(time.monotonic_ns())
                await rig.engine.request_checkpoint()
            assert await peer.rest() == 0
            delays = [int(words[2]) - at for at, words in zip(asked, peer.of("asked"), strict=True)]
            assert statistics.median(delays) < 5_000_000, f"ns: {sorted(delays)}"

    asyncio.run(body())


def test_a_second_session_of_one_guest_fails_to_start_and_the_first_goes_on(libxl: list[str]) -> None:
    """It gets no answer: EOF would do for libxl as one, and it would checkpoint without pause."""

    async def body() -> None:
        async with rigged() as rig:
            first = await rig.libxl(libxl, 2)
            await rig.expect(*FIRST)
            second = await rig.libxl(libxl, 1)
            assert (await second.line())[:2] == ["setup", "-1"]
            assert await second.rest() == 1
            assert rig.quiet()
            await rig.engine.request_checkpoint()
            await rig.expect(*ASKED)
            await rig.engine.request_checkpoint()
            assert await first.rest() == 0

    asyncio.run(body())


def test_eof_for_an_answer_would_start_a_libxl_that_checkpoints_without_pause(libxl: list[str]) -> None:
    """Why a refusal is silence: what both libxls do with a listener that takes INIT and closes."""

    async def body() -> None:
        async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readexactly(len(INIT)) == INIT
            writer.close()

        server = await asyncio.start_server(close, "127.0.0.1", 0)
        async with server:
            start = time.monotonic()
            peer = await LibxlProcess.start(libxl, server.sockets[0].getsockname()[1], 20)
            assert await peer.rest() == 0
        assert peer.lines[0][1] == "0"
        assert [words[1] for words in peer.of("asked")] == ["0"] * 20
        assert time.monotonic() - start < 4, "it has waited for a request"

    asyncio.run(body())


@pytest.mark.parametrize(
    ("alive", "event"), [(True, SecondaryGone), (False, DomainGone), (None, Failed)], ids=["lives", "gone", "unknown"]
)
def test_when_libxl_leaves_the_guest_tells_which_side_failed(libxl: list[str], alive: bool | None, event: type) -> None:
    async def body() -> None:
        async with rigged() as rig:
            rig.alive = alive
            peer = await rig.libxl(libxl, 0)
            await rig.expect(*FIRST)
            peer.kill()
            last = await rig.next()
            assert isinstance(last, event)
            if isinstance(last, Failed):
                assert last.fatal
                assert "xenstored is not there" in last.reason
            with pytest.raises(EngineError, match="no libxl is connected"):
                await rig.engine.request_checkpoint()

    asyncio.run(body())


def test_a_killed_xl_leaves_a_child_that_holds_the_connection_until_it_is_asked(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 0)
            await rig.expect(*FIRST)
            await peer.forked()
            peer.kill(whole=False)
            await asyncio.sleep(0.2)
            assert rig.quiet()
            await rig.engine.request_checkpoint()
            assert isinstance(await rig.next(), SecondaryGone)

    asyncio.run(body())


def test_after_a_session_the_next_one_is_welcome(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            for _ in range(3):
                peer = await rig.libxl(libxl, 0)
                await rig.expect(*FIRST)
                await rig.engine.request_checkpoint()  # none of the session before counts
                await rig.expect(*ASKED)
                peer.kill()
                assert isinstance(await rig.next(), SecondaryGone)

    asyncio.run(body())


def test_several_guests_have_several_ports(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as web, rigged() as db:
            for rig in (web, db):
                await rig.libxl(libxl, 2)
                await rig.expect(*FIRST)
            await web.engine.request_checkpoint()
            await web.expect(*ASKED)
            assert db.quiet()
            await db.engine.request_checkpoint()
            await db.expect(*ASKED)

    asyncio.run(body())


# ---- the bytes ---------------------------------------------------------------------------------------------------------


def test_the_bytes_and_that_each_message_is_one_segment() -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.connect(rig.engine.port)
            peer.send(INIT)
            assert await peer.read(len(INIT_ANSWER)) == INIT_ANSWER
            assert peer.segments_in() == 1
            peer.send(COLO_CHECKPOINT)
            await rig.expect(*FIRST)
            await rig.engine.request_checkpoint()
            assert await peer.read(len(DO_CHECKPOINT)) == DO_CHECKPOINT
            assert peer.segments_in() == 2
            peer.close()

    asyncio.run(body())


def test_messages_in_single_bytes_and_messages_in_one_heap() -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.connect(rig.engine.port)
            peer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in INIT:
                peer.send(bytes([byte]))
                await asyncio.sleep(0)
            assert await peer.read(len(INIT_ANSWER)) == INIT_ANSWER
            peer.send(COLO_CHECKPOINT * 100)
            await rig.expect(*FIRST, *FIRST[1:] * 99)
            peer.close()

    asyncio.run(body())


def test_init_is_answered_while_libxl_still_waits() -> None:
    async def body() -> None:
        async with rigged() as rig:
            waited = []
            for _ in range(20):
                start = time.monotonic()
                peer = await Stranger.as_libxl(rig)
                waited.append(time.monotonic() - start)
                await rig.expect(Ready())
                peer.close()
                await rig.next()
            assert statistics.median(waited) < 0.1

    asyncio.run(body())


def test_a_peer_that_sends_init_again_is_answered_and_nothing_is_asked_before_its_next_checkpoint() -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            peer.send(COLO_CHECKPOINT)
            await rig.expect(*FIRST)
            peer.send(INIT)
            assert await peer.read(len(INIT_ANSWER)) == INIT_ANSWER
            await rig.engine.request_checkpoint()
            peer.send(COLO_CHECKPOINT)
            await rig.expect(Suspended(requested=False), Committed())
            await rig.engine.request_checkpoint()
            assert await peer.read(len(DO_CHECKPOINT)) == DO_CHECKPOINT  # and not two of them
            assert peer.segments_in() == 3
            peer.close()

    asyncio.run(body())


GARBAGE = {
    "oversized": b"\x7f\xff\xff\xff",
    "empty": b"\0\0\0\0",
    "unknown length": b"\0\0\0\x10",
    "another text": b"\0\0\0\x0fCOLO_CHICKPOINT",
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "a body without header": b"COLO_CHECKPOINT",
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_ends_a_session_and_the_next_one_is_welcome(garbage: bytes) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            peer.send(COLO_CHECKPOINT + garbage + COLO_CHECKPOINT)
            await rig.expect(*FIRST)
            last = await rig.next()
            assert isinstance(last, Failed)
            assert last.fatal
            assert await peer.closed()
            assert rig.quiet(), "nothing that comes after garbage is believed"
            peer = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            peer.close()

    asyncio.run(body())


@pytest.mark.parametrize("garbage", [*GARBAGE.values(), COLO_CHECKPOINT], ids=[*GARBAGE, "COLO_CHECKPOINT"])
def test_who_does_not_begin_with_init_is_no_libxl_and_no_event(garbage: bytes) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.connect(rig.engine.port)
            peer.send(garbage)
            assert await peer.closed()
            assert rig.quiet()
            await Stranger.as_libxl(rig)
            await rig.expect(Ready())

    asyncio.run(body())


# ---- slow, strange and hostile ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", INIT[:1], INIT[:10]])
def test_who_does_not_finish_init_in_time_makes_room(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libxl_session, "HANDSHAKE_S", 0.1)

    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.connect(rig.engine.port)
            peer.send(sent)
            assert await peer.closed()
            assert rig.quiet()
            await Stranger.as_libxl(rig)
            await rig.expect(Ready())

    asyncio.run(body())


def test_a_message_that_stops_in_the_middle_ends_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libxl_session, "MESSAGE_S", 0.1)

    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            peer.send(COLO_CHECKPOINT[:-1])
            last = await rig.next()
            assert isinstance(last, Failed)
            assert last.fatal
            assert "not whole" in last.reason
            assert await peer.closed()

    asyncio.run(body())


def test_a_message_that_comes_just_in_time_disarms_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libxl_session, "MESSAGE_S", WAIT_S)

    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            session = rig.engine._session
            assert session
            for _ in range(3):
                peer.send(COLO_CHECKPOINT[:4])
                async with asyncio.timeout(WAIT_S):
                    while (timer := session._timer) is None:
                        await asyncio.sleep(0)
                peer.send(COLO_CHECKPOINT[4:])
                await rig.expect(Suspended(requested=False), Committed())
                assert timer.cancelled()
                assert session._timer is None
            peer.close()

    asyncio.run(body())


def test_a_checkpoint_that_was_heard_too_late_is_not_committed() -> None:
    """The PVM may have run meanwhile, and what it sent would be released without the SVM's proof."""

    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            os.write(peer.socket.fileno(), COLO_CHECKPOINT)
            time.sleep(PATIENT_NS / 10**9 + 0.1)  # this process does something else
            assert await rig.next() == Suspended(requested=False)
            late = await rig.next()
            assert isinstance(late, Failed)
            assert not late.fatal
            assert "has waited here for" in late.reason
            await rig.engine.request_checkpoint()  # a new one may be asked for at once
            assert await peer.read(len(DO_CHECKPOINT)) == DO_CHECKPOINT
            peer.send(COLO_CHECKPOINT)
            await rig.expect(*ASKED)
            peer.close()

    asyncio.run(body())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_of_dom0_is_refused() -> None:
    """What it says would release output. Also if it has closed its socket, which makes it look like root's."""
    script = (
        "import os, socket, sys; os.setuid(65534)\n"
        "s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        f"s.send({INIT + COLO_CHECKPOINT!r})\n"
        "if sys.argv[2] == 'stay':\n"
        "    try: assert s.recv(100) == b''\n"
        "    except ConnectionError: pass\n"
    )

    async def body() -> None:
        async with rigged() as rig:
            command = ["/usr/bin/python3", "-c", script, str(rig.engine.port)]
            process = await asyncio.create_subprocess_exec(*command, "stay")
            assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
            subprocess.run([*command, "leave"], check=True, timeout=WAIT_S)
            time.sleep(0.2)  # the loop stands still until the kernel has forgotten whose it was
            await asyncio.sleep(0.1)
            assert rig.quiet()
            await Stranger.as_libxl(rig)
            await rig.expect(Ready())

    asyncio.run(body())


def test_a_second_connection_hears_nothing_for_as_long_as_libxl_would_wait() -> None:
    async def body() -> None:
        async with rigged() as rig:
            first = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            second = await Stranger.connect(rig.engine.port)
            second.send(INIT)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(second.reader.read(1), 0.6)
            assert await second.closed()
            first.close()

    asyncio.run(body())


def test_a_crowd_of_second_connections_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libxl_session, "HANDSHAKE_S", 10 * WAIT_S)

    async def body() -> None:
        async with rigged() as rig:
            first = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            crowd = [await Stranger.connect(rig.engine.port) for _ in range(libxl_colo.MAX_REFUSED + 5)]
            for peer in crowd[libxl_colo.MAX_REFUSED :]:
                assert await peer.closed()  # at once
            assert len(rig.engine._refusals) == libxl_colo.MAX_REFUSED
            first.send(COLO_CHECKPOINT)
            await rig.expect(*FIRST[1:])
            first.close()
            await rig.engine.stop()
            for peer in crowd[: libxl_colo.MAX_REFUSED]:
                assert await peer.closed()

    asyncio.run(body())


# ---- a connection that an earlier process accepted ---------------------------------------------------------------------


@contextlib.asynccontextmanager
async def adopted(outstanding: bool, before: bytes = b"") -> AsyncIterator[tuple[Rig, Stranger]]:
    """A rig that goes on with a connection on which `before` has come already."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        libxl_wire.prepare(listener)
        peer = await Stranger.connect(listener.getsockname()[1])
        await asyncio.sleep(0)
        listener.setblocking(True)
        connection, _ = listener.accept()
    peer.send(before)
    rig = Rig()
    rig.engine.adopt(connection, outstanding)
    await rig.engine.start()
    await rig.expect(Ready())
    try:
        yield rig, peer
    finally:
        peer.close()
        await rig.engine.stop()


def test_adopted_in_doubt_nothing_is_sent_before_the_next_checkpoint() -> None:
    async def body() -> None:
        async with adopted(outstanding=True) as (rig, peer):
            await rig.engine.request_checkpoint()
            peer.send(COLO_CHECKPOINT)
            await rig.expect(*ASKED)
            await rig.engine.request_checkpoint()
            assert await peer.read(len(DO_CHECKPOINT)) == DO_CHECKPOINT
            assert peer.segments_in() == 1, "a request was sent before"

    asyncio.run(body())


def test_adopted_without_doubt_a_request_is_sent_at_once() -> None:
    async def body() -> None:
        async with adopted(outstanding=False) as (rig, peer):
            await rig.engine.request_checkpoint()
            assert await peer.read(len(DO_CHECKPOINT)) == DO_CHECKPOINT

    asyncio.run(body())


def test_the_earlier_process_may_have_read_a_header_without_its_body() -> None:
    async def body() -> None:
        async with adopted(outstanding=True, before=COLO_CHECKPOINT[4:] + COLO_CHECKPOINT) as (rig, peer):
            await rig.expect(*ASKED, *FIRST[1:])
            peer.send(COLO_CHECKPOINT[4:])  # only the first may come without
            last = await rig.next()
            assert isinstance(last, Failed)
            assert last.fatal

    asyncio.run(body())


def test_the_earlier_process_may_not_have_answered_init() -> None:
    async def body() -> None:
        async with adopted(outstanding=False, before=INIT) as (rig, peer):
            assert await peer.read(len(INIT_ANSWER)) == INIT_ANSWER
            await rig.engine.request_checkpoint()  # on its way by itself
            peer.send(COLO_CHECKPOINT)
            await rig.expect(*FIRST[1:])
            assert peer.segments_in() == 1

    asyncio.run(body())


def test_what_is_no_connection_is_not_adopted() -> None:
    async def body() -> None:
        left, right = socket.socketpair()
        with left, right, pytest.raises(EngineError, match="no connection of libxl"):
            Rig().engine.adopt(left, outstanding=False)

    asyncio.run(body())


# ---- start, stop, failover ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::1", "localhost", ""])
def test_only_loopback_and_only_what_libxl_can_connect_to(host: str) -> None:
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1 would be right"):
        libxl_colo.LibxlColoEngine(
            "web", Role.PRIMARY, (host, 9000), print, Rig()._domain_alive, Rig().engine._notifier
        )


def test_a_port_in_use_is_said() -> None:
    async def body() -> None:
        async with rigged() as rig:
            other = libxl_colo.LibxlColoEngine(
                "db", Role.PRIMARY, ("127.0.0.1", rig.engine.port), print, rig._domain_alive, rig.engine._notifier
            )
            with pytest.raises(EngineError, match=r"pair db: can't listen on .*in use"):
                await other.start()

    asyncio.run(body())


def test_on_the_secondary_there_is_nothing_to_listen_for() -> None:
    async def body() -> None:
        async with rigged(role=Role.SECONDARY) as rig:
            await rig.expect(Ready())
            with pytest.raises(EngineError, match="does not listen"):
                print(rig.engine.port)
            await rig.engine.failover()

    asyncio.run(body())


def test_before_libxl_is_there_nothing_can_be_asked() -> None:
    async def body() -> None:
        async with rigged() as rig:
            with pytest.raises(EngineError, match="xl remus -c -p"):
                await rig.engine.request_checkpoint()

    asyncio.run(body())


def test_after_a_failover_nothing_of_the_session_counts_and_libxl_is_not_disturbed(libxl: list[str]) -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await rig.libxl(libxl, 0)
            await rig.expect(*FIRST)
            await rig.engine.failover()
            with pytest.raises(EngineError):
                await rig.engine.request_checkpoint()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(peer.until("asked"), 0.5)
            assert not peer.of("asked"), "libxl checkpoints: it must have lost the connection"
            peer.kill()
            await peer.process.wait()
            assert rig.quiet()

    asyncio.run(body())


def test_after_a_failover_no_checkpoint_of_the_old_session_releases_anything() -> None:
    async def body() -> None:
        async with rigged() as rig:
            peer = await Stranger.as_libxl(rig)
            await rig.expect(Ready())
            await rig.engine.failover()
            peer.send(COLO_CHECKPOINT)
            peer.send(INIT)  # answered behind what came before
            assert await peer.read(len(INIT_ANSWER)) == INIT_ANSWER
            assert rig.quiet()
            peer.close()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("echo 7", True),
        ("echo \"Can't get domid of domain name 'web', maybe this domain does not exist.\" >&2; exit 1", False),
        ("echo 'cannot init xl context' >&2; exit 1", "failed with 1: cannot init xl context"),
        ("sleep 60", "did not answer"),
        (None, "can't be run"),
    ],
)
def test_xl_is_asked_for_the_guest(tmp_path: Path, script: str | None, answer: bool | str) -> None:
    command = tmp_path / "xl"
    if script is not None:
        command.write_text(f'#!/bin/sh\n[ "$*" = "domid web" ] || exit 9\n{script.replace("sleep", "exec sleep")}\n')
        command.chmod(0o755)

    async def ask() -> bool:
        return await xl.domain_alive("web", str(command), timeout_s=0.5 if script == "sleep 60" else 5)

    if isinstance(answer, bool):
        assert asyncio.run(ask()) is answer
    else:
        with pytest.raises(EngineError, match=answer):
            asyncio.run(ask())
