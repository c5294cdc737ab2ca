"""deploy/systemd/coloebpf.service under a real systemd: start, reload, restart, crash, a service that stands still, stop.

Run by tests/vm/test_systemd.py inside the guest, as root and on files that nobody keeps. It makes a host with three pairs:
a primary's with engine model, one that libxl is connected to, and a secondary's with engine qemu, whose standby is started
by the service. What must outlive the service is libxl's connection and that QEMU; both are real here.
"""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coloebpf.control import Control, State
from coloebpf.errors import ServiceError
from coloebpf.service.commands import client
from coloebpf.service.peer import pki

REPO = Path(__file__).resolve().parents[2]
UNIT = "coloebpf.service"
CONFIG = Path("/etc/coloebpf/coloebpf.toml")
PINS = Path("/sys/fs/bpf/coloebpf/host")
CONTROL = Path("/run/coloebpf/control.sock")
LIBXL_PORT, QEMU_PAIR = 9000, 2
SOON_S = 120.0  # for what takes a second; the CPU is emulated
PAIRS = (
    ("web", "primary", "model", ""),
    ("mail", "primary", "libxl-colo", f'[pair.libxl_colo]\nlisten = "127.0.0.1:{LIBXL_PORT}"\ndomain = "mail"\n'),
    (
        "news",
        "secondary",
        "qemu",
        '[pair.qemu]\nqmp = "/run/news.qmp"\nlisten = "127.0.0.1:7790"\ncommand = ["/usr/bin/news", "{qmp}", "{tap0}"]\n',
    ),
)
# Without the service's own "-incoming defer": what it starts is then as good as an SVM, and the next service adopts it.
GUEST = """#!/bin/sh
exec qemu-system-x86_64 -S -nodefaults -display none -m 32 -qmp "unix:$1,server=on,wait=off" \\
    -netdev "tap,id=n0,ifname=$2,script=no,downscript=no" -device virtio-net-pci,netdev=n0
"""
SLOW = "TimeoutStartSec=900s\nWatchdogSec=15s\n"  # the CPU is emulated
NO_KVM = "MemoryDenyWriteExecute=no\n"  # so QEMU translates code, as the unit says


def sh(*command: str) -> str:
    """A command's output; it must go well."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}"
    return done.stdout


def shown(key: str) -> str:
    """What systemd says of the unit."""
    return sh("systemctl", "show", "--value", "-p", key, UNIT).strip()


def until(what: str, condition: Callable[[], object], seconds: float = SOON_S) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not in {seconds:g} s: {what}"
        time.sleep(0.2)


def tell(what: str) -> None:
    print(f"{time.monotonic():6.1f} s  {what}", flush=True)


def journal() -> str:
    return sh("journalctl", "--no-pager", "--output=cat", f"--unit={UNIT}")


def status() -> dict[str, Any]:
    with client.connected(CONTROL) as service:
        found: dict[str, Any] = service.ask("status", SOON_S)["service"]
    return found


def answers() -> bool:
    with suppress(ServiceError):
        return bool(status())
    return False


# ---- the host --------------------------------------------------------------------------------------------------------


def furnish() -> None:
    """Devices, certificates, configuration, unit: as an operator would."""
    service = f'#!/bin/sh\nexec {REPO}/.venv/bin/python -m coloebpf "$@"\n'
    for name, text in (("coloebpf", service), ("news", GUEST)):
        program = Path("/usr/bin") / name
        program.write_text(text)
        program.chmod(0o755)
    sh("ip", "link", "add", "br0", "type", "bridge")
    for number in range(len(PAIRS)):
        sh(
            "ip",
            "link",
            "add",
            f"fwd{number}",
            "mtu",
            "1600",
            "type",
            "veth",
            "peer",
            "name",
            f"wire{number}",
            "mtu",
            "1600",
        )
        sh("ip", "link", "set", f"wire{number}", "up")
        vifs = [f"vif{number}", *([f"standby{number}"] if number == QEMU_PAIR else [])]
        for vif in vifs:
            sh("ip", "tuntap", "add", vif, "mode", "tap")
            sh("ip", "link", "set", vif, "master", "br0", "up")
        sh("ip", "link", "set", f"fwd{number}", "up")
    CONFIG.parent.mkdir(mode=0o750, exist_ok=True)
    pki.init_pki(CONFIG.parent / "pki", ["a", "b"])
    configure("info")
    shutil.copy(REPO / "deploy/systemd" / UNIT, f"/etc/systemd/system/{UNIT}")
    Path(f"/etc/systemd/system/{UNIT}.d").mkdir()
    change_unit("slow", SLOW)


def change_unit(name: str, lines: str) -> None:
    """As `systemctl edit` does it."""
    Path(f"/etc/systemd/system/{UNIT}.d/{name}.conf").write_text(f"[Service]\n{lines}")
    sh("systemctl", "daemon-reload")


def configure(log_level: str) -> None:
    lines = [
        f'[host]\nname = "a"\nlog_level = "{log_level}"\nmetrics_listen = ""\n',
        '[peer]\nname = "b"\nlisten = "127.0.0.1:7788"\nconnect = "127.0.0.1:7789"\n',
        'certificate = "/etc/coloebpf/pki/a.pem"\nkey = "/etc/coloebpf/pki/a.key"\n',
    ]
    for number, (name, role, engine, more) in enumerate(PAIRS):
        standby = f'standby_vif = "standby{number}"\n' if number == QEMU_PAIR else ""
        lines.append(f'[[pair]]\nname = "{name}"\nnumber = {number}\nrole = "{role}"\nengine = "{engine}"\n{more}')
        lines.append(f'[[pair.nic]]\nnumber = {number}\nvif = "vif{number}"\nfwd = "fwd{number}"\nmac = ""\n{standby}')
    CONFIG.write_text("".join(lines))


class Libxl:
    """libxl's connection, as `xl remus` has it."""

    def __init__(self) -> None:
        self._socket = socket.create_connection(("127.0.0.1", LIBXL_PORT), timeout=SOON_S)
        self._socket.sendall(struct.pack(">I", 25) + b"COLO_USERSPACE_PROXY_INIT")
        assert self._socket.recv(4096), "no answer to INIT"

    def lives(self) -> bool:
        """Nobody has hung up."""
        self._socket.settimeout(0.2)
        with suppress(TimeoutError):
            while said := self._socket.recv(4096):
                tell(f"libxl hears {said!r}")
            return False
        return True


