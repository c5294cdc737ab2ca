"""The link of two services: real sockets, real TLS; who gets in, who doesn't, and what happens when it breaks.

Host a connects, host b listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.errors import LinkError, PkiError
from coloebpf.model import Role, State
from coloebpf.service.peer import link as link_module
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import Beat, Bye, Hello, Message, PairNote, Settled, StateNote
from coloebpf.service.peer.pki import Identity, init_pki
from coloebpf.service.peer.refusals import QUIET_NS, Refusals
from tests.service.peers import LEASE_NS, LOOPBACK, PATIENCE, Recorded, expired, identity, until


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    init_pki(directory, ("a", "b", "c"))
    return directory


@contextlib.asynccontextmanager
async def listener(pki: Path, **options: object) -> AsyncIterator[Recorded]:
    b = Recorded("b", "a", identity(pki, "b"), **options)  # type: ignore[arg-type]
    b.link.start()
    try:
        yield b
    finally:
        await b.link.stop("the test is over")


@contextlib.asynccontextmanager
async def connector(pki: Path, port: int, **options: object) -> AsyncIterator[Recorded]:
    a = Recorded("a", "b", identity(pki, "a"), connect=port, **options)  # type: ignore[arg-type]
    a.link.start()
    try:
        yield a
    finally:
        await a.link.stop("the test is over")


@contextlib.asynccontextmanager
async def both(pki: Path) -> AsyncIterator[tuple[Recorded, Recorded]]:
    """A link that is up."""
    async with listener(pki) as b, connector(pki, b.link.port) as a:
        await a.up()
        await b.up()
        yield a, b


class Impostor:
    """Speaks TLS with a certificate, and says what it likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, files: Identity, port: int) -> Impostor:
        context = files.client_context()
        return cls(*await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname="b"))

    def say(self, message: Message, seq: int) -> None:
        self.writer.write(messages.encode(message, seq))

    def hello(self, session: str = "5e" * 16, connection: int = 1, name: str = "a") -> None:
        self.say(Hello(name, session, connection, LEASE_NS, ()), 1)

    async def refused(self) -> bool:
        """The other side ends the connection; whatever it said before does not matter."""
        async with asyncio.timeout(PATIENCE):
            with contextlib.suppress(OSError):
                while await self.reader.read(65536):
                    pass
        return True


# ---- the link as it should be ----------------------------------------------------------------------------------------


def test_both_say_hello_and_then_talk(pki: Path) -> None:
    async def run() -> None:
        pair = PairNote(0, "web", Role.PRIMARY, State.LOCKSTEP, 3)
        async with listener(pki) as b, connector(pki, b.link.port, pairs=lambda: [pair]) as a:
            await a.up()
            await b.up()
            assert b.hellos == [Hello("a", b"a".ljust(16, b"\0").hex(), 1, LEASE_NS, (pair,))]
            assert a.hellos[0].name == "b"
            for number in range(1, 500):
                assert a.link.send(Beat(number, 0, 0, ()))
            assert b.link.send(StateNote(0, State.HALTED, 7))
            await b.until(lambda: len(b.messages) == 499)
            assert b.messages == [Beat(number, 0, 0, ()) for number in range(1, 500)]
            await a.until(lambda: a.messages == [StateNote(0, State.HALTED, 7)])
            assert (a.link.sent["beat"], b.link.received["beat"]) == (499, 499)
            assert not any(a.link.refused.counts.values())
            assert not any(b.link.refused.counts.values())

    asyncio.run(run())


def test_only_tls_13_is_spoken(pki: Path) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            context = identity(pki, "a").client_context()
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection(LOOPBACK, b.link.port, ssl=context, server_hostname="b")
            await until(lambda: b.link.refused.counts["version"] == 1)

    asyncio.run(run())


def test_a_bye_is_heard_and_the_other_side_comes_back(pki: Path) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            async with connector(pki, b.link.port) as a:
                await b.up()
                await a.up()
            await b.down()
            assert b.messages == [Bye("the test is over")]
            assert a.count("down") == 0  # it ended itself, on purpose
            async with connector(pki, b.link.port, session=b"2" * 16) as again:
                await again.up()
                await b.up(2)
                assert b.hellos[1].session == (b"2" * 16).hex()

    asyncio.run(run())


def test_a_lost_connection_is_made_anew(pki: Path) -> None:
    async def run() -> None:
        async with both(pki) as (a, b):
            for times in range(2, 6):
                assert a.link._session is not None
                a.link._session.abort()
                await a.up(times)
                await b.up(times)
            assert [kind for kind, _ in b.events] == ["up", "down"] * 4 + ["up"]
            assert a.link.send(Settled(1))
            await b.until(lambda: b.messages == [Settled(1)])

    asyncio.run(run())


