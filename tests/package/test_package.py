"""The .deb in a clean Debian 12 root, as an operator meets it: installed, upgraded under a running lab, removed, purged."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.package.conftest import NEXT, Packages, Root

pytestmark = [pytest.mark.package, pytest.mark.slow, pytest.mark.timeout(1800)]

LAB = "package"
CONFIG = "/etc/coloebpf/coloebpf.toml"
LAB_CONFIG = f"/run/coloebpf/lab/{LAB}/primary/coloebpf.toml"
REDIS = ("redis-server", "--port", "6379", "--bind", "*", "--protected-mode", "no", "--save", "", "--appendonly", "no")
# A client that counts on one connection and tells of it: it ends with the first answer that is not the next number.
COUNTING = """\
import socket
connection = socket.create_connection(("10.77.0.10", 6379), timeout=60)
answers = connection.makefile("rb")
number = 0
while True:
    connection.sendall(b"INCR package\\r\\n")
    number += 1
    assert answers.readline() == b":%d\\r\\n" % number, number
    print(number, flush=True)
"""
# What `systemctl restart` does to a lab's services, where no systemd is.
RESTART = """\
import os, signal, sys, time
from coloebpf.lab import guests, services, state
from coloebpf.lab.plan import LabPlan
plan = state.load(LabPlan(sys.argv[1]))
for host in ("primary", "secondary"):
    (old,) = [pid for pid in guests.running(plan, host) if "run" in open(f"/proc/{pid}/cmdline").read().split("\\0")]
    os.kill(old, signal.SIGTERM)
    while os.path.exists(f"/proc/{old}"):
        time.sleep(0.01)
    services.start(plan, host)
    end = time.monotonic() + 60
    while not (services.service_status(plan, host) or {}).get("peer", {}).get("connected"):
        assert time.monotonic() < end, f"the {host}'s new service does not answer"
        time.sleep(0.05)
    print(services.service_status(plan, host)["version"])
"""


def test_lintian_finds_no_error(packages: Packages) -> None:
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error", "--tag-display-limit", "0", str(packages.now)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(root: Root, packages: Packages) -> Iterator[Root]:
    """With the package in it, and a real server to protect."""
    root.must("apt-get", "update", "--quiet")
    root.must(
        "apt-get",
        "install",
        "--yes",
        "--quiet",
        "--no-install-recommends",
        "redis-server",
        "redis-tools",
        "bpftool",
        "man-db",
        "groff-base",
    )
    root.install(packages.now)
    yield root
    root.run("coloebpf", "lab", "down", "--name", LAB)


@pytest.fixture
def lab(installed: Root) -> Iterator[Root]:
    """Two replicas in lock-step under two services."""
    installed.must("coloebpf", "lab", "up", "--name", LAB, "--guests", "process", "--arbiter", "none", "--", *REDIS)
    try:
        yield installed
    finally:
        installed.must("coloebpf", "lab", "down", "--name", LAB)


def test_the_command_is_there_with_its_pages(installed: Root) -> None:
    assert installed.must("coloebpf", "--version").startswith("coloebpf ")
    assert installed.must("groff", "-man", "-ww", "-z", "/dev/null") == ""
    for page, word in (("coloebpf.8", "unprotect"), ("coloebpf.toml.5", "on_service_loss")):
        (file,) = (installed.path / "usr/share/man").rglob(f"{page}.gz")
        inside = "/" + str(file.relative_to(installed.path))
        assert word in installed.must("man", "--local-file", inside)
    words = installed.must(
        "bash", "-c", ". /usr/share/bash-completion/completions/coloebpf; complete -p coloebpf; typeset -p"
    )
    assert "unprotect" in words
    example = "/usr/share/doc/coloebpf/examples/coloebpf.toml"
    assert installed.run("coloebpf", "config", "check", example).returncode in (0, 1)
    assert "Traceback" not in installed.run("coloebpf", "config", "check", example).stderr


def test_the_doctor_finds_all_that_the_package_brings(installed: Root) -> None:
    done = installed.run("coloebpf", "doctor", "--json")
    found = {(row["check"], row["level"]) for row in json.loads(done.stdout)["findings"]}
    for check in ("root", "kernel", "btf", "bpffs", "bcc", "headers"):
        assert (check, "ok") in found, done.stdout
    assert ("config", "fail") in found, "there is none yet"


def test_the_unit_is_enabled_and_waits_for_a_configuration(installed: Root) -> None:
    assert (installed.path / "etc/systemd/system/multi-user.target.wants/coloebpf.service").is_symlink()
    assert f"ConditionPathExists={CONFIG}" in (installed.path / "lib/systemd/system/coloebpf.service").read_text()


def test_the_show_of_the_lab_runs_from_it(installed: Root) -> None:
    done = installed.run("coloebpf", "lab", "show", "--guests", "process", "--name", LAB, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_an_upgrade_under_a_running_lab_breaks_no_connection(lab: Root, packages: Packages) -> None:
    (lab.path / "tmp/restart.py").write_text(RESTART)
    counted = lab.path / "tmp/counted"
    with counted.open("w") as out:
        client = subprocess.Popen(
            ["chroot", str(lab.path), "coloebpf", "lab", "exec", "client", "--name", LAB, "--", "python3", "-c", COUNTING],
            stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        goes_on(counted)
        lab.install(packages.later)
        goes_on(counted)
        versions = lab.must("/usr/bin/python3", "/tmp/restart.py", LAB).split()
        goes_on(counted)
        assert versions == [NEXT, NEXT]
        lab.must("coloebpf", "lab", "checkpoint", "--name", LAB)
        goes_on(counted)
        assert client.poll() is None, counted.read_text()[-500:]
    finally:
        client.terminate()
        client.wait(60)


def goes_on(counted: Path, answers: int = 50) -> None:
    """Returns after so many more answers."""
    before, end = len(counted.read_bytes().splitlines()), time.monotonic() + 90
    while len(counted.read_bytes().splitlines()) < before + answers:
        assert time.monotonic() < end, counted.read_text()[-500:]
        time.sleep(0.05)


def test_it_is_not_removed_from_under_a_protected_guest(lab: Root) -> None:
    shutil.copy(lab.path / LAB_CONFIG[1:], lab.path / CONFIG[1:])
    try:
        done = lab.run("apt-get", "remove", "--yes", "coloebpf")
        assert done.returncode != 0
        assert "pair guest is lockstep: coloebpf unprotect guest first" in done.stdout + done.stderr
        assert lab.must("coloebpf", "--version")
    finally:
        (lab.path / CONFIG[1:]).unlink()
        lab.run("dpkg", "--configure", "--pending")


def test_purged_it_leaves_nothing_behind(root: Root, installed: Root, packages: Packages) -> None:
    root.must("apt-get", "remove", "--yes", "coloebpf")
    assert root.run("coloebpf", "--version").returncode != 0
    root.must("apt-get", "purge", "--yes", "coloebpf")
    left = {path for path in root.files() if "coloebpf" in path and not path.startswith("/var/log/apt")}
    assert left == set()