def guest() -> int:
    """The QEMU that the service has started; 0 until it has its tap."""
    with suppress(OSError, ValueError):
        pid = int(json.loads(Path("/run/coloebpf/qemu/news/0.json").read_text())["pid"])
        if any(os.readlink(link) == "/dev/net/tun" for link in Path(f"/proc/{pid}/fd").iterdir()):
            return pid
    return 0


# ---- what is to be seen ------------------------------------------------------------------------------------------------


def main() -> None:
    furnish()
    tell("furnished")

    sh("systemctl", "start", UNIT)
    assert shown("SubState") == "running"
    assert [pair["state"] for pair in status()["pairs"]] == ["unprotected"] * len(PAIRS)
    tell(f"started, ready: {shown('StatusText')!r}; memory {shown('MemoryCurrent')}")

    libxl = Libxl()
    until("libxl's connection is kept", lambda: shown("NFileDescriptorStore") == "1")
    tell("libxl is connected")

    configure("debug")
    sh("systemctl", "reload", UNIT)
    until("the reload", lambda: "configuration is reloaded" in journal())
    with CONFIG.open("a") as file:
        file.write("nonsense = 1\n")
    sh("systemctl", "reload", UNIT)
    until("a refusal", lambda: "the changed configuration is refused" in journal())
    configure("info")
    assert shown("NRestarts") == "0"
    tell("reloaded, and a file with a mistake refused")

    def goes_on(how: str, before: str, restarts: int) -> str:
        until(
            f"the next service, {how}", lambda: shown("SubState") == "running" and shown("MainPID") not in ("0", before)
        )
        until("it answers", answers)
        until("libxl's connection is kept", lambda: shown("NFileDescriptorStore") == "1")
        assert libxl.lives(), f"libxl was hung up on, {how}"
        assert guest() == qemu, f"the guest's QEMU has ended with the service, {how}"
        assert int(shown("NRestarts")) == restarts
        tell(how)
        return shown("MainPID")

    change_unit("no-kvm", NO_KVM)
    qemu, pid = 0, shown("MainPID")
    sh("systemctl", "restart", UNIT)
    pid = goes_on("restarted", pid, 0)
    with Control.open(PINS) as control:
        control.set_state(QEMU_PAIR, State.SYNCING)  # as the primary's service would have it said
    until("a QEMU of the service's runs", guest)
    qemu = guest()
    sh("systemctl", "restart", UNIT)
    pid = goes_on("restarted beside a QEMU", pid, 0)
    os.kill(int(pid), signal.SIGKILL)
    pid = goes_on("killed", pid, 1)
    os.kill(int(pid), signal.SIGSTOP)
    pid = goes_on("stood still, ended by the watchdog", pid, 2)
    assert "atchdog" in journal()

    sh("systemctl", "stop", UNIT)
    assert shown("NFileDescriptorStore") == "0"
    assert not libxl.lives()
    assert guest() == qemu
    tell("stopped")
    print("the unit works")


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        print(
            subprocess.run(
                ["journalctl", "--no-pager", "-n", "150", f"--unit={UNIT}"], capture_output=True, text=True, check=False
            ).stdout
        )
        print(subprocess.run(["systemctl", "status", UNIT], capture_output=True, text=True, check=False).stdout)
        sys.stdout.flush()
        raise
