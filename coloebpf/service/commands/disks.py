"""`coloebpf disks`: a replicated disk's files on this host."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from coloebpf.errors import ColoError, ConfigError, DiskError
from coloebpf.service import disk_notes
from coloebpf.service.commands import client
from coloebpf.service.config import Config
from coloebpf.service.disks import ColoDisk
from coloebpf.units import amount

SHOW_S = 2.0  # between two words about how far it is


class Answer(NamedTuple):
    """For people, for programs, and the command's exit code."""

    text: str
    fields: dict[str, Any]
    code: int = 0


def disk_of(config: Config, name: str) -> ColoDisk:
    """Raises ConfigError if the pair has none."""
    for pair in config.pairs:
        if pair.name == name:
            if (disk := ColoDisk.of(pair)) is not None:
                return disk
            raise ConfigError(f"pair {name} has no [[pair.libxl_colo.disk]] in {config.path}")
    raise ConfigError(f"{config.path} has no pair {name}; there are: {', '.join(p.name for p in config.pairs)}")


def prepare(disk: ColoDisk) -> Answer:
    """Fresh overlays. Raises DiskError."""
    disk_notes.spare(disk)
    disk.prepare()
    files = {"active": str(disk.active), "hidden": str(disk.hidden)}
    return Answer(f"{disk.active} and {disk.hidden} are fresh and empty, for {amount(disk.size())}", files)


def checksum(disk: ColoDisk, clock: Callable[[], float] = time.monotonic) -> Answer:
    """Of the image, with progress on stderr. Raises DiskError."""
    last = clock()

    def show(done: int, total: int) -> None:
        nonlocal last
        if clock() - last > SHOW_S:
            last = clock()
            print(f"{amount(done)} of {amount(total)}", file=sys.stderr)

    found = disk.checksum(show)
    return Answer(f"{found}  {disk.image}", {"image": str(disk.image), "sha256": found})


def compare(disk: ColoDisk, other: str | None) -> Answer:
    """`other`: what `sum` says on the other host; None: says how to have it. Raises DiskError."""
    if other is not None and (len(other) != 64 or not set(other.lower()) <= set("0123456789abcdef")):
        raise DiskError(f"{other} is no SHA-256, which `coloebpf disks sum {disk.pair}` prints")
    own = checksum(disk).fields["sha256"]
    fields = {"image": str(disk.image), "sha256": own, "other": other, "equal": None if other is None else False}
    if other is None:
        return Answer(
            f"{own} here. On the other host: coloebpf disks sum {disk.pair}\n"
            f"and then here: coloebpf disks compare {disk.pair} --with WHAT-IT-SAYS",
            fields,
        )
    if own == other.lower():
        return Answer("both images are the same", fields | {"equal": True})
    text = f"the images differ: {own} here. Copy the good one, with the guest off, and start it by `xl create -p`"
    return Answer(text, fields, 1)


def which(disk: ColoDisk, socket: Path) -> Answer:
    """The one good image. Raises DiskError."""
    found = disk_notes.verdict(disk, _state(disk.pair, socket))
    where = {True: f"{disk.image} on this host", False: "the other host's image", None: "nobody can tell from here"}
    text = f"{where[found.good]}: {found.why}"
    return Answer(text, {"this_host": found.good, "why": found.why}, 2 if found.good is None else 0)


def _state(pair: str, socket: Path) -> str:
    try:
        with client.connected(socket) as service:
            pairs = service.ask("status")["service"]["pairs"]
    except ColoError:
        return ""
    return next((str(one["state"]) for one in pairs if one["name"] == pair), "")
