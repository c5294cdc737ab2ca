"""The control socket: answers, refusals, limits, permissions, and what is left of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloebpf.errors import BpfError, NoServiceError, ServiceError
from coloebpf.service import control_socket
from coloebpf.service.commands import client
from coloebpf.service.control_socket import ControlSocket
from coloebpf.service.status import Status
from tests.nobody import AS_NOBODY, need_nobody
from tests.service import samples


class Service:
    """A service that does what it is told."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.broken: Exception | None = None
        self.released = asyncio.Event()

    def status(self) -> Status:
        return samples.status()

    def snapshot(self) -> dict[str, Any]:
        if self.broken:
            raise self.broken
        return samples.snapshot()

    def longest_s(self, pair: str) -> float:
        return 0.2 if pair == "slower" else 0.0

    async def checkpoint(self, pair: str) -> str:
        if pair in ("slow", "slower"):
            await self.released.wait()
        return self._note("checkpoint", pair)

    async def failover(self, pair: str) -> str:
        raise ServiceError(f"there is no pair {pair!r}")

    async def handover(self, pair: str) -> str:
        return self._note("handover", pair)

    async def protect(self, pair: str) -> str:
        return self._note("protect", pair)

    async def unprotect(self, pair: str) -> str:
        raise KeyError(pair)

    def _note(self, command: str, pair: str) -> str:
        self.done.append((command, pair))
        return f"{command} of {pair} is done"


@asynccontextmanager
async def serving(
    path: Path, service: Service | None = None, idle_s: float = 5.0, command_s: float = 5.0
) -> AsyncIterator[ControlSocket]:
    service = service or Service()
    server = ControlSocket(path, service, service, idle_s, command_s)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def ask(path: Path, *lines: bytes) -> list[Any]:
    """The answers to lines sent one after the other over one connection, up to its end."""
    reader, writer = await asyncio.open_unix_connection(path)
    answers = []
    for line in lines:
        try:
            writer.write(line)
            answer = await reader.readline()
        except ConnectionError:
            break
        if not answer:
            break
        answers.append(json.loads(answer))
    writer.close()
    return answers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "control.sock"


def test_status_is_the_service_and_the_dataplane(path: Path) -> None:
    async def run() -> None:
        async with serving(path):
            (answer,) = await ask(path, b'{"command": "status"}\n')
        assert answer == {
            "ok": True,
            "result": {"service": samples.status().as_dict(), "dataplane": samples.snapshot(), "dataplane_error": ""},
        }

    asyncio.run(run())


def test_status_without_a_dataplane_says_why(path: Path) -> None:
    async def run() -> None:
        service = Service()
        service.broken = BpfError("no dataplane is loaded")
        async with serving(path, service):
            (answer,) = await ask(path, b'{"command": "status"}\n')
        assert answer["result"]["dataplane"] is None
        assert answer["result"]["dataplane_error"] == "no dataplane is loaded"
        assert answer["result"]["service"]["host"] == "a"

    asyncio.run(run())


def test_orders_are_done_logged_with_who_gave_them_and_answered(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        service = Service()
        async with serving(path, service):
            answers = await ask(
                path, b'{"command": "checkpoint", "pair": "web"}\n', b'{"command": "protect", "pair": "db"}\n'
            )
        assert answers == [
            {"ok": True, "result": "checkpoint of web is done"},
            {"ok": True, "result": "protect of db is done"},
        ]
        assert service.done == [("checkpoint", "web"), ("protect", "db")]

    caplog.set_level(logging.INFO)
    asyncio.run(run())
    assert f"ordered command=checkpoint pair=web uid={os.getuid()} pid={os.getpid()}" in caplog.messages


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\n", "a request is a line of JSON"),
        (b"status\n", "a request is a line of JSON"),
        (b'"\xff"\n', "a request is a line of JSON"),
        (b"[" * 3000 + b"\n", "a request is a "),
        (b"[]\n", 'a request is an object with a "command"'),
        (b'{"command": 1}\n', 'a request is an object with a "command"'),
        (b'{"command": "exit"}\n', "there is no command 'exit'; there are status, checkpoint"),
        (b'{"command": "_note", "pair": "web"}\n', "there is no command '_note'"),
        (b'{"command": "checkpoint"}\n', 'checkpoint needs a "pair"'),
        (b'{"command": "checkpoint", "pair": 1}\n', 'checkpoint needs a "pair"'),
        (b'{"command": "failover", "pair": "nobody"}\n', "there is no pair 'nobody'"),
        (b'{"command": "unprotect", "pair": "web"}\n', "the service made a mistake, see its log"),
    ],
)
def test_what_is_refused_and_the_connection_goes_on(path: Path, line: bytes, words: str) -> None:
    async def run() -> None:
        async with serving(path):
            refused, answered = await ask(path, line, b'{"command": "status"}\n')
        assert refused["ok"] is False
        assert words in refused["error"]
        assert answered["ok"] is True

    asyncio.run(run())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
