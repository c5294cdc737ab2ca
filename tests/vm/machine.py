"""One virtual machine that shares the host's root read-only, runs one command and tells its exit code.

The CPU is emulated (TCG): a CI machine has no usable KVM. virtiofsd serves the root file system, so the guest sees the
very venv, headers and sources of the host; what it writes goes to a layer in its memory.
"""

import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coloebpf.lab.image import Kernel
from tests.vm import initramfs

QEMU = "qemu-system-x86_64"
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")  # of qemu-system-common
# Relative: a socket's path may have 107 bytes only. virtiofsd locks a file of that name: two machines may run at once.
SOCKET = "virtiofs-{}.sock"
PID_DIR = Path("/run/virtiofsd")  # where that file is; nobody else takes it away
INIT, SYSTEMD = "init", "systemd"  # what is process 1
MEMORY = "3G"
CPUS = 2
BOOT_LIMIT_S = 60  # measured: 4 s alone, three times that beside other work
BOOT_TRIES = 3  # an emulated two-CPU boot was once seen to stall before init
KILL_GRACE_S = 5
POLL_S = 0.1
UP = "guest-up\n"  # what init.sh says before and after the command
EXIT = re.compile(r"^guest-exit (\d+)$", re.MULTILINE)


class VmError(Exception):
    """The machine did not boot, died, or overran its time; the text holds what it said."""


class BootStallError(VmError):
    """The guest's init did not come up in time."""


@dataclass(frozen=True)
class Result:
    """How the command ended, what it printed, and how long machine and command took."""

    exit_code: int
    output: str
    seconds: float


def run(
    kernel: Kernel,
    command: str,
    *,
    repo: Path,
    work_dir: Path,
    timeout_s: float,
    under: str = INIT,
    boot_limit_s: float | None = None,
) -> Result:
    """Boots `kernel` and runs the shell text `command` in `repo` as root, for at most `timeout_s`.

    `under`: INIT, where process 1 does nothing but that, or SYSTEMD, where the command is a unit.
    """
    boot_limit_s = boot_limit_s or BOOT_LIMIT_S
    for attempt in range(1, BOOT_TRIES):
        try:
            return _run_once(kernel, command, repo, work_dir / f"boot{attempt}", timeout_s, under, boot_limit_s)
        except BootStallError:
            continue
    return _run_once(kernel, command, repo, work_dir / f"boot{BOOT_TRIES}", timeout_s, under, boot_limit_s)


def _run_once(
    kernel: Kernel, command: str, repo: Path, work_dir: Path, timeout_s: float, under: str, boot_limit_s: float
) -> Result:
    work_dir.mkdir()
    archive = initramfs.build(kernel, command, repo, work_dir, under)
    output = work_dir / "output.log"
    start = time.monotonic()
    up_at: float | None = None
    limit = boot_limit_s + timeout_s
    with _host_root_served(work_dir, limit) as served, _qemu(served, kernel, archive, work_dir, limit) as qemu:
        while True:
            ended = qemu.poll() is not None  # before the look at the output: what came last is then there
            text = output.read_text(errors="replace") if output.exists() else ""
            now = time.monotonic()
            if up_at is None and text.startswith(UP):
                up_at = now
            found = EXIT.search(text)
            if found:
                return Result(int(found[1]), text[len(UP) : found.start()], now - start)
            if ended:
                raise VmError(f"the machine ended without a result\n{_said(work_dir)}")
            if up_at is None and now - start > boot_limit_s:
                raise BootStallError(f"init was not up after {boot_limit_s:g} s\n{_said(work_dir)}")
            if up_at is not None and now - up_at > timeout_s:
                raise VmError(f"the command was not done after {timeout_s:g} s\n{_said(work_dir)}")
            time.sleep(POLL_S)


def _said(work_dir: Path) -> str:
    """The last of everything that the machine and its helpers wrote."""
    parts = []
    for name in ("output.log", "console.log", "qemu.log", "virtiofsd.log"):
        path = work_dir / name
        if path.exists():
            parts.append(f"--- {name}\n{path.read_text(errors='replace')[-4000:]}")
    return "\n".join(parts)


@contextmanager
def _process(argv: list[str], name: str, work_dir: Path, limit_s: float) -> Iterator[subprocess.Popen[bytes]]:
    """A child in `work_dir` that ends with this block; `timeout` ends it even when this Python was killed."""
    guard = ["timeout", f"--kill-after={KILL_GRACE_S}", f"{limit_s + 2 * KILL_GRACE_S:.0f}"]
    with (work_dir / f"{name}.log").open("wb") as log:
        child = subprocess.Popen([*guard, *argv], cwd=work_dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.terminate()  # `timeout` hands the signal on
        try:
            child.wait(KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # `timeout` leads a process group of its own
            child.wait()


@contextmanager
def _host_root_served(work_dir: Path, limit_s: float) -> Iterator[str]:
    """Name of the socket at which virtiofsd serves the root, in `work_dir`."""
    name = SOCKET.format(uuid.uuid4().hex)
    options = ["-f", "-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot", "-o", "log_level=warn"]
    argv = [str(VIRTIOFSD), f"--socket-path={name}", *options]
    with _process(argv, "virtiofsd", work_dir, limit_s) as child:
        deadline = time.monotonic() + KILL_GRACE_S
        while not (work_dir / name).exists():
            if child.poll() is not None or time.monotonic() > deadline:
                raise VmError(f"virtiofsd did not start\n{_said(work_dir)}")
            time.sleep(POLL_S)
        yield name
    (PID_DIR / f"{name}.pid").unlink(missing_ok=True)


@contextmanager
def _qemu(
    served: str, kernel: Kernel, archive: Path, work_dir: Path, limit_s: float
) -> Iterator[subprocess.Popen[bytes]]:
    machine = ["-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(CPUS), "-m", MEMORY]
    # virtiofsd reads the guest's memory: it must be shareable.
    memory = ["-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on", "-numa", "node,memdev=mem"]
    root = ["-chardev", f"socket,id=fs,path={served}", "-device", "vhost-user-fs-pci,chardev=fs,tag=host"]
    ports = ["-serial", "file:console.log", "-serial", "file:output.log"]
    boot = ["-kernel", str(kernel.image), "-initrd", str(archive)]
    # panic=-1 with -no-reboot: a panic ends the machine at once. Mitigations only cost time under emulation.
    line = ["-append", "console=ttyS0 quiet panic=-1 oops=panic mitigations=off"]
    bare = ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv = [QEMU, *machine, *memory, *root, *ports, *boot, *line, *bare]
    with _process(argv, "qemu", work_dir, limit_s) as child:
        yield child
