"""A host: Xen and its dom0 in QEMU, whose CPU is emulated, for nested virtualisation is found nowhere."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from coloebpf.errors import LabError
from coloebpf.netns import inside
from tests.xen.dom0 import Boot
from tests.xen.plan import DIRECT_LINKS, DIRECT_MTU, WIRES, XenPlan

QEMU = "qemu-system-x86_64"
MEMORY_MIB = 2560
DOM0_MIB = 1280
# What QEMU 7.2's emulation gets wrong, or Xen trips over.
WITHOUT = (
    *("smap", "smep"),  # dom0's kernel dies at its first iret: the stack is read with the kernel's rights
    "monitor",  # mwait raises #GP and Xen panics (and cpuidle=0)
    "rdtscp",  # is reported as rdtsc when intercepted: PVH guests crash
    *(
        "xsave",
        "xsaveopt",
        "xsavec",
        "xgetbv1",
        "avx",
        "avx2",
        "fma",
        "f16c",
    ),  # a process was once seen to spin in AVX code
    *(
        "nrip-save",
        "rdseed",
        "sha-ni",
        "fxsr-opt",
        "misalignsse",
        "3dnowprefetch",
        "osvw",
        "topoext",
    ),  # are not emulated
)
CPU = ",".join(["EPYC", "+svm", "+npt", *(f"-{flag}" for flag in WITHOUT)])
XEN = "dom0_max_vcpus=1 com1=115200,8n1 console=com1 loglvl=warning guest_loglvl=warning"
XEN += " spec-ctrl=no xpti=no smt=0 cpuidle=0 noreboot"
# Mitigations only cost time under emulation.
LINUX = "console=hvc0 quiet mitigations=off audit=0 apparmor=0 panic=-1"
READY = "XENLAB-READY"
BOOT_TIMEOUT = 300.0  # seconds; it takes 20 alone
POLL = 0.2
CONSOLE = "console.log"
PID = "pid"


def start(plan: XenPlan, host: int, boot: Boot) -> None:
    """Switches a host on, with a fresh copy of the disk."""
    home = plan.home(host)
    home.mkdir(parents=True, exist_ok=True)
    (home / CONSOLE).unlink(missing_ok=True)
    with inside(plan.name), (home / "qemu.log").open("wb") as log:
        child = subprocess.Popen(
            ["nice", "-n", "10", *_command(plan, host, boot)],
            cwd=home,
            env={**os.environ, "TMPDIR": str(home)},  # what it writes to its disk
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (home / PID).write_text(str(child.pid))


def _command(plan: XenPlan, host: int, boot: Boot) -> list[str]:
    words = [
        *(QEMU, "-name", plan.machine(host), "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", "q35", "-accel", "tcg,thread=single,tb-size=512", "-cpu", CPU, "-smp", "1", "-m", f"{MEMORY_MIB}M"),
        *("-serial", f"file:{CONSOLE}", "-qmp", "unix:qmp.sock,server=on,wait=off"),
        *("-drive", f"file={boot.disk},format=raw,if=none,id=disk,cache=unsafe,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *("-kernel", str(boot.hypervisor), "-append", f"dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M {XEN}"),
        # QEMU's multiboot loader takes modules with their command lines, so no boot loader is needed.
        *("-initrd", f"{boot.kernel} {LINUX} LAB_HOST={host},{boot.initramfs}"),
    ]
    for wire in WIRES:
        words += ["-netdev", f"tap,id={wire},ifname={plan.tap(wire, host)},script=no,downscript=no,vhost=off"]
        mtu = f",host_mtu={DIRECT_MTU}" if wire in DIRECT_LINKS else ""
        words += ["-device", f"virtio-net-pci,netdev={wire},mac={plan.mac(wire, host)},romfile={mtu}"]
    return words


def wait(plan: XenPlan, host: int) -> float:
    """Until dom0 is up; how long that took, in seconds of this machine since the call."""
    begun = time.monotonic()
    while time.monotonic() - begun < BOOT_TIMEOUT:
        if READY in _console(plan, host):
            return time.monotonic() - begun
        ended = running(plan, host) is None
        time.sleep(POLL)
        if ended and running(plan, host) is None:  # one that `nice` is just about to become has no command line
            raise LabError(f"host {host} ended\n{_last_words(plan, host)}")
    raise LabError(f"host {host} was not up after {BOOT_TIMEOUT:g} s\n{_last_words(plan, host)}")


def running(plan: XenPlan, host: int) -> int | None:
    """Process id of a host's QEMU; a number that is somebody else's by now does not count."""
    with suppress(OSError, ValueError):
        pid = int((plan.home(host) / PID).read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        if plan.machine(host).encode() in words and state != "Z":
            return pid
    return None


def kill(plan: XenPlan, host: int) -> None:
    """As when the power fails. Returns when it is off."""
    pid = running(plan, host)
    if pid is None:
        return
    os.kill(pid, signal.SIGKILL)
    while running(plan, host) is not None:
        time.sleep(POLL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _console(plan: XenPlan, host: int) -> str:
    try:
        return (plan.home(host) / CONSOLE).read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _last_words(plan: XenPlan, host: int) -> str:
    said = [(plan.home(host) / "qemu.log").read_text(errors="replace"), _console(plan, host)]
    return "\n".join(line for text in said for line in text.splitlines()[-15:])