def test_a_listener_that_comes_late_is_found(pki: Path) -> None:
    async def run() -> None:
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            port = probe.getsockname()[1]
        async with connector(pki, port) as a:
            await until(lambda: a.link._tries >= 3)
            async with listener(pki, port=port):
                await a.up()
            assert not any(a.link.refused.counts.values())  # nobody there is nobody refused

    asyncio.run(run())


def test_send_says_whether_it_was_sent(pki: Path) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            assert not b.link.connected
            assert not b.link.send(Settled(1))
            assert b.link.sent["settled"] == 0

    asyncio.run(run())


def test_a_handler_that_fails_does_not_cost_the_link(pki: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with both(pki) as (a, b):

            def fail(message: Message) -> None:
                raise RuntimeError("a mistake")

            keep, b.link._on_message = b.link._on_message, fail
            a.link.send(Settled(1))
            await until(lambda: b.link.received["settled"] == 1)
            b.link._on_message = keep
            a.link.send(Settled(2))
            await b.until(lambda: b.messages == [Settled(2)])

    asyncio.run(run())
    assert "a mistake" in caplog.text


def test_an_address_that_is_taken_is_said(pki: Path) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            second = Recorded("b", "a", identity(pki, "b"), port=b.link.port)
            with pytest.raises(LinkError, match=rf"can't listen on 127\.0\.0\.1:{b.link.port}: Address already in use"):
                second.link.start()

    asyncio.run(run())


def test_names_that_cannot_be(pki: Path) -> None:
    with pytest.raises(LinkError, match="both hosts are called a"):
        Recorded("a", "a", identity(pki, "a"))
    with pytest.raises(PkiError, match=r"'b\.\.c' can't be a certificate's name"):
        Recorded("a", "b..c", identity(pki, "a"))


def test_new_certificates_count_for_new_connections(pki: Path, tmp_path: Path) -> None:
    async def run() -> None:
        for file in pki.iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        async with listener(tmp_path) as b, connector(pki, b.link.port) as a:
            await a.up()
            (tmp_path / "b.key").write_text("broken")
            with pytest.raises(PkiError):
                b.link.reload_certificates()
            init_pki(tmp_path / "new", ("a", "b"))
            for file in (tmp_path / "new").iterdir():
                (tmp_path / file.name).write_bytes(file.read_bytes())
            b.link.reload_certificates()
            assert a.link.connected
            assert a.link._session is not None
            a.link._session.abort()
            await until(lambda: a.link.refused.counts["certificate"] > 0)  # of another CA than a's now

    asyncio.run(run())


# ---- who does not get in ---------------------------------------------------------------------------------------------


Stranger = Callable[[Path, Path, int], Awaitable[None]]


async def _no_certificate(pki: Path, tmp: Path, port: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pki / "ca.pem")
    reader, writer = await asyncio.open_connection(LOOPBACK, port, ssl=context, server_hostname="b")
    assert await Impostor(reader, writer).refused()


async def _foreign(pki: Path, tmp: Path, port: int) -> None:
    init_pki(tmp / "foreign", ("a", "b"))
    files = identity(tmp / "foreign", "a")
    assert await (await Impostor.connect(Identity(pki / "ca.pem", files.certificate, files.key), port)).refused()


async def _other_name(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "c"), port)
    impostor.hello()
    assert await impostor.refused()


async def _own_name(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "b"), port)
    impostor.hello(name="b")
    assert await impostor.refused()


async def _other_name_in_hello(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "a"), port)
    impostor.hello(name="c")
    assert await impostor.refused()


async def _beat_before_hello(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "a"), port)
    impostor.say(Beat(1, 0, 0, ()), 1)
    assert await impostor.refused()


async def _silent(pki: Path, tmp: Path, port: int) -> None:
    assert await (await Impostor.connect(identity(pki, "a"), port)).refused()


async def _silent_without_tls(pki: Path, tmp: Path, port: int) -> None:
    assert await Impostor(*await asyncio.open_connection(LOOPBACK, port)).refused()


async def _plain_http(pki: Path, tmp: Path, port: int) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    writer.write(b"GET / HTTP/1.1\r\n\r\n")
    assert await Impostor(reader, writer).refused()


