"""`coloebpf doctor`: each check finds what it is for, says what to do, and is content with a good host."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from coloebpf import netdev
from coloebpf.cli import main
from coloebpf.model import Role, Sizes
from coloebpf.netns import inside
from coloebpf.preflight import Preflight
from coloebpf.service import doctor
from coloebpf.service.checks import guest, link, live, machine, network
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import ArbiterConfig, CommandConfig, Config, EtcdConfig, LibxlDisk, parse
from coloebpf.service.config_example import example
from coloebpf.service.config_keys import Address
from coloebpf.service.doctor import CHECKS, CONFIGURED, Row
from coloebpf.service.peer import pki
from tests.service.running import Service, running

RELEASE = "6.1.0-56-amd64"
NOW = 1_700_000_000.0
MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: {} kB\n"


def write(root: Path, name: str, text: str = "") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine on which all is well."""
    root = tmp_path / "root"
    write(root, "proc/self/mounts", "bpf /sys/fs/bpf bpf rw 0 0\n")
    write(root, "proc/meminfo", MEMINFO.format(4_000_000))
    write(root, "sys/kernel/btf/vmlinux")
    write(root, f"lib/modules/{RELEASE}/build/include/generated/autoconf.h")
    write(root, machine.CLOCK_FILE.lstrip("/"), "tsc\n")
    for tool in ("ethtool", "bpftool", "xl"):
        write(root, f"bin/{tool}").chmod(0o755)
    return root


def host(root: Path, config: Config | None = None) -> Host:
    return Host(now=NOW, root=root, euid=0, release=RELEASE, load=ModuleType, path=str(root / "bin"), config=config)


def example_config() -> Config:
    return parse(example(), Path("example"))


def with_pair(config: Config, **changes: object) -> Config:
    (pair,) = config.pairs
    return dataclasses.replace(config, pairs=(dataclasses.replace(pair, **changes),))  # type: ignore[arg-type]


def with_nic(config: Config, **changes: object) -> Config:
    (nic,) = config.pairs[0].nics
    return with_pair(config, nics=(dataclasses.replace(nic, **changes),))  # type: ignore[arg-type]


def levels(findings: Iterator[Finding]) -> list[str]:
    return [finding.level for finding in findings]


# ---- the machine -------------------------------------------------------------------------------------------------------

Change = Callable[[Path], object]


def unlinked(name: str) -> Change:
    return lambda root: (root / name).unlink()


def written(name: str, text: str) -> Change:
    return lambda root: write(root, name, text)


def rows(root: Path, **changes: object) -> list[Row]:
    found = doctor.examine(root / "none.toml", dataclasses.replace(host(root), **changes))  # type: ignore[arg-type]
    return [row for row in found if row.check not in ("config", "clock") or "source" in row.text]


def test_a_good_machine_has_nothing_but_ok(root: Path) -> None:
    assert {row.level for row in rows(root)} == {OK}
    assert {row.check for row in rows(root)} == {name for name, _ in CHECKS}


@pytest.mark.parametrize(
    ("check", "level", "change", "text", "advice"),
    [
        ("btf", FAIL, unlinked("sys/kernel/btf/vmlinux"), "no BTF", ""),
        ("bpffs", WARN, written("proc/self/mounts", "proc /proc proc rw 0 0\n"), "no bpf file system", "/etc/fstab"),
        ("headers", FAIL, lambda root: (root / "lib").rename(root / "gone"), "no kernel headers", ""),
        ("tools", FAIL, unlinked("bin/ethtool"), "ethtool is missing", "apt-get install ethtool"),
        ("tools", WARN, unlinked("bin/bpftool"), "bpftool is missing", "apt-get install bpftool"),
        ("memory", WARN, written("proc/meminfo", MEMINFO.format(100_000)), "97 MiB are available", "dom0_mem="),
        ("clock", WARN, written(machine.CLOCK_FILE.lstrip("/"), "hpet\n"), "clock source hpet is slow", "clocksource="),
        ("memory", WARN, unlinked("proc/meminfo"), "can't be checked (", "run it as root"),
    ],
)  # fmt: skip
def test_a_machine_that_lacks_something(
    root: Path, check: str, level: str, change: Change, text: str, advice: str
) -> None:
    change(root)
    (row,) = [row for row in rows(root) if row.level != OK]
    assert (row.check, row.level) == (check, level)
    assert text in row.text
    assert advice in row.advice


