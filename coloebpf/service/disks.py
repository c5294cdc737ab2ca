"""A guest's disk that libxl and QEMU replicate: its line for xl, and the files of it on one host (docs/xen-disks.md).

On the secondary there are three: the image, which the PVM's writes go into; the hidden overlay, which keeps what they
have overwritten since the last checkpoint; and the active overlay, which has what the SVM has written since then.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coloebpf.errors import DiskError
from coloebpf.service.config import LibxlDisk, PairConfig
from coloebpf.service.config_keys import Address

QEMU_IMG = "qemu-img"
QEMU_IMG_S = 60.0  # for making an empty overlay or reading a header: some ms
CHUNK = 4 << 20  # bytes that are read at once
# The part of the image's size that should be free for overlays: they hold what is written between two checkpoints.
ROOM = 0.1
# QEMU's locks on an image (block/file-posix.c): a lock on byte RAW_LOCK_PERM_BASE + n says that permission n is in use.
WRITE_LOCK = 100 + 1  # BLK_PERM_WRITE is bit 1
F_OFD_GETLK = 36  # fcntl.h; not in Python's fcntl
FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid

Progress = Callable[[int, int], object]  # bytes read, and of how many; what it raises ends the reading


@dataclass(frozen=True, kw_only=True)
class Usage:
    """How large the overlays are, and what is left for them, in bytes. `size`: the image's, as the guest sees it.

    `errors`: checkpoints that failed because a write had not reached the secondary. `follows`: the secondary's disk is
    kept up to date. `uncommitted`: this host has taken over, and its QEMU has not yet brought everything together in
    the image. `good`: whether this host's image is the good one; None: nobody can tell from here.
    """

    image: str
    active: int
    hidden: int
    free: int
    size: int
    errors: int
    follows: bool
    uncommitted: bool
    good: bool | None


@dataclass(frozen=True)
class ColoDisk:
    """As this host's configuration has it. Its methods raise DiskError."""

    pair: str
    config: LibxlDisk

    @classmethod
    def of(cls, pair: PairConfig) -> ColoDisk | None:
        """None: the pair's guest has none."""
        if pair.engine != "libxl-colo" or pair.libxl_colo is None or not pair.libxl_colo.disks:
            return None
        return cls(pair.name, pair.libxl_colo.disks[0])

    @property
    def image(self) -> Path:
        return self.config.image

    @property
    def active(self) -> Path:
        return self.config.directory / f"{self.pair}-active.qcow2"

    @property
    def hidden(self) -> Path:
        return self.config.directory / f"{self.pair}-hidden.qcow2"

    # ---- for xl ----------------------------------------------------------------------------------------------------

    def line(self, secondary: Address | None = None) -> str:
        """What the primary's file has in `disk = [...]`. `secondary`: where that host's QEMU listens."""
        at = secondary or self.config.peer_listen
        return (
            f"vdev={self.config.vdev},format={self.config.format},access=rw,backendtype=qdisk,"
            f"colo,colo-host={at.host},colo-port={at.port},colo-export={self.config.export},"
            f"active-disk={self.active},hidden-disk={self.hidden},target={self.image}"
        )

    def in_libxl(self) -> dict[str, object]:
        """The same in a libxl_domain_config, as far as it matters."""
        at = self.config.peer_listen
        return {
            "pdev_path": str(self.image), "vdev": self.config.vdev, "format": self.config.format, "backend": "qdisk",
            "colo_enable": "True", "colo_host": at.host, "colo_port": at.port, "colo_export": self.config.export,
            "active_disk": str(self.active), "hidden_disk": str(self.hidden),
        }  # fmt: skip

    # ---- files -----------------------------------------------------------------------------------------------------

    def size(self) -> int:
        """The image's, as the guest sees it."""
        found = _qemu_img("info", "--force-share", "--output=json", "-f", self.config.format, str(self.image))
        return int(json.loads(found)["virtual-size"])

    def users(self) -> list[Path]:
        """Those of its files that a QEMU writes to."""
        return [path for path in (self.active, self.hidden, self.image) if writer(path)]

    def prepare(self) -> None:
        """Fresh, empty overlays; what was in older ones is gone."""
        size = self.size()
        for path in self.users():
            raise DiskError(f"{path} is in use: a guest or its copy on this host writes to it")
        drafts = {path: path.with_suffix(".new") for path in (self.hidden, self.active)}
        try:
            try:
                self.config.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            except OSError as e:
                raise DiskError(f"{self.config.directory} can't be made: {e.strerror}") from e
            for draft in drafts.values():
                _qemu_img("create", "-q", "-f", "qcow2", str(draft), str(size))
            for path, draft in drafts.items():
                draft.replace(path)
        finally:
            for draft in drafts.values():
                draft.unlink(missing_ok=True)

    def checksum(self, progress: Progress) -> str:
        """SHA-256 of the image, byte for byte: what `sha256sum` says."""
        digest, done = hashlib.sha256(), 0
        try:
            with self.image.open("rb", buffering=0) as file:
                total = file.seek(0, os.SEEK_END)
                file.seek(0)
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    done += len(chunk)
                    progress(done, total)
        except OSError as e:
            raise DiskError(f"{self.image} can't be read: {e.strerror}") from e
        return digest.hexdigest()

    def usage(self, *, size: int, errors: int, follows: bool, uncommitted: bool, good: bool | None) -> Usage:
        """With what the files say."""
        return Usage(
            image=str(self.image), active=_blocks(self.active), hidden=_blocks(self.hidden),
            free=room(self.config.directory), size=size, errors=errors,
            follows=follows, uncommitted=uncommitted, good=good,
        )  # fmt: skip


def writer(path: Path) -> bool:
    """Whether a QEMU has the file open for writing; one that does not lock (Xen's idle PV backend) is not seen."""
    try:
        with path.open("rb") as file:
            ask = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, WRITE_LOCK, 1, 0)
            kind, *_ = struct.unpack(FLOCK, fcntl.fcntl(file, F_OFD_GETLK, ask))
    except FileNotFoundError:
        return False
    except OSError as e:
        raise DiskError(f"{path} can't be looked at: {e.strerror}") from e
    return bool(kind != fcntl.F_UNLCK)


def room(directory: Path) -> int:
    """Bytes that are free on its file system; 0 if there is none."""
    for place in (directory, *directory.parents):  # it may still have to be made
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return 0


def _blocks(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512  # stat(2)'s unit
    except OSError:
        return 0


def _qemu_img(*args: str) -> Any:
    try:
        done = subprocess.run([QEMU_IMG, *args], capture_output=True, text=True, timeout=QEMU_IMG_S, check=False)
    except FileNotFoundError as e:
        raise DiskError(f"{QEMU_IMG} is not there: apt-get install qemu-utils") from e
    except subprocess.TimeoutExpired as e:
        raise DiskError(f"{QEMU_IMG} {args[0]} has not ended in {QEMU_IMG_S:g} s") from e
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise DiskError(said[0] if said else f"{QEMU_IMG} {args[0]} has ended with {done.returncode}")
    return done.stdout