async def _other_version(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "a"), port)
    impostor.writer.write(messages.encode(Bye("x"), 1).replace(b'"v":2', b'"v":1'))
    assert await impostor.refused()


async def _huge_hello(pki: Path, tmp: Path, port: int) -> None:
    impostor = await Impostor.connect(identity(pki, "a"), port)
    impostor.writer.write(struct.pack("!I", 65_537) + b" " * 65_537)
    assert await impostor.refused()


# Who is waited for in vain, by which of the link's times. All others are to be refused for what they are.
IN_VAIN: dict[Stranger, str] = {_silent: "HELLO_TIMEOUT", _silent_without_tls: "OPEN_TIMEOUT"}


@pytest.mark.parametrize(
    ("stranger", "kind", "detail"),
    [
        (_no_certificate, "certificate", "did not return a certificate"),
        (_foreign, "certificate", "CERTIFICATE_VERIFY_FAILED"),
        (_other_name, "name", "certificate of c instead of a"),
        (_own_name, "name", "certificate of b instead of a"),
        (_other_name_in_hello, "name", "hello of c instead of a"),
        (_beat_before_hello, "malformed", "beat before hello"),
        (_silent, "timeout", "no hello in time"),
        (_silent_without_tls, "timeout", "no TLS in time"),
        (_plain_http, "malformed", "HTTP_REQUEST"),
        (_other_version, "version", "version 1 instead of 2"),
        (_huge_hello, "oversized", "announced 65537 bytes"),
    ],
)
def test_a_stranger_is_refused_counted_and_logged(
    pki: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    stranger: Stranger,
    kind: str,
    detail: str,
) -> None:
    for name in ("OPEN_TIMEOUT", "HELLO_TIMEOUT"):
        monkeypatch.setattr(link_module, name, 0.3 if name == IN_VAIN.get(stranger) else PATIENCE)

    async def run() -> None:
        async with listener(pki) as b:
            await stranger(pki, tmp_path, b.link.port)
            await until(lambda: b.link.refused.counts[kind] == 1)
            assert sum(b.link.refused.counts.values()) == 1
            assert b.events == []
            async with connector(pki, b.link.port):  # and the right one gets in
                await b.up()

    caplog.set_level(logging.WARNING)
    asyncio.run(run())
    assert re.search(rf"refused kind={kind} source=127\.0\.0\.1 detail=.*{detail}", caplog.text)


def test_a_certificate_of_the_right_ca_that_is_over_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expired(tmp_path, "a", "b")

    async def run() -> None:
        async with listener(tmp_path) as b:  # its own is over, too, so the impostor does not look at it
            context = identity(tmp_path, "a").client_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            impostor = Impostor(*await asyncio.open_connection(LOOPBACK, b.link.port, ssl=context))
            assert await impostor.refused()
            await until(lambda: b.link.refused.counts["certificate"] == 1)
            assert b.events == []

    asyncio.run(run())
    assert "certificate has expired" in caplog.text


def test_a_server_with_another_name_or_ca_is_not_talked_to(pki: Path, tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"))

    async def run(files: Identity) -> None:
        impostor = Recorded("b", "a", files)  # it would let a in
        impostor.link.start()
        async with connector(pki, impostor.link.port) as a:
            await until(lambda: a.link.refused.counts["certificate"] >= 1)
            assert a.events == []
        assert impostor.count("up") == 0
        await impostor.link.stop("over")

    asyncio.run(run(identity(pki, "c")))
    asyncio.run(run(identity(tmp_path, "b")))


# ---- what ends a session ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        (messages.encode(Settled(1), 2), "replay"),  # number 2 again
        (messages.encode(Settled(1), 4), "replay"),  # 3 is missing
        (messages.encode(Settled(1), 3).replace(b'"v":2', b'"v":9'), "version"),
        (messages.encode(Hello("a", "5e" * 16, 2, 0, ()), 3), "malformed"),  # a second hello
        (b"\0\0\0\4null", "malformed"),
        (b"\0\0\0\0", "malformed"),
        (b"\0\1\0\1", "oversized"),
        (b"\x16\x03\x01\x00", "oversized"),
    ],
)
def test_a_bad_message_ends_the_session_and_is_not_handed_on(pki: Path, bad: bytes, kind: str) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            impostor = await Impostor.connect(identity(pki, "a"), b.link.port)
            impostor.hello()
            impostor.say(Settled(7), 2)
            impostor.writer.write(bad + messages.encode(Settled(8), 3))
            assert await impostor.refused()
            await b.down()
            assert b.messages == [Settled(7)]
            assert b.link.refused.counts[kind] == 1
            assert not b.link.connected

    asyncio.run(run())


