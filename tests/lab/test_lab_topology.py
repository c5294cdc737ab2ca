"""Namespaces, devices and processes of a lab, without the dataplane."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from coloebpf.errors import LabError
from coloebpf.lab import commands, guests, state, topology
from coloebpf.lab.plan import NODES, LabPlan
from coloebpf.netns import inside
from tests.lab.service_lab import until

pytestmark = pytest.mark.lab
Wires = Callable[..., LabPlan]
ETH_P_ALL = 3


def remains(name: str) -> list[str]:
    """Whatever is left of a lab anywhere."""
    plan = LabPlan(name)
    spaces = [str(path) for path in Path("/run/netns").glob(f"colo-{name}-*")]
    return spaces + [str(path) for path in (plan.run_dir, plan.pin_base) if path.exists()]


def ethernet(namespace: str, device: str = "eth0") -> socket.socket:
    with inside(namespace):
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        port.bind((device, ETH_P_ALL))
        return port


def device_rows(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["node"], row["name"]): row for row in record["devices"]}


@pytest.mark.parametrize("vlan", [False, True])
def test_the_record_tells_each_device_as_it_is(wires: Wires, vlan: bool) -> None:
    plan = wires(nics=2, vlan=vlan, mtu=9000)
    record = json.loads((plan.run_dir / "lab.json").read_text())
    rows = device_rows(record)
    forward = {("primary", "fwd0"), ("secondary", "fwd0")}
    if not vlan:
        forward |= {("primary", "fwd1"), ("secondary", "fwd1")}
    assert {key for key in rows if key[1].startswith("fwd")} == forward
    for (node, name), row in rows.items():
        assert row["namespace"] == record["namespaces"][node] == plan.namespace(node)
        with inside(row["namespace"]):
            assert socket.if_nametoindex(name) == row["ifindex"]
        assert row["mtu"] == (9008 if name.startswith(("fwd", "wire", "wp", "ws")) else 9000)
    assert rows["pvm", "eth1"]["mac"] == rows["svm", "eth1"]["mac"] == record["nics"][1]["mac"]
    assert rows["client", "eth0"]["mac"] == record["client_mac"]


def test_bare_ports_are_silent_and_joined(wires: Wires) -> None:
    plan = wires()
    assert [row["addresses"] for row in topology.describe_devices(plan)] == [[]] * len(topology.describe_devices(plan))
    client, pvm, svm = (ethernet(plan.namespace(node)) for node in ("client", "pvm", "svm"))
    frame = bytes.fromhex("02c010010001 02c010000000 88b5") + bytes(range(50))
    with client, pvm, svm:
        client.settimeout(1.5)  # longer than the random delay of an MLD report or a duplicate address check
        with pytest.raises(TimeoutError):
            client.recv(2048)
        client.settimeout(20)
        pvm.send(frame)
        assert client.recv(2048) == frame


def test_bare_ports_answer_nothing(wires: Wires) -> None:
    plan = wires()
    nic = plan.nic_list()[0]
    question = (
        bytes.fromhex("ffffffffffff 02c010010001 0806 0001 0800 06 04 0001 02c010010001")
        + socket.inet_aton(nic.client_v4)
        + bytes(6)
        + socket.inet_aton(nic.guest_v4)
    )
    with ethernet(plan.namespace("client")) as client, ethernet(plan.namespace("pvm")) as pvm:
        client.send(question)
        pvm.settimeout(20)
        assert pvm.recv(2048).startswith(question)
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            client.recv(2048)


def test_malformed_packets_pass_the_bridges(wires: Wires) -> None:
    plan = wires()
    frame = bytes.fromhex("02c010010001 02c010000000 0800 4f00 ffff") + bytes(
        60
    )  # IPv4, header and length past its end
    with ethernet(plan.namespace("client")) as client, ethernet(plan.namespace("pvm")) as pvm:
        client.settimeout(20)
        pvm.send(frame)
        assert client.recv(2048) == frame


def test_process_guests_share_addresses_and_know_the_client(wires: Wires) -> None:
    plan = wires(guests="process", nics=2)
    rows = device_rows(state.describe(plan))
    for number, nic in enumerate(plan.nic_list()):
        pvm, svm = rows["pvm", f"eth{number}"], rows["svm", f"eth{number}"]
        assert sorted(pvm["addresses"]) == sorted(svm["addresses"])
        assert {f"{nic.guest_v4}/24", f"{nic.guest_v6}/64"} <= set(pvm["addresses"])
        assert {f"{nic.client_v4}/24", f"{nic.client_v6}/64"} <= set(rows["client", "eth0"]["addresses"])
    with topology.netlink(plan.namespace("svm")) as route:
        known = {(entry.get("dst"), entry["state"], entry.get("lladdr")) for entry in route.get_neighbours()}
    assert (plan.nic_list()[0].client_v4, topology.NUD_PERMANENT, plan.client().mac) in known


def test_hosts_have_no_addresses(wires: Wires) -> None:
    plan = wires(guests="process")
    rows = topology.describe_devices(plan)
    assert [row for row in rows if row["node"] in ("lan", "primary", "secondary") and row["addresses"]] == []


def test_each_guest_runs_the_command_in_a_directory_of_its_own(wires: Wires) -> None:
    plan = wires(guests="process", command=("sh", "-c", "pwd; echo $TMPDIR; echo trouble >&2; sleep 60"))
    for guest in ("pvm", "svm"):
        home = plan.run_dir / guest
        until(lambda: len(guests.running(plan, guest)) == 2, f"{guest} has got to its sleep")  # noqa: B023
        assert (home / "stdout.log").read_text() == f"{home}\n{home}\n"
        assert (home / "stderr.log").read_text() == "trouble\n"


def test_down_ends_every_process_also_one_that_ignores_sigterm(wires: Wires) -> None:
    plan = wires(guests="process", command=("sh", "-c", "trap '' TERM; while :; do sleep 1; done"))
    pids = [pid for guest in ("pvm", "svm") for pid in guests.running(plan, guest)]
    with inside(plan.namespace("client")):
        stranger = subprocess.Popen(["sleep", "60"])
    assert commands.down(plan)
    assert stranger.wait(5) == -signal.SIGTERM
    assert [pid for pid in pids if Path(f"/proc/{pid}/ns/net").exists() and not is_zombie(pid)] == []
    assert remains(plan.name) == []


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_down_from_inside_the_lab_spares_itself(wires: Wires) -> None:
    plan = wires()
    with inside(plan.namespace("client")):
        done = subprocess.run(
            [sys.executable, "-m", "coloebpf", "lab", "down", "--name", plan.name], capture_output=True, check=False
        )
    assert (done.returncode, remains(plan.name)) == (0, [])


@pytest.mark.parametrize(
    ("command", "complaint"),
    [(("sh", "-c", "echo no port >&2; exit 3"), "ended with code 3: no port"), (("/nowhere",), "No such file")],
)
def test_a_command_that_fails_at_once_fails_the_lab(
    lab_name: str, command: tuple[str, ...], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "SETTLE", 30)  # on a busy machine "at once" takes a while
    with pytest.raises(LabError, match=complaint):
        commands.up(LabPlan(lab_name, "process", command=command), None)
    assert remains(lab_name) == []


def test_a_command_that_ends_well_is_no_failure(wires: Wires) -> None:
    plan = wires(guests="process", command=("true",))
    until(lambda: guests.running(plan, "pvm") == [], "it ends")


def test_a_second_lab_of_a_name_is_refused_and_the_first_stays(wires: Wires) -> None:
    plan = wires()
    with pytest.raises(LabError, match="already"):
        commands.up(plan, None)
    assert state.load(LabPlan(plan.name)).name == plan.name
    assert len(remains(plan.name)) == len(NODES) + 1


def test_labs_do_not_touch_each_other(wires: Wires) -> None:
    first, second = wires(guests="process"), wires(guests="process")
    assert commands.down(first)
    with ethernet(second.namespace("client")) as client, ethernet(second.namespace("pvm")) as pvm:
        client.settimeout(20)
        pvm.send(bytes.fromhex("02c010010001 02c010000000 88b5") + bytes(46))
        while client.recv(2048)[12:14] != b"\x88\xb5":
            pass


def test_a_name_that_is_part_of_another_is_another(wires: Wires) -> None:
    plan = wires()
    longer = LabPlan(plan.name + "-b")
    try:
        commands.up(longer, None)
        assert commands.down(plan)
        assert state.load(LabPlan(longer.name))
    finally:
        commands.down(longer)


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, LabError, OSError])
def test_a_failing_up_leaves_nothing(lab_name: str, interruption: type[BaseException]) -> None:
    plan = LabPlan(lab_name)

    def bring_up(_: LabPlan) -> None:
        plan.pin_dir("primary").mkdir(parents=True)
        raise interruption

    with pytest.raises(interruption):
        commands.up(plan, bring_up)
    assert remains(lab_name) == []


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, LabError])
def test_a_temporary_lab_is_gone_afterwards(lab_name: str, error: type[BaseException] | None) -> None:
    def use() -> None:
        with commands.temporary(LabPlan(lab_name), None) as record:
            assert (record["name"], len(remains(lab_name))) == (lab_name, len(NODES) + 1)
            if error:
                raise error

    with pytest.raises(error) if error else nullcontext():
        use()
    assert remains(lab_name) == []


def test_an_interruption_that_gets_lost_ends_up_all_the_same(lab_name: str) -> None:
    def bring_up(_: LabPlan) -> None:
        with suppress(KeyboardInterrupt):  # as the interpreter does around callbacks
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        commands.up(LabPlan(lab_name), bring_up)
    assert remains(lab_name) == []


HANGING_UP = """
    import sys, time
    from coloebpf.lab import commands
    from coloebpf.lab.plan import LabPlan

    def bring_up(plan):
        plan.pin_dir("secondary").mkdir(parents=True)
        print("half way", flush=True)
        time.sleep(60)

    commands.up(LabPlan(sys.argv[1]), bring_up)
