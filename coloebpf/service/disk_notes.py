"""Which host's image is the good one: each host notes beside its overlays what it was, and what became of it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from coloebpf.errors import DiskError
from coloebpf.service.disks import ColoDisk


class Part(StrEnum):
    """What this host was the last time that the guest was protected."""

    PRIMARY = "primary"  # the guest ran here, on the image
    SECONDARY = "secondary"  # the image followed
    TAKING_OVER = "taking over"  # libxl was told to make the SVM the guest, and nobody has seen it done
    TAKEN_OVER = "taken over"  # the SVM is the guest; its disk is the image below both overlays
    COMMITTED = "committed"  # ... and QEMU has brought them together in the image


OPEN = (Part.TAKING_OVER, Part.TAKEN_OVER)  # the overlays have what is nowhere else


@dataclass(frozen=True)
class Note:
    """`since`: Unix seconds."""

    part: Part
    since: float


@dataclass(frozen=True)
class Verdict:
    """`good`: whether this host's image is the one; None: nobody can tell from here."""

    good: bool | None
    why: str


def path_of(disk: ColoDisk) -> Path:
    """Where it is noted."""
    return disk.config.directory / f"{disk.pair}.json"


def read(disk: ColoDisk) -> Note | None:
    """None: this host has never had a part in it. Raises DiskError."""
    try:
        found = json.loads(path_of(disk).read_text())
        return Note(Part(found["part"]), float(found["since"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DiskError(f"{path_of(disk)} can't be read: {e}") from e


def write(disk: ColoDisk, part: Part) -> None:
    """It is on the disk when this returns. Raises DiskError."""
    path = path_of(disk)
    draft = path.with_suffix(".draft")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with draft.open("w") as file:
            json.dump({"part": part.value, "since": time.time()}, file)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as e:
        raise DiskError(f"{path} can't be written: {e.strerror}") from e


def spare(disk: ColoDisk) -> None:
    """Raises DiskError if the overlays have what is nowhere else."""
    note = read(disk)
    if note is not None and note.part in OPEN:
        raise DiskError(
            f"the overlays of pair {disk.pair} have writes of the guest that are not in {disk.image}, since this host "
            f"took over and QEMU did not end its work: `coloebpf disks which {disk.pair}` says how to keep them"
        )


def by_hand(disk: ColoDisk) -> str:
    """Commands that do QEMU's work: both overlays into the image; and then the note may go."""
    return "\n".join(
        (
            f"qemu-img rebase -u -f qcow2 -F {disk.config.format} -b {disk.image} {disk.hidden}",
            f"qemu-img rebase -u -f qcow2 -F qcow2 -b {disk.hidden} {disk.active}",
            f"qemu-img commit -f qcow2 -b {disk.image} {disk.active}",
            f"rm {path_of(disk)}",
        )
    )


def verdict(disk: ColoDisk, state: str) -> Verdict:
    """`state`: the pair's, of the service's status; "" if it does not answer. Raises DiskError."""
    note = read(disk)
    if note is None:
        return Verdict(None, "this host has had no part in a protection of this disk: ask on the other one")
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note.since))
    match note.part:
        case Part.COMMITTED:
            return Verdict(True, f"this host took over; its QEMU had brought it all together in the image at {when}")
        case Part.TAKEN_OVER:
            return Verdict(
                True,
                f"this host took over at {when}, and the image is whole only together with both overlays: its QEMU is "
                "still at bringing them together, or was ended in the middle. If the guest's domain is gone, do it by "
                f"hand:\n{by_hand(disk)}",
            )
        case Part.TAKING_OVER:
            return Verdict(
                None,
                f"this host was to take over at {when}, and nobody has seen whether it did. If the guest has run here "
                f"since, it is this one, with both overlays:\n{by_hand(disk)}\nIf not, it is the other host's",
            )
        case Part.SECONDARY:
            return Verdict(False, f"since {when} this host's image has followed the other one, which had the guest")
        case Part.PRIMARY if state in ("lockstep", "checkpointing", "syncing", "passthrough", "unprotected"):
            return Verdict(True, f"the guest has run on it since {when}, and this host is {state}: it has the word")
        case Part.PRIMARY:
            return Verdict(
                None,
                f"the guest ran on it since {when}"
                + (f", and this host is {state} now" if state else ", and no service answers here")
                + f": it is this one, unless the other host has taken over. There: coloebpf disks which {disk.pair}",
            )
