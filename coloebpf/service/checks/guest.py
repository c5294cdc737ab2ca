"""Xen's side of a pair with the engine libxl-colo: the toolstack's build, and the guest's configuration.

What is asked for is in docs/operations.md; where it comes from, in shared/reference/xen-libxl-colo.md.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from coloebpf.errors import ConfigError
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import PairConfig
from coloebpf.service.disks import ColoDisk
from coloebpf.xen import xlcfg

LIBRARIES = ("usr/lib/*/libxenlight.so.*", "usr/lib/xen-*/lib/*/libxenlight.so.*", "usr/local/lib/libxenlight.so.*")
# Is in a libxenlight that was built with libnl, and in no other. An argument of a call, for what initialises an array,
# as libxl's words to the endpoint do, the compiler may scatter over instructions.
IN_COLO = b"qemu colo-compare"
# An argument of a call too: deploy/xen/edits/tools/50-svm-memory-map.patch, for a guest that is started paused.
IN_SVM = b"the SVM's memory map can't be set"
QEMUS = (
    "usr/libexec/xen-qemu-system-i386",
    "usr/lib/xen*/bin/qemu-system-i386",
    "usr/local/lib/xen/bin/qemu-system-i386",
)
IN_QEMU = b"xen-colo-do-checkpoint"  # QMP's command, in a QEMU with replication


def _pairs(host: Host) -> list[PairConfig]:
    return [pair for pair in host.known.pairs if pair.libxl_colo is not None]


def toolstack(host: Host) -> Iterator[Finding]:
    """libxl and QEMU were built with COLO; Debian's are not."""
    pairs = _pairs(host)
    if not pairs:
        yield Finding(OK, "no pair uses libxl-colo")
        return
    yield from stack(host, pairs)


def stack(host: Host, pairs: Iterable[PairConfig]) -> Iterator[Finding]:
    """What there is for COLO, as these pairs need it."""
    if not shutil.which("xl", path=host.path):
        yield Finding(FAIL, "xl is not there", "apt-get install xen-utils, and boot Xen")
        return
    yield _has(
        host,
        LIBRARIES,
        IN_COLO,
        "libxenlight",
        "rebuild Xen's tools with libnl-3-dev and libnl-route-3-dev installed (Debian's are without)",
    )
    if any(ColoDisk.of(pair) is not None for pair in pairs):
        yield _has(
            host,
            LIBRARIES,
            IN_SVM,
            "libxenlight",
            "without it the SVM of a guest with disks crashes as it begins: install what deploy/xen/rebuild.sh makes",
            "a memory map for an SVM that has not run",
        )
    yield _has(
        host,
        QEMUS,
        IN_QEMU,
        "Xen's QEMU",
        "rebuild QEMU with Xen and replication: --enable-xen --enable-replication (Debian's is without)",
    )


def _has(host: Host, patterns: tuple[str, ...], text: bytes, what: str, advice: str, has: str = "COLO") -> Finding:
    files = [path for pattern in patterns for path in sorted(host.root.glob(pattern)) if path.is_file()]
    if not files:
        return Finding(FAIL, f"{what} was not found", "apt-get install xen-utils")
    for path in files:
        if _contains(path, text):
            return Finding(OK, f"{what} has {has} ({path})")
    return Finding(FAIL, f"{what} was built without {has} ({files[0]})", advice)


def _contains(path: Path, text: bytes) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as data:
        return data.find(text) >= 0


def configuration(host: Host) -> Iterator[Finding]:
    """/etc/xen/<domain>.cfg is one that COLO can work with."""
    for pair in _pairs(host):
        assert pair.libxl_colo is not None
        if pair.relayed:
            continue  # live.py has it
        path = host.at(f"/etc/xen/{pair.libxl_colo.domain}.cfg")
        if not path.exists():
            yield Finding(
                WARN,
                f"{path} is not there, so the guest of pair {pair.name} can't be checked",
                "put its configuration there, or check it against docs/operations.md by hand",
            )
            continue
        try:
            settings = xlcfg.settings(path.read_text(errors="replace"))
        except ConfigError as error:
            yield Finding(FAIL, f"{path} can't be read: {error}", "`xl create -n` says what is wrong with it")
            continue
        found = [*_machine(settings), *_vifs(settings, pair), *_disks(settings)]
        yield from (Finding(f.level, f"{path}: {f.text}", f.advice) for f in found)
        if not found:
            yield Finding(OK, f"{path} is as COLO needs it")


def _machine(settings: Mapping[str, Any]) -> Iterator[Finding]:
    if "hvm" not in (settings.get("type"), settings.get("builder")):
        yield Finding(FAIL, "the guest is not HVM", 'type = "hvm"')
    if str(settings.get("xen_platform_pci", 1)) != "0":
        yield Finding(
            FAIL,
            "the guest has PV drivers, whose state COLO does not copy",
            "xen_platform_pci = 0, and xen_emul_unplug=never on the guest kernel's command line",
        )


def _vifs(settings: Mapping[str, Any], pair: PairConfig) -> Iterator[Finding]:
    rows = [xlcfg.options(row) for row in settings.get("vif", [])]
    if len(rows) != len(pair.nics):
        yield Finding(
            FAIL,
            f"it has {len(rows)} vifs, the pair {len(pair.nics)} NICs",
            "each vif needs a [[pair.nic]], or its output is not compared",
        )
    for number, row in enumerate(rows):
        if row.get("type") != "ioemu" or row.get("model") != "e1000":
            yield Finding(FAIL, f"vif {number} is no emulated e1000", "type=ioemu,model=e1000 in its line")
    macs = {nic.mac for nic in pair.nics if nic.mac}
    unknown = sorted(mac for row in rows if macs and (mac := row.get("mac", "").lower()) not in macs)
    if unknown:
        yield Finding(
            WARN,
            f"MAC {unknown[0] or '(none given)'} is not in the pair's configuration",
            "the same mac= on both hosts, and in [[pair.nic]]",
        )
    assert pair.libxl_colo is not None
    listen = pair.libxl_colo.listen
    wanted = {"colo_checkpoint_host": listen.host, "colo_checkpoint_port": str(listen.port)}
    if rows and any(rows[0].get(key) != value for key, value in wanted.items()):
        yield Finding(
            FAIL,
            "its first vif does not send libxl to this service",
            f"{','.join(f'{key}={value}' for key, value in wanted.items())} in its line; xl crashes without the port",
        )


def _disks(settings: Mapping[str, Any]) -> Iterator[Finding]:
    rows = [xlcfg.options(row) for row in settings.get("disk", [])]
    for number, row in enumerate(rows):
        if row.get("devtype") == "cdrom":
            yield Finding(FAIL, f"disk {number} is a CD-ROM, which COLO refuses", "take its line out")
        elif row.get("backendtype") != "qdisk" or "colo" not in row:
            yield Finding(
                FAIL,
                f"disk {number} is not replicated",
                "backendtype=qdisk,colo,colo-host=...,colo-port=...,colo-export=...,active-disk=...,hidden-disk=...",
            )
    if len(rows) > 1:
        yield Finding(
            WARN, f"it has {len(rows)} disks; libxl's check of a second one reads a dangling pointer", "use one"
        )
