"""A guest's replicated disk (engine libxl-colo): its files on this host. What is asked for is in docs/xen-disks.md."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator

from coloebpf.errors import DiskError
from coloebpf.model import Role
from coloebpf.service import disk_notes
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.disks import QEMU_IMG, ROOM, ColoDisk, room, writer
from coloebpf.units import amount


def replicated(host: Host) -> Iterator[Finding]:
    """Each could be replicated now. QEMU's build is guest.toolstack()'s, the guest's file live.engine()'s."""
    disks = [(pair.role, _at(host, disk)) for pair in host.known.pairs if (disk := ColoDisk.of(pair)) is not None]
    if not disks:
        yield Finding(OK, "no guest has a replicated disk")
        return
    if not shutil.which(QEMU_IMG, path=host.path):
        yield Finding(FAIL, f"{QEMU_IMG} is not there, which makes the overlays", "apt-get install qemu-utils")
        return
    for role, disk in disks:
        try:
            yield from _disk(role, disk)
        except DiskError as e:
            yield Finding(FAIL, f"disk of pair {disk.pair}: {e}", "coloebpf config check; docs/xen-disks.md")


def _at(host: Host, disk: ColoDisk) -> ColoDisk:
    config = disk.config
    there = dataclasses.replace(config, image=host.at(config.image), directory=host.at(config.directory))
    return ColoDisk(disk.pair, there)


def _disk(role: Role, disk: ColoDisk) -> Iterator[Finding]:
    size, free = disk.size(), room(disk.config.directory)
    disk_notes.spare(disk)
    if role is Role.SECONDARY and writer(disk.image) and not writer(disk.active):
        advice = "end the guest that runs on it: this host is the secondary"
        yield Finding(FAIL, f"{disk.image} is in use, and not by the copy of pair {disk.pair}", advice)
    else:
        yield Finding(OK, f"{disk.image} is there, {amount(size)} as {disk.config.format}")
    left = f"{disk.config.directory} has {amount(free)} left for overlays"
    if free < size * ROOM:
        advice = f"{ROOM:.0%} of the image's size, or more if the guest writes much between two checkpoints"
        yield Finding(WARN, left, advice)
    else:
        yield Finding(OK, left)
