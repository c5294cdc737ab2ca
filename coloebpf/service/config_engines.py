"""What a pair's configuration says of its engine: one table for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coloebpf.service import config_keys as keys
from coloebpf.service.config_keys import HOUR_MS, Address, ms, setting, table


@dataclass(frozen=True, kw_only=True)
class XenGuestConfig:
    """What each engine on Xen has to know."""

    domain: str = setting(keys.NAME, "the guest's name in xl, on both hosts", shown="web")
    copy_timeout_s: int = setting(
        keys.integer(1, 3600, "seconds"), "for a copy of all the guest's memory, while the guest runs", 120
    )
    step_timeout_s: int = setting(
        keys.integer(1, 600, "seconds"), "for each step of libxl behind that: so long the guest may stand still", 15
    )
    run_dir: Path = setting(keys.PATH, "records of the copies, and what libxl says", Path("/run/coloebpf/xen"))


@dataclass(frozen=True, kw_only=True)
class LibxlDisk:
    """[[pair.libxl_colo.disk]]: the guest's disk; the same on both hosts, but for the addresses (docs/xen-disks.md)."""

    image: Path = setting(keys.FILE, "a file or block device; what is in it too", shown="/var/lib/xen/images/web.img")
    format: str = setting(keys.choice("raw", "qcow2"), "of the image", "raw")
    vdev: str = setting(keys.choice("hda", "hdb", "hdc", "hdd"), "what the guest knows it as", "hda")
    directory: Path = setting(
        keys.FILE, "where the secondary keeps what differs from its image", shown="/var/lib/coloebpf/web"
    )
    export: str = setting(keys.ID, "what the two QEMUs call it", "disk")
    listen: Address = setting(
        keys.ADDRESS,
        "where this host takes what the guest writes; neither encrypted nor protected: a direct link",
        shown="10.9.9.1:7793",
    )
    peer_listen: Address = setting(keys.ADDRESS, "the other host's listen", shown="10.9.9.2:7793")
    compare_image: bool = setting(
        keys.SWITCH, "whether both images are read whole and compared before each protection", True
    )


@dataclass(frozen=True, kw_only=True)
class LibxlColoConfig(XenGuestConfig):
    """[pair.libxl_colo]: for engine = "libxl-colo", guests of a Xen whose tools were rebuilt with COLO."""

    listen: Address = setting(
        keys.ADDRESS, "loopback: where libxl's COLO connects to on the primary", shown="127.0.0.1:9000"
    )
    stream_listen: Address | None = setting(
        keys.optional(keys.ADDRESS, None, "an operator starts `xl remus -c -p`, and its stream is xl's own business"),
        "where this host takes the guest in, as 10.9.9.1:7792; encrypted if encrypt_copies of [peer] says so",
        None,
    )
    disks: tuple[LibxlDisk, ...] = table(LibxlDisk, "disk", "its disk: one, or none", (), many=True, off=True)


@dataclass(frozen=True, kw_only=True)
class LibxlRemusConfig(XenGuestConfig):
    """[pair.libxl_remus]: for engine = "libxl-remus", which runs no SVM: output waits for the next checkpoint."""

    stream_listen: Address = setting(
        keys.ADDRESS,
        "where this host takes the guest in; encrypted if encrypt_copies of [peer] says so",
        shown="10.9.9.1:7792",
    )
    interval_ms: int = setting(ms(10, 60_000), "libxl's own, between two checkpoints", 200)


@dataclass(frozen=True, kw_only=True)
class LibxlLiveConfig(XenGuestConfig):
    """[pair.libxl_live]: for engine = "libxl-live", guests of stock Xen that are copied by libxl's live migration."""

    listen: Address = setting(
        keys.ADDRESS,
        "where this host takes the guest's memory; encrypted if encrypt_copies of [peer] says so",
        shown="10.9.9.1:7790",
    )
    precopy: Path | None = setting(
        keys.optional(keys.PATH, None, "each checkpoint copies all of the memory, from its request on"),
        "a library (deploy/xen/rebuild.sh precopy): memory is copied all the time, and a checkpoint sends the rest",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[pair.model]: for engine = "model", which copies nothing."""

    commit_delay_ms: int = setting(ms(0, HOUR_MS), "from Suspended to Committed", 5, live=True)
    copies: bool = setting(
        keys.SWITCH, "false: the SVM goes on with its own TCP numbers, as guests that are processes do", True
    )
    socket: Path | None = setting(keys.optional(keys.SOCKET, None, "none"), "where tests tell it to fail or hang", None)


@dataclass(frozen=True, kw_only=True)
class QemuDisk:
    """[[pair.qemu.disk]]: a disk that the guest can write."""

    node: str = setting(keys.NAME, "its node-name in QEMU, as -blockdev has it", shown="data")
    directory: Path = setting(
        keys.PATH, "where this host keeps the copy while it is the secondary", shown="/var/lib/coloebpf/web/data"
    )


@dataclass(frozen=True, kw_only=True)
class QemuConfig:
    """[pair.qemu]: for engine = "qemu", guests of QEMU that are copied by live migration."""

    qmp: Path = setting(
        keys.SOCKET,
        "where the guest's QMP answers if this host has started it; nobody else may use this socket",
        shown="/run/web.qmp",
    )
    command: tuple[str, ...] = setting(
        keys.WORDS,
        "how this host starts a QEMU of the guest; {qmp}, {tap0}, {tap1}, ... (devices of the NICs, in their order) "
        "{disk0}, ... (files of the disks, qcow2) and {name} (the pair's) are filled in, -S and -incoming are added",
        shown=[
            "qemu-system-x86_64", "-name", "{name}", "-m", "1G", "-qmp", "unix:{qmp},server=on,wait=off",
            "-netdev", "tap,id=n0,ifname={tap0},script=no,downscript=no",
            "-device", "virtio-net-pci,netdev=n0,mac=02:c0:10:00:00:01",
            "-blockdev", "qcow2,node-name=data,file.driver=file,file.filename={disk0}",
            "-device", "virtio-blk-pci,drive=data",
        ],
    )  # fmt: skip
    listen: Address = setting(
        keys.ADDRESS,
        "where this host takes the guest's memory; encrypted if encrypt_copies of [peer] says so",
        shown="10.9.9.1:7790",
    )
    fill_mib_s: int = setting(
        keys.integer(1, 100_000, "MiB/s"), "the guest's memory is copied in the background, so fast at most", 200
    )
    run_dir: Path = setting(
        keys.SOCKET, "sockets and logs of the QEMUs that are started here", Path("/run/coloebpf/qemu")
    )
    disk_listen: Address | None = setting(
        keys.optional(keys.ADDRESS, None, "no disks"),
        "where this host takes what the guest writes to its disks; nobody but the other host may reach it",
        None,
        shown="10.9.9.1:7791",
    )
    disks: tuple[QemuDisk, ...] = table(QemuDisk, "disk", "its disks", (), many=True)