REQUESTS = st.binary(max_size=200) | st.builds(
    lambda *parts: json.dumps({k: v for k, v in zip(("command", "pair", "x"), parts, strict=True) if v != ""}).encode(),
    st.sampled_from(["status", *control_socket.ORDERS]) | JSON,
    st.just("web") | JSON,
    JSON,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=5))
def test_whatever_is_asked_is_answered_and_the_service_goes_on(requests: list[bytes]) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as where:
            path = Path(where) / "s"
            async with serving(path):
                lines = [request.replace(b"\n", b"") + b"\n" for request in requests]
                answers = await ask(path, *lines, b'{"command": "status"}\n')
        assert len(answers) == len(lines) + 1
        assert answers[-1]["ok"]
        for answer in answers:
            assert set(answer) == ({"ok", "result"} if answer["ok"] else {"ok", "error"})

    asyncio.run(run())


def test_a_line_without_an_end_is_refused_and_ends_the_connection(path: Path) -> None:
    async def run() -> None:
        async with serving(path):
            (answer,) = await ask(path, b"x" * (control_socket.MAX_REQUEST + 1) + b"\n", b'{"command": "status"}\n')
        assert answer == {"ok": False, "error": "a request has at most 4096 bytes"}

    asyncio.run(run())


def test_who_says_nothing_is_cut_off(path: Path) -> None:
    async def run() -> None:
        async with serving(path, idle_s=0.1):
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(b'{"command": ')
            with suppress(ConnectionResetError):
                assert await reader.read() == b""

    asyncio.run(run())


def test_a_command_that_takes_too_long_is_a_sentence(path: Path) -> None:
    async def run() -> None:
        async with serving(path, command_s=0.1):
            (answer,) = await ask(path, b'{"command": "checkpoint", "pair": "slow"}\n')
        assert answer["ok"] is False
        assert answer["error"].startswith("checkpoint of slow was not done after 0.1 s; coloebpf status shows")

    asyncio.run(run())


def test_a_pair_that_needs_longer_gets_it(path: Path) -> None:
    async def run() -> None:
        async with serving(path, command_s=0.1):
            (answer,) = await ask(path, b'{"command": "checkpoint", "pair": "slower"}\n')
        assert answer["error"].startswith("checkpoint of slower was not done after 0.2 s; ")

    asyncio.run(run())


def test_a_slow_command_holds_up_nobody_else(path: Path) -> None:
    async def run() -> None:
        service = Service()
        async with serving(path, service):
            slow = asyncio.create_task(ask(path, b'{"command": "checkpoint", "pair": "slow"}\n'))
            await asyncio.sleep(0)
            assert (await ask(path, b'{"command": "status"}\n'))[0]["ok"]
            assert not slow.done()
            service.released.set()
            assert (await slow)[0]["ok"]

    asyncio.run(run())


def test_too_many_connections_are_told_so(path: Path) -> None:
    async def run() -> None:
        async with serving(path) as server:
            idle = [await asyncio.open_unix_connection(path) for _ in range(control_socket.MAX_CONNECTIONS)]
            while len(server._connections) < len(idle):
                await asyncio.sleep(0.01)
            reader, _ = await asyncio.open_unix_connection(path)
            assert "answers 16 connections at once" in json.loads(await reader.readline())["error"]
            idle[0][1].close()
            while len(server._connections) >= len(idle):
                await asyncio.sleep(0.01)
            assert (await ask(path, b'{"command": "status"}\n'))[0]["ok"]
            for _, writer in idle:
                writer.close()

    asyncio.run(run())


