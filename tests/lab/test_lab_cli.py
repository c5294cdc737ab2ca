"""The command line: usage, exit codes, and commands that need no dataplane."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from coloebpf.cli import main
from coloebpf.lab.plan import LabPlan
from tests.lab.conftest import coloebpf

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
