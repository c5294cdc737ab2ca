"""What attach() sets on devices and machine, so that frames are what a wire carries, and keep their order."""

import contextlib
import ctypes as ct
import os
import subprocess
import tempfile
from pathlib import Path

from pyroute2 import netns as _netns

from coloebpf.errors import DeviceError

# By ethtool's names. Checksums, segmentation, merging: frames on fwd must be what a wire carries.
# VLAN: XDP can't see a tag that travels beside the frame.
OFFLOADS = (
    "generic-receive-offload",
    "large-receive-offload",
    "rx-gro-hw",
    "rx-gro-list",
    "rx-udp-gro-forwarding",
    "tx-checksumming",
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "rx-vlan-offload",
    "tx-vlan-offload",
    "rx-vlan-stag-hw-parse",
    "tx-vlan-stag-hw-insert",
)
MNT_DETACH = 2  # sys/mount.h


def _ethtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["ethtool", *arguments], capture_output=True, text=True, check=False)
    except OSError as e:
        raise DeviceError(f"ethtool can't be run ({e.strerror}): apt-get install ethtool") from e


def offloads_off(name: str) -> None:
    """Turns off what would make frames other than a wire carries. Raises DeviceError for one that stays on."""
    refusals = {}
    for feature in OFFLOADS:  # one by one: ethtool gives up the whole line at the first that it does not know
        done = _ethtool("-K", name, feature, "off")
        if done.returncode:
            refusals[feature] = done.stderr.strip().replace("\n", "; ")
    shown = _ethtool("-k", name)
    if shown.returncode:
        raise DeviceError(f"the offloads of {name} can't be read: {shown.stderr.strip() or 'ethtool -k failed'}")
    for feature, value in stay_on(shown.stdout):
        why = refusals.get(feature) or value
        raise DeviceError(f"{name}: offload {feature} stays on ({why}); the forward link needs it off")


def stay_on(listing: str) -> list[tuple[str, str]]:
    """Those of OFFLOADS that `ethtool -k` lists as on, with its words for each."""
    pairs = (line.strip().partition(": ") for line in listing.splitlines())
    return [(feature, value) for feature, _, value in pairs if feature in OFFLOADS and value.startswith("on")]


def spread_receive(name: str) -> None:
    """Receive packet steering on a vif: one CPU takes all packets of a flow, raw and released, which keeps their order.

    docs/design.md, section 3, has the reason and the measurement.
    """
    mask = cpu_mask(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(prefix="coloebpf-sys-") as where:
        libc = ct.CDLL(None, use_errno=True)
        if libc.mount(b"sysfs", where.encode(), b"sysfs", 0, None):  # /sys shows the namespace that it was mounted in
            raise DeviceError(f"can't see {name} in sysfs: {os.strerror(ct.get_errno())}")
        try:
            for queue in Path(where, "class/net", name, "queues").glob("rx-*/rps_cpus"):
                queue.write_text(mask)
        except OSError as e:
            raise DeviceError(
                f"{name}: can't set receive packet steering: {e.strerror}; does the kernel have CONFIG_RPS?"
            ) from e
        finally:
            libc.umount2(where.encode(), MNT_DETACH)


def cpu_mask(cpus: int) -> str:
    """The first `cpus` CPUs as sysfs takes a set of them: hexadecimal words of 32 bits, the highest first."""
    bits = (1 << cpus) - 1
    words = [f"{bits >> shift & 0xFFFFFFFF:08x}" for shift in range(0, cpus, 32)]
    return ",".join(reversed(words))


def raise_backlog(
    packets: int,
    path: Path = Path("/proc/sys/net/core/netdev_max_backlog"),
    first: str = "/proc/1/ns/net",
) -> None:
    """Released packets pass a CPU's backlog, which drops what it has no room for: it must take a whole slab.

    Never lowered. The number is the machine's, and only its first network namespace shows it.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ValueError):
            _netns.setns(first)
            if int(path.read_text()) < packets:
                path.write_text(f"{packets}\n")
    finally:
        _netns.setns(home)
        os.close(home)
