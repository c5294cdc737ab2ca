"""The command line: usage, exit codes, and commands that need no dataplane."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf import cli
from coloebpf.cli import main
from coloebpf.errors import ColoError
from coloebpf.lab import needs
from coloebpf.lab.plan import LabPlan
from tests.lab.conftest import CLI, coloebpf
from tests.nobody import AS_NOBODY, need_nobody

Wires = Callable[..., LabPlan]


@pytest.mark.parametrize(
    "words",
    [
        "",
        "lab",
        "lab nonsense",
        "lab up --guests some",
        "lab up --nics 0",
        "lab up --nics 65",
        "lab up --nics two",
        "lab up --mtu 1400",
        "lab up --name ../x",
        "lab up --guests none -- true",
        "lab up --guests qemu -- true",
        "lab up --guests qemu --bare",
        "lab up --bare --unprotected",
        "lab up --",
        "lab exec pvm",
        "lab exec pvm --",
        "lab exec lan -- true",
        "lab exec -- true",
        "lab status -- true",
        "lab down --name A",
        "lab agent",
    ],
)
def test_wrong_usage_exits_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    assert "usage: coloebpf" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["status", "status --json", "checkpoint", "exec client -- true"])
def test_a_lab_that_is_not_there_is_one_sentence(words: str, lab_name: str) -> None:
    command, *rest = words.split()
    done = coloebpf("lab", command, "--name", lab_name, *rest)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (f"coloebpf: there is no lab '{lab_name}'; make one with coloebpf lab up --name {lab_name}\n")


def test_down_can_be_repeated(lab_name: str) -> None:
    done = coloebpf("lab", "down", "--name", lab_name)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"there was no lab '{lab_name}'\n", "")


@pytest.mark.lab
@pytest.mark.parametrize("code", [0, 1, 42])
def test_exec_passes_on_the_exit_code(wires: Wires, code: int) -> None:
    plan = wires()
    done = coloebpf("lab", "exec", "--name", plan.name, "svm", "--", "sh", "-c", f"echo out; echo err >&2; exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, "out\n", "err\n")


@pytest.mark.lab
def test_exec_enters_the_network_namespace_alone(wires: Wires) -> None:
    plan = wires()
    script = 'readlink /proc/self/ns/mnt; stat -f -c %T /sys/fs/bpf; ls /proc/sys/net/ipv4/conf; echo -- "$@"'
    done = coloebpf(
        "lab", "exec", "--name", plan.name, "primary", "--", "sh", "-c", script, "sh", "--", "a b", "--json"
    )
    mounts, kind, *rest = done.stdout.splitlines()
    assert mounts == os.readlink("/proc/self/ns/mnt")
    assert kind == "bpf_fs"
    assert {"vif1.0", "fwd0", "br0"} <= set(rest)
    assert rest[-1] == "-- -- a b --json"


@pytest.mark.lab
def test_exec_of_nothing_known_is_one_sentence(wires: Wires) -> None:
    plan = wires()
    done = coloebpf("lab", "exec", "--name", plan.name, "pvm", "--", "no-such-program")
    assert done.returncode == 1
    assert done.stderr == "coloebpf: can't run no-such-program on pvm: No such file or directory\n"


def lacking(tmp_path: Path, what: str) -> dict[str, str]:
    """The environment of a machine that lacks a piece."""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    if what == "bcc":
        (tmp_path / "bcc.py").write_text("raise ImportError('No module named bcc')\n")
        return environment
    for tool in {"ethtool", "ip", "redis-server", "redis-benchmark", *needs.VIRTUAL} - {what}:
        (tmp_path / tool).symlink_to("/bin/true")
    return {**environment, "PATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("command", "what", "words"),
    [
        ("show", "qemu-system-x86_64", "qemu-system-x86_64 not found: apt-get install qemu-system-x86"),
        ("show", "cpio", "cpio not found: apt-get install cpio"),
        ("up", "bcc", "bcc"),
        ("show", "bcc", "bcc"),
        ("up", "ethtool", "ethtool not found: apt-get install ethtool"),
        ("show", "ethtool", "ethtool not found: apt-get install ethtool"),
        ("show --guests process", "redis-benchmark", "redis-benchmark not found: apt-get install redis-tools"),
    ],
)
def test_a_missing_piece_is_a_sentence_before_anything_is_made(
    lab_name: str, tmp_path: Path, command: str, what: str, words: str
) -> None:
    done = subprocess.run(
        [*CLI, "lab", *command.split(), "--name", lab_name],
        env=lacking(tmp_path, what),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("coloebpf: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not LabPlan(lab_name).run_dir.exists()


def test_without_root_up_is_a_sentence(lab_name: str) -> None:
    need_nobody()
    done = subprocess.run(
        [*AS_NOBODY, *CLI, "lab", "up", "--name", lab_name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("coloebpf: coloebpf must run as root")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_nobody_reads_is_no_traceback(lab_name: str, unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*CLI, "lab", "down", "--name", lab_name],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ColoError("no such thing"), 1, "coloebpf: no such thing\n"),
        (KeyboardInterrupt(), 130, "coloebpf: interrupted\n"),
        (
            PermissionError(13, "Permission denied", "/run/x"),
            1,
            "coloebpf: /run/x: Permission denied; run it as root\n",
        ),
        (
            PermissionError(13, "Permission denied", b"/run/x"),
            1,
            "coloebpf: /run/x: Permission denied; run it as root\n",
        ),
        (
            PermissionError(1, "Operation not permitted"),
            1,
            "coloebpf: the kernel: Operation not permitted; run it as root\n",
        ),
        (KeyError("vif"), 70, "coloebpf: a mistake of coloebpf's own: KeyError: 'vif' (test_lab_cli.py:"),
    ],
)
def test_an_error_is_a_sentence_and_a_code(
    error: BaseException, code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", run)
    monkeypatch.delenv(cli.DEBUG, raising=False)
    assert main(["lab"]) == code
    said = capsys.readouterr().err
    assert said.startswith(words)
    assert len(said.splitlines()) == 1


def test_help_needs_neither_bcc_nor_pyroute2() -> None:
    code = "import sys; from coloebpf.cli import main; main(['lab', 'up', '--name', '?'])"
    heavy = "sys.exit(bool({'bcc', 'pyroute2', 'rich', 'prometheus_client'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\ntry:\n  {code}\nexcept SystemExit: pass\n{heavy}"],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0