def test_the_socket_is_for_root_and_its_group_alone(path: Path) -> None:
    async def run() -> None:
        async with serving(path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())
        assert not path.exists()

    before = os.umask(0)
    os.umask(before)
    asyncio.run(run())
    assert os.umask(before) == before


def test_the_socket_is_never_open_to_others(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    chmod = Path.chmod

    def noting(self: Path, mode: int) -> None:
        modes.append(stat.S_IMODE(self.stat().st_mode))
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", noting)

    async def run() -> None:
        async with serving(path):
            pass

    asyncio.run(run())
    assert modes == [0o600]


def test_a_socket_that_a_dead_service_left_is_replaced(path: Path) -> None:
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    async def run() -> None:
        async with serving(path):
            assert (await ask(path, b'{"command": "status"}\n'))[0]["ok"]

    asyncio.run(run())


def test_a_second_service_is_refused_and_the_first_goes_on(path: Path) -> None:
    async def run() -> None:
        async with serving(path):
            second = ControlSocket(path, Service(), Service())
            with pytest.raises(ServiceError, match=f"another coloebpf service answers at {path}: stop it first"):
                await second.start()
            assert (await ask(path, b'{"command": "status"}\n'))[0]["ok"]

    asyncio.run(run())


@pytest.mark.parametrize("blocker", ["file", "directory"])
def test_a_path_that_is_taken_is_a_sentence(tmp_path: Path, blocker: str) -> None:
    path = tmp_path / "x" / "control.sock"
    if blocker == "file":
        (tmp_path / "x").touch()
    else:
        path.mkdir(parents=True)

    async def run() -> None:
        with pytest.raises(ServiceError, match=r"can't listen at .*control.sock \(.*\): see \[host\] control_socket"):
            await ControlSocket(path, Service(), Service()).start()

    asyncio.run(run())


# ---- the client's side -------------------------------------------------------------------------------------------------


def asked(path: Path, *arguments: str, **timeout: float) -> Any:
    def work() -> Any:
        with client.connected(path) as service:
            command, *pair = arguments
            return service.ask(command, **timeout, **({"pair": pair[0]} if pair else {}))  # type: ignore[arg-type]

    async def run() -> Any:
        async with serving(path):
            return await asyncio.to_thread(work)

    return asyncio.run(run())


def test_the_client_gets_results(path: Path) -> None:
    assert asked(path, "status")["service"]["host"] == "a"
    assert asked(path, "checkpoint", "web") == "checkpoint of web is done"


def test_the_clients_refusals_are_the_services_words(path: Path) -> None:
    with pytest.raises(ServiceError, match=r"^there is no pair 'nobody'$"):
        asked(path, "failover", "nobody")


def test_a_service_that_hangs_is_a_sentence(path: Path) -> None:
    with pytest.raises(NoServiceError, match=r"did not answer 'checkpoint' in 0.1 s: systemctl status coloebpf"):
        asked(path, "checkpoint", "slow", timeout_s=0.1)


def test_no_service_is_a_sentence(path: Path) -> None:
    words = rf"no service answers at {path} \(No such file or directory\): systemctl"
    with pytest.raises(NoServiceError, match=words), client.connected(path):
        pass


def test_a_service_that_hangs_up_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        with client.connected(path) as service:
            listener.accept()[0].close()
            with pytest.raises(NoServiceError, match="hung up"):
                service.ask("status")


def test_without_the_right_to_connect_is_a_sentence(tmp_path: Path) -> None:
    need_nobody()
    path = tmp_path / "s"
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_mode & 0o005 != 0o005 and parent.is_relative_to("/tmp/pytest-of-root"):
            parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o660)
        listener.listen(1)
        script = f"from pathlib import Path\nfrom coloebpf.service.commands import client\nwith client.connected(Path({str(path)!r})): pass"
        done = subprocess.run(
            [*AS_NOBODY, sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.stderr.splitlines()[-1].endswith(f"{path} is for root and its group alone: run it as root")