@pytest.mark.parametrize(
    ("changes", "check", "text"),
    [
        ({"euid": 1000}, "root", "must run as root"),
        ({"release": "4.19.0-27-amd64"}, "kernel", "kernel 4.19.0-27-amd64 is too old"),
    ],
)
def test_a_machine_that_will_not_do(root: Path, changes: dict[str, object], check: str, text: str) -> None:
    (row,) = [row for row in rows(root, **changes) if row.check == check]
    assert row.level == FAIL
    assert text in row.text


def test_bcc_that_can_not_be_imported(root: Path) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError(f"No module named '{name}'")

    (row,) = [row for row in rows(root, load=missing) if row.level != OK]
    assert (row.check, row.level) == ("bcc", FAIL)
    assert "apt-get install python3-bpfcc" in row.text


@pytest.mark.parametrize(("answer", "level"), [(0, OK), (machine.TIME_ERROR, WARN)])
def test_the_clock(root: Path, answer: int, level: str) -> None:
    assert levels(machine.clock(host(root), lambda: answer)) == [level, OK]


def test_adjtimex_answers() -> None:
    assert 0 <= machine._adjtimex() <= machine.TIME_ERROR


@pytest.mark.kernel
def test_the_maps_take_about_what_is_said() -> None:
    from coloebpf.dataplane import Dataplane, detach

    pin_dir = Path(f"/sys/fs/bpf/coloebpf/doctor-{os.getpid()}")
    try:
        Dataplane.load(pin_dir, sizes := Sizes(slots=4096, flows=4096))
        taken = 0
        for name in ("slab", "held", "flows", "flow_refs", "magazines", "free_flows"):
            said = subprocess.run(
                ["bpftool", "-j", "map", "show", "pinned", str(pin_dir / name)], capture_output=True, check=True
            )
            taken += json.loads(said.stdout)["bytes_memlock"]
    finally:
        detach(pin_dir)
    assert 0.8 * taken < machine.needed_bytes(sizes) < 1.6 * taken