"""


def half_way(name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HANGING_UP), name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "half way\n"
    return process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_up_leaves_nothing(lab_name: str, signum: signal.Signals) -> None:
    process = half_way(lab_name)
    process.send_signal(signum)
    process.wait(10)
    assert remains(lab_name) == []


def test_down_removes_what_a_killed_up_left(lab_name: str) -> None:
    process = half_way(lab_name)
    process.kill()
    process.wait(10)
    assert len(remains(lab_name)) == len(NODES) + 2
    with pytest.raises(LabError, match="coloebpf lab down --name"):
        commands.up(LabPlan(lab_name), None)
    assert commands.down(LabPlan(lab_name))
    assert remains(lab_name) == []


def test_down_copes_with_a_namespace_that_was_never_finished(lab_name: str) -> None:
    plan = LabPlan(lab_name)
    broken = topology.NETNS_DIR / plan.namespace("pvm")
    topology.NETNS_DIR.mkdir(exist_ok=True)
    broken.touch()
    assert commands.down(plan)
    assert not broken.exists()


def test_down_without_a_lab_finds_nothing(lab_name: str) -> None:
    assert not commands.down(LabPlan(lab_name))


def test_up_and_down_leak_no_file_and_no_process(wires: Wires) -> None:
    commands.down(wires())  # what is opened once and for all
    gc.collect()
    before = open_files(), children()
    commands.down(wires(guests="process", nics=2))
    gc.collect()
    assert (open_files(), children()) == before


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
