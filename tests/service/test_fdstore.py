"""What is told to systemd, byte for byte, and what comes back from it."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf.errors import ConfigError, NotifyError
from coloebpf.service.fdstore import SEND_TIMEOUT_S, Kept, Notifier, taken_back, watchdog_period_s
from tests.service.fake_systemd import FakeSystemd


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    manager = FakeSystemd(tmp_path)
    yield manager
    manager.close()


def test_each_word_is_one_datagram_of_lines(systemd: FakeSystemd) -> None:
    notifier = Notifier(systemd.address, clock=lambda: 1_234_567_890)
    assert notifier.active
    notifier.ready("2 pairs")
    notifier.reloading()
    notifier.ready()
    notifier.watchdog()
    notifier.status("pair web:\n lockstep")
    notifier.stopping()
    systemd.hear()
    assert systemd.told == [
        ["READY=1", "STATUS=2 pairs"],
        ["RELOADING=1", "MONOTONIC_USEC=1234567"],
        ["READY=1"],
        ["WATCHDOG=1"],
        ["STATUS=pair web: lockstep"],
        ["STOPPING=1"],
    ]


def test_a_kept_socket_is_the_same_one_and_is_dropped_by_name(systemd: FakeSystemd) -> None:
    notifier = Notifier(systemd.address)
    left, right = socket.socketpair()
    with left, right:
        assert notifier.keep("libxl-colo.web", left.fileno())
        assert notifier.keep("libxl-colo.db", right.fileno())
        systemd.hear()
        assert systemd.told[0] == ["FDSTORE=1", "FDNAME=libxl-colo.web", "FDPOLL=0"]
        assert [(name, os.fstat(fd).st_ino) for name, fd in systemd.kept] == [
            ("libxl-colo.web", os.fstat(left.fileno()).st_ino),
            ("libxl-colo.db", os.fstat(right.fileno()).st_ino),
        ]
        notifier.drop("libxl-colo.web")
        systemd.hear()
        assert systemd.told[-1] == ["FDSTOREREMOVE=1", "FDNAME=libxl-colo.web"]
        assert [name for name, _ in systemd.kept] == ["libxl-colo.db"]


def test_an_abstract_address() -> None:
    name = f"coloebpf-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name)
        Notifier("@" + name).watchdog()
        assert manager.recv(100) == b"WATCHDOG=1"


def test_systemd_notify_says_it_in_the_same_bytes(systemd: FakeSystemd) -> None:
    """systemd's own command, where it is installed, as the reference for the lines."""
    try:
        subprocess.run(
            ["systemd-notify", "--no-block", "--ready", "--status=fine"],
            env={"NOTIFY_SOCKET": systemd.address, "PATH": os.environ["PATH"]},
            check=True,
        )
    except FileNotFoundError:
        pytest.skip("systemd-notify is not installed")
    Notifier(systemd.address).ready("fine")
    systemd.hear()
    assert systemd.told[0] == systemd.told[-1]


def test_without_systemd_nothing_is_sent_and_nothing_is_kept() -> None:
    notifier = Notifier.from_environment({})
    assert not notifier.active
    notifier.ready()
    notifier.drop("x")
    assert not notifier.keep("x", 0)


@pytest.mark.parametrize(
    ("address", "error"), [("relative", ConfigError), ("vsock:2:1", ConfigError), ("/nowhere/at/all", NotifyError)]
)
def test_an_address_of_no_use_is_refused(address: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=address):
        Notifier.from_environment({"NOTIFY_SOCKET": address})


@pytest.mark.parametrize("name", ["", "two words", "a:b", "a\nb", "x" * 256, "ä"])
def test_names_that_systemd_would_not_take(systemd: FakeSystemd, name: str) -> None:
    with pytest.raises(ConfigError, match="can't name"):
        Notifier(systemd.address).keep(name, 0)


def test_a_systemd_that_does_not_read_stops_nobody(systemd: FakeSystemd) -> None:
    notifier = Notifier(systemd.address)
    slowest, kept = 0.0, True
    for _ in range(2000):  # net.unix.max_dgram_qlen is 10 to 512
        start = time.monotonic()
        kept = notifier.keep("x", 0)
        slowest = max(slowest, time.monotonic() - start)
        if not kept:
            break
    assert not kept, "the queue never filled: the test has no point"
    assert slowest < SEND_TIMEOUT_S + 1.0


def test_what_is_kept_comes_back_in_a_new_process_and_not_in_its_children(systemd: FakeSystemd) -> None:
    left, right = socket.socketpair()
    with left, right:
        Notifier(systemd.address).keep("libxl-colo.web", left.fileno())
        systemd.hear()
        script = (
            "import os, sys; from coloebpf.service.fdstore import taken_back\n"
            "kept, = taken_back()\n"
            "assert not any(key.startswith('LISTEN_') for key in os.environ)\n"
            "assert not os.get_inheritable(kept.fd)\n"
            "with kept.socket() as s: s.send(kept.name.encode())\n"
        )
        assert systemd.start("-c", script).wait(30) == 0
        assert right.recv(100) == b"libxl-colo.web"
        assert len(systemd.kept) == 1, "it is still kept, for the next one"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "77", "LISTEN_FDS": "many"},
        {"LISTEN_PID": "77", "LISTEN_FDS": "0"},
    ],
)
def test_variables_for_somebody_else_give_nothing_and_are_removed(environ: dict[str, str]) -> None:
    assert taken_back(environ, pid=77) == []
    assert environ == {}


def test_a_kept_descriptor_that_is_no_socket_is_an_error() -> None:
    read_end, write_end = os.pipe()
    kept = Kept("libxl-colo.web", read_end)
    with pytest.raises(NotifyError, match=r"libxl-colo\.web.*no socket"):
        kept.socket()
    kept.close()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(read_end)
    os.close(write_end)


@pytest.mark.parametrize(
    ("environ", "period"),
    [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "20000000"}, 10.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "77"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "78"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ],
)
def test_the_watchdog_is_fed_twice_as_often_as_it_must(environ: dict[str, str], period: float) -> None:
    assert watchdog_period_s(environ, pid=77) == period
