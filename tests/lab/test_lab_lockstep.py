"""The lab with its dataplane: what the commands report while real servers run in lock-step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from coloebpf.lab import guests, redis
from coloebpf.lab.plan import HOSTS, NODES, LabPlan
from tests.lab.conftest import CLI, Lab, LabMaker, coloebpf

pytestmark = pytest.mark.lab
SETTLE = 30.0  # seconds for the last packets of a connection to be proven


@pytest.fixture(scope="module")
def servers(make_module_lab: LabMaker) -> Lab:
    return make_module_lab(guests="process", command=redis.SERVER)


def settled(lab: Lab, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status that meets the condition, or the last one seen."""
    deadline = time.monotonic() + SETTLE
    while not condition(status := lab.status()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return status


@pytest.mark.parametrize("address", ["guest_v4", "guest_v6"])
def test_an_answer_is_compared_and_nothing_stays_held(servers: Lab, address: str) -> None:
    before = servers.nic()
    client = redis.Connection(servers.plan, "client", servers.record["nics"][0][address])
    assert client.ask("SET", "key", "x" * 100_000) == b"OK"
    assert client.ask("GET", "key") == b"x" * 100_000
    client.close()
    status = settled(servers, lambda status: status["nics"][0]["held"] == 0)
    after = status["nics"][0]
    assert after["held"] == 0
    assert after["compared_bytes"] - before["compared_bytes"] >= 100_000
    assert after["mirrored_bytes"] - before["mirrored_bytes"] >= 100_000
    assert sum(after["divergences"].values()) == 0
    assert (status["state"], status["epoch"], status["agent"]) == ("lockstep", 0, True)
    assert {node: len(pids) for node, pids in status["processes"].items()} == {"pvm": 1, "svm": 1}


def test_an_unproven_answer_waits_for_the_checkpoint(make_lab: LabMaker) -> None:
    lab = make_lab(guests="process", command=redis.SERVER)
    nic = lab.plan.nic_list()[0]
    redis.Connection(lab.plan, "client", nic.guest_v4).ask("SET", "key", "one")
    redis.Connection(lab.plan, "svm", "127.0.0.1").ask("SET", "key", "two")
    client = redis.Connection(lab.plan, "client", nic.guest_v4)
    client.send("GET", "key")
    assert client.silent_for(1.0)
    assert lab.nic()["held"] >= 1
    assert sum(lab.nic()["divergences"].values()) >= 1
    assert "divergence" in [event["kind"] for event in lab.events()]
    done = lab.checkpoint()
    assert done["epoch"] == 1
    assert done["flushed"] >= 1
    assert client.answer() == b"one"
    assert lab.status()["epoch"] == 1


@pytest.mark.parametrize(("nics", "vlan", "mtu"), [(2, False, 1500), (2, True, 1500), (1, False, 9000)])
def test_each_nic_is_compared_on_its_own(make_lab: LabMaker, nics: int, vlan: bool, mtu: int) -> None:
    lab = make_lab(guests="process", nics=nics, vlan=vlan, mtu=mtu, command=redis.SERVER)
    for nic in lab.plan.nic_list():
        client = redis.Connection(lab.plan, "client", nic.guest_v4)
        assert client.ask("ECHO", "y" * 20_000) == b"y" * 20_000
        assert lab.nic(nic.nic)["compared_bytes"] >= 20_000
        assert [lab.nic(other)["compared_bytes"] for other in range(nic.nic + 1, nics)] == [0] * (nics - nic.nic - 1)


def test_status_and_checkpoint_read_well(servers: Lab) -> None:
    text = coloebpf("lab", "status", "--name", servers.plan.name).stdout
    assert text.startswith(f"lab '{servers.plan.name}': lockstep, epoch ")
    assert "held now" in text
    assert max(len(line) for line in text.splitlines()) < 80
    text = coloebpf("lab", "checkpoint", "--name", servers.plan.name).stdout
    assert text.startswith("epoch ")


def runs(pid: int) -> bool:
    """Neither gone nor a zombie that its new parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_down_leaves_no_pin_no_process_and_no_namespace(make_lab: LabMaker) -> None:
    lab = make_lab(guests="process", command=redis.SERVER)
    assert all(any(lab.plan.pin_dir(host).iterdir()) for host in HOSTS)
    processes = {pid for node in NODES for pid in guests.running(lab.plan, node)}
    done = coloebpf("lab", "down", "--name", lab.plan.name)
    assert (done.returncode, done.stdout) == (0, f"lab '{lab.plan.name}' is gone\n")
    assert not lab.plan.run_dir.exists()
    assert not lab.plan.pin_base.exists()
    assert list(Path("/run/netns").glob(f"colo-{lab.plan.name}-*")) == []
    assert [pid for pid in processes if runs(pid)] == []
    assert guests.with_arguments(["lab", "agent", "--name", lab.plan.name]) == []


def _claimed(plan: LabPlan) -> bool:
    return plan.run_dir.exists()


def _built(plan: LabPlan) -> bool:
    return (Path("/run/netns") / plan.namespace("svm")).exists()


def _compiles(plan: LabPlan) -> bool:
    return all(plan.pin_dir(host).is_dir() for host in HOSTS)


def _loads(plan: LabPlan) -> bool:
    return any((plan.pin_dir(host) / "settings").exists() for host in HOSTS)


@pytest.mark.parametrize(
    ("stage", "signum"),
    [*((stage, signal.SIGINT) for stage in (_claimed, _built, _compiles, _loads)), (_compiles, signal.SIGTERM)],
)
def test_an_up_interrupted_anywhere_leaves_nothing(
    lab_name: str, signum: signal.Signals, stage: Callable[[LabPlan], bool]
) -> None:
    plan = LabPlan(lab_name)
    process = subprocess.Popen(
        [*CLI, "lab", "up", "--name", lab_name],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not stage(plan):
        assert process.poll() is None
        time.sleep(0.001)
    loaders = [pid for pid in _session(process.pid) if pid != process.pid]
    os.killpg(process.pid, signum)  # as a terminal does: the helpers get it too
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "coloebpf: interrupted\n")
    assert not plan.run_dir.exists()
    assert not plan.pin_base.exists()
    assert list(Path("/run/netns").glob(f"colo-{lab_name}-*")) == []
    deadline = time.monotonic() + SETTLE  # multiprocessing's own helper ends when it finds its parent gone
    while (left := [pid for pid in loaders if runs(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left == []


def _session(leader: int) -> list[int]:
    """The processes of the session that `leader` began."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ProcessLookupError):
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


@pytest.mark.slow
def test_the_show_holds(lab_name: str) -> None:
    done = coloebpf("lab", "show", "--guests", "process", "--name", lab_name, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert "there was a divergence, as there should be" in done.stdout
    assert not LabPlan(lab_name).run_dir.exists()


def test_up_prints_one_object(make_lab: LabMaker) -> None:
    lab = make_lab()
    record = lab.record
    assert set(record["namespaces"]) == set(NODES)
    assert {(row["node"], row["name"]) for row in record["devices"]} >= {
        ("client", "eth0"),
        ("primary", "vif1.0"),
        ("primary", "fwd0"),
        ("pvm", "eth0"),
        ("svm", "eth0"),
    }
    assert json.loads((lab.plan.run_dir / "lab.json").read_text()) == record
    assert all(Path(record["pins"][host]).is_dir() for host in HOSTS)
