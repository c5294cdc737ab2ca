"""The operator's commands: what they print, where, and their exit codes."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from rich.console import Console

from coloebpf.cli import main
from coloebpf.errors import NoServiceError
from coloebpf.service.commands import client, top
from coloebpf.service.commands.text import status_text
from coloebpf.service.status import Status
from coloebpf.units import age
from tests.service.running import Service, running

Output = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.fixture
def service(path: Path) -> Iterator[Service]:
    service = Service()
    with running(path, service):
        yield service


def reply(service: Service) -> dict[str, object]:
    return {"service": service.told.as_dict(), "dataplane": service.maps, "dataplane_error": ""}


# ---- usage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "nonsense",
        "status web",
        "status --jso",
        "checkpoint",
        "checkpoint web db",
        "failover --force web",
        "top --interval 0",
        "top --interval x",
        "top --interval nan",
        "top --looks 0",
        "top --looks 1.5",
        "config",
        "config init-pki",
        "config example x",
        "doctor web",
        "status -- true",
    ],
)
def test_wrong_usage_exits_2(words: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert "usage: coloebpf" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["status", "status --json", "top --looks 1", "checkpoint web", "unprotect web"])
def test_without_a_service_the_exit_code_is_3(words: str, path: Path, capsys: Output) -> None:
    assert main([*words.split(), "--socket", str(path)]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"coloebpf: no service answers at {path} (No such file or directory): systemctl start")
    assert len(said.err.splitlines()) == 1


def test_the_help_documents_exit_codes(capsys: Output) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for code in ("0 done", "1 could not", "2 wrong usage", "3 no service", "70 ", "130 ", "141 "):
        assert code in said


# ---- orders ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["checkpoint", "failover", "handover", "protect", "unprotect"])
def test_an_order_is_given_and_its_answer_printed(command: str, path: Path, service: Service, capsys: Output) -> None:
    assert main([command, "web", "--socket", str(path)]) == 0
    assert capsys.readouterr() == (f"{command} of web is done\n", "")
    assert service.orders == [(command, "web")]


def test_protect_to_a_host(path: Path, service: Service, capsys: Output) -> None:
    """Only if that is the other one."""
    assert main(["protect", "web", "--to", "c", "--socket", str(path)]) == 1
    assert capsys.readouterr().err == "coloebpf: the other host is b, not c: see [peer] name\n"
    assert not service.orders
    assert main(["protect", "web", "--to", "b", "--socket", str(path)]) == 0
    assert service.orders == [("protect", "web")]


def test_who_waits_is_told_how_far_it_is(
    path: Path, service: Service, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "WAITING_S", 0.01)
    service.looks_due, service.told.pairs[0].engine_progress = 3, "12 MiB of the guest's memory have arrived"
    assert main(["protect", "web", "--socket", str(path)]) == 0
    said = capsys.readouterr()
    assert said.out == "protect of web is done\n"
    assert said.err == "web: lockstep, 40 checkpoints, 12 MiB of the guest's memory have arrived\n"


def test_an_order_that_is_refused_is_a_sentence(path: Path, service: Service, capsys: Output) -> None:
    assert main(["failover", "mail", "--socket", str(path)]) == 1
    assert capsys.readouterr() == ("", "coloebpf: there is no pair 'mail'; there are web and db\n")


# ---- status ------------------------------------------------------------------------------------------------------------


def test_status_as_json(path: Path, service: Service, capsys: Output) -> None:
    assert main(["status", "--json", "--socket", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == reply(service)


def test_status_as_text(path: Path, service: Service, capsys: Output) -> None:
    assert main(["status", "--socket", str(path)]) == 0
    said = capsys.readouterr().out
    assert said == status_text(reply(service)) + "\n"
    assert max(len(line) for line in said.splitlines()) < 80
    for line in (
        "host a: coloebpf 0.1.0, up 1 d 1 h",
        "  peer        b, connected, heard 20 ms ago, round trip 400 us",
        "  heartbeat   fwd0: LOST, last 5 s ago",
        "  refused     2 certificate, 1 replay",
        "web (pair 3, primary): lockstep for 65 s, epoch 41",
        "  mode        periodic for 5 s: 20 requests in 2 s",
        "  arbiter     etcd, right to speak for 1.5 s more; without the service: hold",
        "  checkpoints 40 (1 initial, 30 divergence, 9 interval), 2 FAILED",
        "  last        97 ms ago, took 12.5 ms; divergence: the bytes differ",
        "  pending     for 3 ms; periodic: 100 ms are over",
        "  UNCOMPARED  NIC 5: udp of the guest's port 123 with 0.0.0.0/0 (exemption)",
        "  UNCOMPARED  NIC 5: ARP (policy)",
        "  NIC 5       vif1.0, forward fwd0 VLAN 7, bridge br0",
        "  dataplane   536 of 65,536 slots and 96 of 4,096 flows used",
        "  WARNING     No heartbeat comes on fwd0.",
    ):
        assert line in said.splitlines()


def test_status_without_a_dataplane_says_why(path: Path, service: Service, capsys: Output) -> None:
    service.maps = None
    assert main(["status", "--socket", str(path)]) == 0
    assert "  dataplane   can't be read: no dataplane is loaded\n" in capsys.readouterr().out


def changed(**fields: object) -> str:
    service = Service()
    for name, value in fields.items():
        setattr(service.told.pairs[0], name, value)
    return status_text(reply(service))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"state": "halted", "state_reason": "the arbiter said no"},
            "web (pair 3, primary): HALTED for 65 s, epoch 41",
        ),
        ({"state_reason": "the arbiter said no"}, "  because     the arbiter said no"),
        ({"alone_pending": True}, "  UNDECIDED   the other host is lost; waiting for arbiter etcd"),
        ({"arbiter_deadline_in_ms": -1.0}, "  arbiter     etcd, right to speak HAS ENDED; without the service: hold"),
        ({"engine_ready": False}, "  engine      model, NOT READY"),
        ({"state_for_ms": 7_500_000}, "web (pair 3, primary): lockstep for 2 h 5 min, epoch 41"),
    ],
)
def test_what_is_wrong_is_loud(fields: dict[str, object], line: str) -> None:
    assert line in changed(**fields).splitlines()


def test_a_host_without_pairs_and_peer() -> None:
    status = Status(host="a", version="1", time=1.0)
    lines = status_text({"service": status.as_dict(), "dataplane": None, "dataplane_error": "x"}).splitlines()
    assert "no pair is configured" in lines
    assert "  peer        none is configured" in lines


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [
        (None, "never"),
        (0.02, "20 us"),
        (119_900, "120 s"),
        (120_000, "2 min 0 s"),
        (3_599_999, "59 min 59 s"),
        (3_600_000, "1 h 0 min"),
        (86_400_000 * 400, "400 d 0 h"),
    ],
)
def test_an_age_in_words(milliseconds: float | None, words: str) -> None:
    assert age(milliseconds) == words


# ---- top ---------------------------------------------------------------------------------------------------------------


def test_top_without_a_terminal_prints_a_line_a_pair_and_look(path: Path, service: Service) -> None:
    out = io.StringIO()

    def pause(seconds: float) -> None:
        assert seconds == 0.5
        service.told.pairs[0].checkpoints["divergence"] += 1000
        assert service.maps
        service.maps["nics"][0]["compared_bytes"] += 1 << 30

    top.run(path, out, 0.5, 2, pause)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0] == (
        "pair web, role pri, state lockstep periodic, epoch 41, ckpt/s -, held 12, p99 2.2e+03 s, "
        "MiB/s -, div/s -, uncmp 2"
    )
    rates = dict(part.split(" ", 1) for part in lines[2].split(", "))
    assert float(rates["ckpt/s"]) > 100
    assert float(rates["MiB/s"]) > 100
    assert rates["div/s"] == "0.0"


def test_top_waits_for_a_service_that_restarts(path: Path) -> None:
    out = io.StringIO()
    ready, stop = threading.Event(), threading.Event()

    def serve() -> None:
        with running(path, Service()):
            ready.set()
            stop.wait(5)

    first = threading.Thread(target=serve)
    first.start()
    assert ready.wait(5)
    looks = 0
    with ExitStack() as second:

        def pause(_: float) -> None:
            nonlocal looks
            looks += 1
            if looks == 1:
                stop.set()
                first.join()
            elif looks == 2:
                second.enter_context(running(path, Service()))

        top.run(path, out, 0.1, 3, pause)
    lines = out.getvalue().splitlines()
    assert [line.startswith("pair ") for line in lines] == [True, True, False, True, True]
    assert f"the service at {path} hung up" in lines[2]


def test_top_without_a_service_at_the_start_ends(path: Path) -> None:
    with pytest.raises(NoServiceError):
        top.run(path, io.StringIO(), 0.1, None)


def test_top_fits_80_columns(service: Service) -> None:
    told = service.told.pairs[1]
    told.name, told.role, told.state, told.epoch, told.alone_pending = (
        "mailserver",
        "secondary",
        "checkpointing",
        99_999,
        True,
    )
    out = io.StringIO()
    table = top._table(top._rows(reply(service), {}, 1.0))
    Console(file=out, width=80).print(table)
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert " UNDECIDED " in lines[2]
    assert "lockstep periodic" in lines[1]


def test_top_on_a_terminal_shows_the_table_and_ctrl_c_ends_it(path: Path, service: Service) -> None:
    terminal, child_end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "coloebpf", "top", "--socket", str(path), "--interval", "0.1"],
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "40"},
        start_new_session=True,
    )
    os.close(child_end)
    shown = b""
    while b"No heartbeat comes on fwd0." not in shown:
        shown += os.read(terminal, 4096)
    process.send_signal(signal.SIGINT)
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # EIO: the other end is closed
        pass
    assert process.wait(10) == 0
    os.close(terminal)
    for words in (b"web", b"lockstep", b"periodic", b"connected"):
        assert words in shown
    assert b"Traceback" not in shown


# ---- config ------------------------------------------------------------------------------------------------------------


def test_the_example_is_a_good_configuration(tmp_path: Path, capsys: Output) -> None:
    assert main(["config", "example"]) == 0
    file = tmp_path / "coloebpf.toml"
    file.write_text(capsys.readouterr().out)
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr() == (f"{file} is good: host a, pairs: web (primary)\n", "")
    assert main(["config", "check", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"mistakes": []}


def test_mistakes_are_lines_and_the_exit_code_is_1(tmp_path: Path, capsys: Output) -> None:
    file = tmp_path / "coloebpf.toml"
    file.write_text('[host]\nname = "a"\nmtu = 1\nmetrics_listen = "x"\n')
    assert main(["config", "check", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert [line.split(" ")[1] for line in said.err.splitlines()] == ["host.metrics_listen", "host.mtu"]
    assert main(["config", "check", str(file), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["mistakes"]
    assert {row["key"] for row in rows} == {"host.metrics_listen", "host.mtu"}
    assert all(row["wrong"] and row["right"] and row["file"] == str(file) for row in rows)


def test_init_pki_makes_files_once(tmp_path: Path, capsys: Output) -> None:
    words = ["config", "init-pki", "a", "b", "--directory", str(tmp_path / "pki")]
    assert main(words) == 0
    said = capsys.readouterr()
    names = {Path(line).name for line in said.out.splitlines()}
    assert names == {"ca.pem", "ca.key", "a.pem", "a.key", "b.pem", "b.key"}
    assert all(Path(line).exists() for line in said.out.splitlines())
    assert "ca.key" in said.err
    assert main(words) == 1
    assert "nothing was overwritten" in capsys.readouterr().err
