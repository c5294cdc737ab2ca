"""The lab's virtual machines: stock QEMU without KVM, in the namespace of a host, on that host's taps."""

from __future__ import annotations

import subprocess
import time
from contextlib import suppress
from pathlib import Path

from coloebpf.errors import LabError
from coloebpf.lab import guests, image, redis
from coloebpf.lab.plan import GUESTS, HOSTS, LabPlan
from coloebpf.netns import inside

QEMU = "qemu-system-x86_64"
COMM = QEMU[:15]  # as the kernel shortens it
MEMORY_MIB = 128  # with less there is no room to unpack the initramfs
BOOT_TIMEOUT = 90.0  # seconds for redis to answer; it takes 4 alone, and the services compile beside it
TB_CACHE_MIB = 32  # of code that TCG keeps; this guest runs little
CONSOLE = "console.log"


def command(plan: LabPlan, qmp: str, taps: list[str], console: str, extra: tuple[str, ...] = ()) -> list[str]:
    """A machine's command line. The two machines of a pair are told the same but for QMP socket, taps and console.

    The engine has the monitor at `qmp`; the one beside it, `<qmp>.lab`, is for whoever looks on (pauses.py).
    """
    kernel, initramfs = image.of_guest()
    nics = ";".join(f"{nic.guest_v4}/24,{nic.guest_v6}/64" for nic in plan.nic_list())
    words = [
        *(QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "q35", "-cpu", "max", "-smp", "1", "-m", f"{MEMORY_MIB}M", "-accel", f"tcg,tb-size={TB_CACHE_MIB}"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        # panic=-1 with -no-reboot: a panic ends the machine at once. Mitigations only cost time under emulation.
        "-append",
        f"console=ttyS0 quiet panic=-1 oops=panic mitigations=off COLO_MTU={plan.mtu} COLO_NICS={nics}",
        *("-qmp", f"unix:{qmp},server=on,wait=off", "-qmp", f"unix:{qmp}.lab,server=on,wait=off"),
        *("-serial", f"file:{console}"),
    ]
    for nic, tap in zip(plan.nic_list(), taps, strict=True):
        words += ["-netdev", f"tap,id=net{nic.nic},ifname={tap},script=no,downscript=no,vhost=off"]
        words += ["-device", f"virtio-net-pci,netdev=net{nic.nic},mac={nic.mac},romfile="]
    return [*words, *extra]


def home(plan: LabPlan, guest: str) -> Path:
    """Where a machine has its files: QMP socket, console, what QEMU says."""
    return plan.run_dir / guest


def qmp_socket(plan: LabPlan, guest: str = GUESTS[0]) -> Path:
    """Of the machine that the lab itself has started."""
    return home(plan, guest) / "qmp.sock"


def monitor(plan: LabPlan, guest: str = GUESTS[0]) -> Path:
    """The one for whoever looks on."""
    path = qmp_socket(plan, guest)
    return path.with_name(path.name + ".lab")


def start(plan: LabPlan, guest: str = GUESTS[0], host: str = HOSTS[0]) -> subprocess.Popen[bytes]:
    """Boot a machine; it is up when wait() returns."""
    directory = home(plan, guest)
    directory.mkdir(exist_ok=True)
    argv = command(
        plan,
        str(qmp_socket(plan, guest)),
        [nic.vif for nic in plan.nic_list()],
        str(directory / CONSOLE),
    )
    with inside(plan.namespace(host)), open(directory / "qemu.log", "wb") as log:
        return subprocess.Popen(
            argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait(plan: LabPlan, process: subprocess.Popen[bytes], guest: str = GUESTS[0]) -> None:
    """Returns when the guest's server answers the client. Raises LabError with the machine's last words."""
    deadline = time.monotonic() + BOOT_TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(LabError, OSError):
            connection = redis.Connection(plan, "client", plan.nic_list()[0].guest_v4, start_timeout=0)
            try:
                if connection.ask("PING") == b"PONG":
                    return
            finally:
                connection.abort()
        time.sleep(0.1)
    what = "does not answer" if process.returncode is None else f"ended with code {process.returncode}"
    raise LabError(f"the virtual machine {what}: {_last_words(plan, guest)}")


def running(plan: LabPlan, host: str) -> list[int]:
    """The machines on a host, by their processes."""
    return [pid for pid in guests.running(plan, host) if guests.command_name(pid) == COMM]


def _last_words(plan: LabPlan, guest: str) -> str:
    for log in ("qemu.log", CONSOLE):
        with suppress(OSError):
            lines = (home(plan, guest) / log).read_text(errors="replace").strip().splitlines()
            if lines:
                return lines[-1]
    return "it said nothing"