# ---- the network -------------------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def wired() -> Iterator[None]:
    """The example's devices in a network namespace of the test's own."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    name = f"coloebpf-doctor-{os.getpid()}"
    ip("netns", "add", name)
    try:
        with inside(name):
            for device in ("vif1.0-emu", "fwd0"):
                ip(
                    "link",
                    "add",
                    device,
                    "mtu",
                    "1508",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    f"{device[:4]}-peer",
                    "mtu",
                    "1508",
                )
                ip("link", "set", f"{device[:4]}-peer", "up")
            ip("link", "set", "vif1.0-emu", "mtu", "1500")
            ip("link", "add", "br0", "type", "bridge")
            ip("link", "set", "vif1.0-emu", "master", "br0")
            Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1\n")
            for device in ("vif1.0-emu", "fwd0", "br0"):
                ip("link", "set", device, "up")
            yield
    finally:
        ip("netns", "del", name)


LINK_S = 30.0  # the kernel tells of a carrier from a work queue, late on a busy machine
NETWORK = [check for name, check in CONFIGURED if name in ("devices", "forward", "hooks", "offloads", "bridge")]


def examined(root: Path, config: Config) -> list[Finding]:
    return [finding for check in NETWORK for finding in check(host(root, config))]


@pytest.mark.usefixtures("wired")
def test_good_devices(root: Path) -> None:
    found = examined(root, example_config())
    assert [f for f in found if f.level != OK] == []
    assert {f.text for f in found} >= {
        "vif1.0-emu of pair web is there",
        "fwd0 is up",
        "fwd0 can carry vif1.0-emu: MTU 1508",
        "vif1.0-emu and fwd0: free",
        "vif1.0-emu is in br0",
    }


@pytest.mark.usefixtures("wired")
@pytest.mark.parametrize(
    ("commands", "level", "text", "advice"),
    [
        (["link set fwd0 down"], FAIL, "fwd0 is down", "ip link set fwd0 up"),
        (["link set fwd0-peer down"], FAIL, "fwd0 has no carrier", "cable"),
        (["link set fwd0 mtu 1500"], FAIL, "fwd0 has MTU 1500", ""),
        (["addr add 192.0.2.9/24 dev fwd0"], FAIL, "fwd0 has address 192.0.2.9", ""),
        (["link set fwd0 master br0"], FAIL, "fwd0 belongs to a bridge", ""),
        (["link set vif1.0-emu nomaster"], FAIL, "vif1.0-emu is in no bridge: clients do not", "ip link set vif1.0-emu master br0"),
        (
            ["link add br1 type bridge", "link set vif1.0-emu master br1"],
            FAIL,
            "vif1.0-emu is in bridge br1, the configuration says br0",
            "ip link set vif1.0-emu master br0",
        ),
        (["link del br0"], FAIL, "br0 of pair web is no bridge here", "ip link add br0 type bridge"),
        (["link del vif1.0-emu"], WARN, "vif1.0-emu of pair web does not exist", "start the guest"),
        (["link del fwd0"], FAIL, "forward device fwd0 does not exist", "ip link"),
    ],
)  # fmt: skip
def test_bad_devices(root: Path, commands: list[str], level: str, text: str, advice: str) -> None:
    for command in commands:
        ip(*command.split())
    deadline = time.monotonic() + LINK_S
    while True:
        bad = [f for f in examined(root, example_config()) if f.level != OK]
        found = [f for f in bad if f.text.startswith(text)]
        if found or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    assert found, bad
    assert found[0].level == level
    assert advice in found[0].advice


@pytest.mark.kernel
@pytest.mark.usefixtures("wired")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "cilium:",
            "the tc egress hook of vif1.0-emu is held by another program (cilium:to_container): tc filter show",
        ),
        ("coloebpf:", "vif1.0-emu and fwd0: coloebpf's programs are there"),
    ],
)
def test_a_hook_that_is_held(root: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str) -> None:
    Preflight().kernel_headers().tell_bcc(os.environ)
    from bcc import BPF

    program = BPF(text=b"int nothing(void *ctx) { return -1; }", cflags=list(Preflight().kernel_headers().cflags))
    with netdev.Devices() as devices, monkeypatch.context() as other:
        other.setattr(netdev, "NAME", name)
        device = devices.find("vif1.0-emu")
        devices.ensure_clsact(device)
        devices.attach_tc(device, "egress", "to_container", program.load_func(b"nothing", BPF.SCHED_CLS).fd)
    (found,) = network.hooks(host(root, example_config()))
    assert found.level == (OK if name == netdev.NAME else FAIL)
    assert found.text.startswith(words)


@pytest.mark.usefixtures("wired")
def test_a_secondarys_guest_outside_of_its_bridge_is_worth_a_look(root: Path) -> None:
    ip("link", "set", "vif1.0-emu", "nomaster")
    config = with_pair(example_config(), role=Role.SECONDARY)
    assert [f.level for f in network.bridge(host(root, config))] == [WARN]


@pytest.mark.usefixtures("wired")
def test_a_vif_is_found_in_whatever_bridge_if_none_is_named(root: Path) -> None:
    config = with_nic(example_config(), bridge="")
    assert [f.text for f in network.bridge(host(root, config))] == ["vif1.0-emu is in br0"]


@pytest.mark.usefixtures("wired")
def test_filters_of_bridges_are_worth_a_look(root: Path) -> None:
    write(root, "proc/sys/net/bridge/bridge-nf-call-iptables", "1\n")
    write(root, "proc/sys/net/bridge/bridge-nf-call-ip6tables", "0\n")
    (bad,) = [f for f in network.bridge(host(root, example_config())) if f.level != OK]
    assert (bad.level, bad.advice) == (WARN, "sysctl net.bridge.bridge-nf-call-iptables=0")


@pytest.mark.parametrize(
    ("listing", "level", "text"),
    [
        (
            "tx-checksumming: on\ngeneric-receive-offload: on\nrx-gro-hw: off [fixed]\n",
            OK,
            "fwd0: 2 will be turned off",
        ),
        ("tx-checksumming: off\n", OK, "fwd0: all are off"),
        ("rx-vlan-offload: on [fixed]\n", FAIL, "fwd0: rx-vlan-offload can't be turned off, and"),
    ],
)
def test_offloads(listing: str, level: str, text: str) -> None:
    (found,) = network.judge_offloads("fwd0", listing)
    assert found.level == level
    assert found.text.startswith(text)


# ---- Xen ---------------------------------------------------------------------------------------------------------------

GOOD_GUEST = """
name = "web"
type = "hvm"
xen_platform_pci = 0
vif = [ 'mac=02:c0:10:00:00:01,bridge=br0,type=ioemu,model=e1000,colo_checkpoint_host=127.0.0.1,colo_checkpoint_port=9000' ]
disk = [ 'format=raw,devtype=disk,access=w,vdev=hda,backendtype=qdisk,colo,colo-host=192.0.2.2,colo-port=9001,colo-export=hda,active-disk=/a,hidden-disk=/h,target=/w' ]
"""


def xen_config() -> Config:
    return with_pair(example_config(), engine="libxl-colo", model=None)


@pytest.fixture
def xen(root: Path) -> Path:
    """A dom0 whose toolstack has COLO, with a guest that can use it."""
    write(
        root,
        "usr/lib/x86_64-linux-gnu/libxenlight.so.4.17",
        "\0" * 9000 + "\0receive qemu colo-compare checkpoint error\0",
    )
    write(root, "usr/libexec/xen-qemu-system-i386", "\0" * 5000 + "xen-colo-do-checkpoint\0")
    write(root, "etc/xen/web.cfg", GOOD_GUEST)
    return root


def xen_findings(root: Path) -> list[Finding]:
    at = host(root, xen_config())
    return [*guest.toolstack(at), *guest.configuration(at)]


def test_a_good_dom0(xen: Path) -> None:
    assert levels(iter(xen_findings(xen))) == [OK, OK, OK]


@pytest.mark.parametrize(("more", "level"), [("", FAIL), ("the SVM's memory map can't be set", OK)])
def test_a_libxl_for_guests_with_disks(xen: Path, tmp_path: Path, more: str, level: str) -> None:
    write(xen, "usr/lib/x86_64-linux-gnu/libxenlight.so.4.17", f"qemu colo-compare\0{more}\0")
    disk = LibxlDisk(
        image=tmp_path / "web.img", directory=tmp_path,
        listen=Address("192.0.2.1", 7793), peer_listen=Address("192.0.2.2", 7793),
    )  # fmt: skip
    config = xen_config()
    assert config.pairs[0].libxl_colo is not None
    with_disk = with_pair(config, libxl_colo=dataclasses.replace(config.pairs[0].libxl_colo, disks=(disk,)))
    [found] = [f for f in guest.toolstack(host(xen, with_disk)) if "an SVM that has not run" in f.text]
    assert found.level == level
    assert level == OK or "deploy/xen/rebuild.sh" in found.advice
    for pair, told in ((with_disk.pairs[0], level == FAIL), (config.pairs[0], False)):  # in a service, before each copy
        assert ("an SVM that has not run" in live.lacks(pair, host(xen))) == told


def test_pairs_of_other_engines_need_no_xen(root: Path) -> None:
    config = with_pair(example_config(), engine="model", libxl_colo=None)
    assert [f.text for f in guest.toolstack(host(root, config))] == ["no pair uses libxl-colo"]
    assert list(guest.configuration(host(root, config))) == []


@pytest.mark.parametrize(
    ("change", "level", "text", "advice"),
    [
        (unlinked("bin/xl"), FAIL, "xl is not there", "xen-utils"),
        (unlinked("usr/lib/x86_64-linux-gnu/libxenlight.so.4.17"), FAIL, "libxenlight was not found", "xen-utils"),
        (
            written("usr/lib/x86_64-linux-gnu/libxenlight.so.4.17", "COLO is not supported"),
            FAIL,
            "libxenlight was built without COLO (",
            "libnl-3-dev",
        ),
        (written("usr/lib/x86_64-linux-gnu/libxenlight.so.4.17", ""), FAIL, "libxenlight was built without", "libnl"),
        (written("usr/libexec/xen-qemu-system-i386", "\x7fELF"), FAIL, "Xen's QEMU was built without", "--enable-repl"),
        (unlinked("etc/xen/web.cfg"), WARN, "etc/xen/web.cfg is not there", "by hand"),
        (written("etc/xen/web.cfg", "name = "), FAIL, "can't be read: invalid syntax", "xl create -n"),
        (written("etc/xen/web.cfg", "name == 1"), FAIL, "can't be read: line 1 is no assignment", "xl create -n"),
    ],
)
def test_a_dom0_without(xen: Path, change: Change, level: str, text: str, advice: str) -> None:
    change(xen)
    bad = [f for f in xen_findings(xen) if f.level != OK]
    assert [f.level for f in bad] == [level]
    assert text in bad[0].text
    assert advice in bad[0].advice


@pytest.mark.parametrize(
    ("old", "new", "level", "text"),
    [
        ('"hvm"', '"pvh"', FAIL, "the guest is not HVM"),
        ("xen_platform_pci = 0", "", FAIL, "the guest has PV drivers"),
        ("xen_platform_pci = 0", "xen_platform_pci = 1", FAIL, "the guest has PV drivers"),
        ("model=e1000", "model=virtio", FAIL, "vif 0 is no emulated e1000"),
        ("type=ioemu,", "", FAIL, "vif 0 is no emulated e1000"),
        ("02:c0:10:00:00:01", "02:c0:10:00:00:02", WARN, "MAC 02:c0:10:00:00:02 is not in the pair's"),
        ("mac=02:c0:10:00:00:01,", "", WARN, "MAC (none given) is not in the pair's"),
        ("port=9000", "port=9001", FAIL, "its first vif does not send libxl to this service"),
        (",colo_checkpoint_port=9000", "", FAIL, "its first vif does not send libxl to this service"),
        ("qdisk,colo,", "qdisk,", FAIL, "disk 0 is not replicated"),
        ("backendtype=qdisk,", "", FAIL, "disk 0 is not replicated"),
        ("devtype=disk", "devtype=cdrom", FAIL, "disk 0 is a CD-ROM"),
        ("disk = [", "disk = [ 'backendtype=qdisk,colo', ", WARN, "it has 2 disks"),
        ("vif = [", "vif = [ 'type=ioemu,model=e1000,mac=02:c0:10:00:00:01,colo_checkpoint_host=127.0.0.1,colo_checkpoint_port=9000', ", FAIL, "it has 2 vifs, the pair 1"),
    ],
)  # fmt: skip
def test_a_guest_that_colo_can_not_work_with(xen: Path, old: str, new: str, level: str, text: str) -> None:
    assert old in GOOD_GUEST
    write(xen, "etc/xen/web.cfg", GOOD_GUEST.replace(old, new, 1))
    (bad,) = [f for f in xen_findings(xen) if f.level != OK]
    assert bad.level == level
    assert text in bad.text
    assert bad.advice


# ---- the link, the service ---------------------------------------------------------------------------------------------


def with_peer(config: Config, **changes: object) -> Config:
    assert config.peer
    return dataclasses.replace(config, peer=dataclasses.replace(config.peer, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("days", "level", "text"),
    [(0, OK, "is good for 825 days"), (800, WARN, "ends in 25 days")],
)
def test_certificates(root: Path, tmp_path: Path, days: int, level: str, text: str) -> None:
    pki.init_pki(tmp_path / "pki", ["a", "b"])
    where = tmp_path / "pki"
    config = with_peer(example_config(), ca=where / "ca.pem", certificate=where / "a.pem", key=where / "a.key")
    at = dataclasses.replace(host(root, config), now=time.time() + 60 + (days - 0.5) * 86_400 * bool(days))
    found = {f.text: f.level for f in link.certificates(at)}
    (own,) = [said for said in found if "a.pem" in said and "ca.pem" not in said]
    assert text in own
    assert found[own] == level


def test_certificates_of_another_host_fail(root: Path, tmp_path: Path) -> None:
    where = tmp_path / "pki"
    pki.init_pki(where, ["a", "b"])
    config = with_peer(example_config(), ca=where / "ca.pem", certificate=where / "b.pem", key=where / "b.key")
    found = list(
        doctor._rows("certificates", link.certificates, dataclasses.replace(host(root, config), now=time.time()))
    )
    assert [(row.level, "is for b, but this host is a" in row.text) for row in found] == [(FAIL, True)]


def test_a_peer_that_answers_and_one_that_does_not(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        config = with_peer(example_config(), connect=Address("127.0.0.1", port))
        assert levels(link.peer(host(root, config))) == [OK]
    (found,) = link.peer(host(root, config))
    assert (found.level, found.text) == (WARN, f"b at 127.0.0.1:{port} can't be reached: Connection refused")


def test_a_peer_that_connects_itself_need_not_listen(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = with_peer(example_config(), name="Z", connect=Address("127.0.0.1", port))  # before this host's "a"
    (found,) = link.peer(host(root, config))
    assert found.level == OK
    assert "its service connects to this one" in found.text
    nowhere = with_peer(config, connect=Address("192.0.2.77", 1))
    assert levels(link.peer(host(root, nowhere))) == [WARN]


@pytest.mark.parametrize(
    ("kind", "level", "text"),
    [
        ("none", OK, "pairs without one"),
        ("etcd", WARN, "etcd: etcd does not answer (http://127.0.0.1:"),
        ("command", WARN, "command: fencing command /nonexistent/fence is no program"),
    ],
)
def test_the_arbiter(root: Path, kind: str, level: str, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    asked = ArbiterConfig(
        etcd=EtcdConfig(endpoints=(nobody,), request_timeout_ms=500),
        command=CommandConfig(fence=("/nonexistent/fence",)),
    )
    config = dataclasses.replace(with_pair(example_config(), arbiter=kind), arbiter=asked)
    (found,) = link.arbiter(host(root, config))
    assert found.level == level
    assert found.text.startswith(text)


def test_a_fencing_command_is_not_run_by_the_doctor(root: Path, tmp_path: Path) -> None:
    fence = tmp_path / "fence"
    fence.write_text(f"#!/bin/sh\ntouch {tmp_path}/fenced\n")
    fence.chmod(0o700)
    asked = ArbiterConfig(command=CommandConfig(fence=(str(fence),)))
    config = dataclasses.replace(with_pair(example_config(), arbiter="command"), arbiter=asked)
    assert levels(link.arbiter(host(root, config))) == [OK]
    assert not (tmp_path / "fenced").exists()


def test_the_service_and_its_warnings(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    config = example_config()
    config = dataclasses.replace(config, host=dataclasses.replace(config.host, control_socket=path))
    assert levels(link.service(host(root, config))) == [WARN]
    with running(path, Service()):
        found = list(link.service(host(root, config)))
    assert levels(iter(found)) == [OK, WARN]
    assert found[1].text == "it warns: No heartbeat comes on fwd0."


# ---- the whole ---------------------------------------------------------------------------------------------------------

ROWS = [
    Row("kernel", OK, "Linux 6.1", ""),
    Row("clock", WARN, "the clock is not synchronised " * 5, "apt-get install chrony " * 6),
]


@pytest.mark.parametrize(("more", "code"), [([], 0), ([Row("bcc", FAIL, "bcc is missing", "")], 1)])
def test_a_failure_is_the_exit_code_and_a_warning_is_none(more: list[Row], code: int) -> None:
    assert doctor.exit_code([*ROWS, *more]) == code


def test_text_and_json() -> None:
    every = [*ROWS, Row("bcc", FAIL, "bcc is missing", "apt-get install python3-bpfcc")]
    lines = doctor.text(every).splitlines()
    assert max(map(len, lines)) < 80
    assert lines[0] == "ok   kernel       Linux 6.1"
    assert lines[-4:] == [
        "FAIL bcc          bcc is missing",
        "                > apt-get install python3-bpfcc",
        "",
        "1 ok, 1 to look at, 1 failed",
    ]
    assert doctor.as_dict(every) == {
        "findings": [dataclasses.asdict(row) for row in every],
        "ok": 1,
        "warn": 1,
        "fail": 1,
    }


def test_mistakes_in_the_configuration_are_findings_and_the_machine_is_examined_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "coloebpf.toml", '[host]\nname = "a"\nmtu = 1\n')
    assert main(["doctor", "--json", "--config", str(path)]) == 1
    found = json.loads(capsys.readouterr().out)
    (row,) = [row for row in found["findings"] if row["check"] == "config"]
    assert (row["level"], row["text"]) == ("fail", f"{path}: host.mtu is 1")
    assert row["advice"].startswith("must be")
    assert {row["check"] for row in found["findings"]} == {"config", *(name for name, _ in CHECKS)}