def test_a_peer_that_falls_silent_is_dropped(pki: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "IDLE_MIN", 0.3)

    async def run() -> None:
        async with listener(pki, interval_s=0.001) as b:
            impostor = await Impostor.connect(identity(pki, "a"), b.link.port)
            impostor.hello()
            await b.up()
            impostor.writer.write(messages.encode(Settled(1), 2)[:9])  # half a message does not keep it alive
            assert await impostor.refused()
            await b.down()
            assert b.link.refused.counts["timeout"] == 1

    asyncio.run(run())


def test_a_peer_that_does_not_read_is_dropped(pki: Path) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            impostor = await Impostor.connect(identity(pki, "a"), b.link.port)
            impostor.hello()
            await b.up()
            impostor.writer.transport.pause_reading()  # type: ignore[attr-defined]
            sent = 0
            while b.link.send(Bye("x" * 1000)):
                sent += 1
                assert sent < 20_000  # 20 MB: nothing bounds it
                if sent % 100 == 0:
                    await asyncio.sleep(0)
            await b.down()

    asyncio.run(run())


def test_a_new_session_takes_the_place_of_the_old_one(pki: Path) -> None:
    """The peer's host was cut off and has begun anew; the old connection hangs, and may come back to life."""

    async def run() -> None:
        async with listener(pki) as b:
            old = await Impostor.connect(identity(pki, "a"), b.link.port)
            old.hello(connection=4)
            await b.up()
            new = await Impostor.connect(identity(pki, "a"), b.link.port)
            new.hello(connection=5)
            await b.up(2)
            assert [kind for kind, _ in b.events] == ["up", "down", "up"]
            with contextlib.suppress(OSError):
                old.say(Settled(1), 2)
            assert await old.refused()
            new.say(Settled(2), 2)
            await b.until(lambda: bool(b.messages))
            assert b.messages == [Settled(2)]
            assert b.link.connected

    asyncio.run(run())


@pytest.mark.parametrize("connection", [4, 5])
def test_a_connection_that_was_begun_before_the_present_one_comes_too_late(pki: Path, connection: int) -> None:
    async def run() -> None:
        async with listener(pki) as b:
            present = await Impostor.connect(identity(pki, "a"), b.link.port)
            present.hello(connection=5)
            await b.up()
            late = await Impostor.connect(identity(pki, "a"), b.link.port)
            late.hello(connection=connection)
            assert await late.refused()
            assert b.link.refused.counts["replay"] == 1
            present.say(Settled(2), 2)
            await b.until(lambda: b.messages == [Settled(2)])
            # But a service that was started anew counts from 1 again.
            restarted = await Impostor.connect(identity(pki, "a"), b.link.port)
            restarted.hello(session="11" * 16, connection=1)
            await b.up(2)

    asyncio.run(run())


# ---- crowds ----------------------------------------------------------------------------------------------------------


def test_a_crowd_of_strangers_does_not_keep_the_peer_out(pki: Path) -> None:
    """Connections from elsewhere that say nothing: a few are waited for, the peer's address has places of its own."""

    async def run() -> None:
        async with listener(pki) as b:
            crowd = []
            for _ in range(3 * link_module.HALF_OPEN):
                reader, writer = await asyncio.open_connection(LOOPBACK, b.link.port, local_addr=("127.0.0.2", 0))
                crowd.append(Impostor(reader, writer))
            await until(lambda: b.link.refused.counts["surplus"] == 2 * link_module.HALF_OPEN)
            async with connector(pki, b.link.port) as a:
                await a.up()
                assert b.link._half_open[False] == link_module.HALF_OPEN
            for one in crowd:
                one.writer.close()
            await until(lambda: b.link._half_open == {True: 0, False: 0})

    asyncio.run(run())


def test_refusals_are_logged_once_a_minute_and_kind(caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    refused = Refusals(logging.getLogger("test"), clock=lambda: now[0])
    for _ in range(100):
        refused.note("certificate", "192.0.2.9", "expired")
    refused.note("name", "192.0.2.9", "c")
    now[0] = QUIET_NS
    refused.note("certificate", "192.0.2.9", "expired")
    assert refused.counts["certificate"] == 101
    assert [record.message for record in caplog.records] == [
        "refused kind=certificate source=192.0.2.9 detail=expired",
        "refused kind=name source=192.0.2.9 detail=c",
        "refused kind=certificate source=192.0.2.9 detail=expired unsaid_before=99",
    ]
