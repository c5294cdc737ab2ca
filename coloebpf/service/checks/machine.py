"""The machine: kernel, bcc, headers, memory, clock."""

from __future__ import annotations

import ctypes as ct
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from coloebpf.errors import PreflightError
from coloebpf.model import Sizes
from coloebpf.preflight import Preflight
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host

TOOLS = {  # program -> (level if it is missing, Debian's package, what for)
    "ethtool": (FAIL, "ethtool", "the service turns the forward devices' offloads off with it"),
    "bpftool": (WARN, "bpftool", "an operator looks into maps and programs with it"),
}
FLOW_BYTES = 1024  # of a flow in its array, its hash entry and the free list: somewhat more than they have
RECORD_BYTES = 64 + 16  # of a slot besides its bytes: its record and its place in the free list
SLOT_PAD = 512  # bpf/constants.h
MIBI = 1 << 20
GOOD_CLOCKS = ("tsc", "xen", "kvm-clock", "hyperv_clocksource_tsc_page", "arch_sys_counter")
CLOCK_FILE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


def _preflight(host: Host) -> Preflight:
    def no_mount(target: Path) -> None:
        raise OSError(errno.ENOENT, "not mounted", str(target))

    return Preflight(host.root, host.euid, host.release, no_mount, host.load)


def root(host: Host) -> Iterator[Finding]:
    """Everything else needs it."""
    _preflight(host).check_root()
    yield Finding(OK, "runs as root")


def kernel(host: Host) -> Iterator[Finding]:
    """New enough."""
    _preflight(host).check_kernel()
    yield Finding(OK, f"Linux {host.release or os.uname().release}")


def btf(host: Host) -> Iterator[Finding]:
    """For spin locks in maps."""
    _preflight(host).check_btf()
    yield Finding(OK, "the kernel describes its types")


def bpffs(host: Host) -> Iterator[Finding]:
    """Where pins live."""
    try:
        _preflight(host).ensure_bpffs()
    except PreflightError:
        yield Finding(
            WARN,
            "no bpf file system is mounted at /sys/fs/bpf; the service mounts one at its start",
            "add to /etc/fstab: bpf /sys/fs/bpf bpf defaults 0 0",
        )
    else:
        yield Finding(OK, "mounted at /sys/fs/bpf")


def bcc(host: Host) -> Iterator[Finding]:
    """The compiler and loader."""
    _preflight(host).check_bcc()
    yield Finding(OK, "this Python imports bcc")


def headers(host: Host) -> Iterator[Finding]:
    """What bcc compiles with."""
    found = _preflight(host).kernel_headers()
    yield Finding(OK, f"those at {found.source}" if found.source else "the running kernel's own")


def tools(host: Host) -> Iterator[Finding]:
    """Programs that are called."""
    for tool, (level, package, purpose) in TOOLS.items():
        if shutil.which(tool, path=host.path):
            yield Finding(OK, f"{tool} is there")
        else:
            yield Finding(level, f"{tool} is missing: {purpose}", f"apt-get install {package}")


def needed_bytes(sizes: Sizes) -> int:
    """What the maps take of the kernel's memory, about, from their making on."""
    slot = (16384 if sizes.jumbo else 2048) + SLOT_PAD + RECORD_BYTES
    return sizes.slots * slot + sizes.flows * FLOW_BYTES


def memory(host: Host) -> Iterator[Finding]:
    """Maps are allocated whole, and never swapped."""
    words = dict(line.split(":", 1) for line in host.at("/proc/meminfo").read_text().splitlines())
    available = int(words["MemAvailable"].split()[0]) * 1024
    need = needed_bytes(Sizes.of_mtu(host.config.host.mtu if host.config else Sizes.mtu))
    said = f"{available // MIBI:,} MiB are available, the dataplane takes {need // MIBI:,} MiB"
    if available < need:
        yield Finding(
            WARN,
            f"{said}; if it is not loaded yet, it will not load",
            "give dom0 more memory (dom0_mem= on Xen's command line)",
        )
    else:
        yield Finding(OK, said)


def _adjtimex() -> int:
    buffer = (ct.c_char * 256)()  # struct timex, all zero: read only; it has 208 bytes
    return int(ct.CDLL(None, use_errno=True).adjtimex(buffer))


def clock(host: Host, adjtimex: Callable[[], int] = _adjtimex) -> Iterator[Finding]:
    """Certificates are judged by it, and programs read it for each packet."""
    if adjtimex() == TIME_ERROR:
        yield Finding(
            WARN,
            "the clock is not synchronised: certificates and logs of two hosts will disagree, and so will the guests",
            "apt-get install chrony, and wait until `chronyc tracking` says Normal",
        )
    else:
        yield Finding(OK, "synchronised")
    source = host.at(CLOCK_FILE).read_text().strip()
    if source in GOOD_CLOCKS:
        yield Finding(OK, f"clock source {source}")
    else:
        yield Finding(
            WARN,
            f"clock source {source} is slow, and it is read for each packet",
            f"see {Path(CLOCK_FILE).with_name('available_clocksource')}, and clocksource= of the kernel's command line",
        )
