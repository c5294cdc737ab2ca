"""What a lab's virtual machines boot: Debian's cloud kernel, and a small initramfs out of Debian's packages.

The kernel is unpacked, not installed (deploy/install-deps.sh). The initramfs is packed once and kept under a name that
tells its contents, so that an upgrade of a package makes a new one.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from coloebpf.errors import LabError, PreflightError
from coloebpf.service.peer import pki
from coloebpf.source import BPF_DIR

KERNEL_ROOTS = (BPF_DIR.parent / ".cache/vm-kernel", Path("/"))
CACHE = Path("/var/cache/coloebpf")
INIT = Path(__file__).with_name("guest_init.sh")
BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
# In the order in which they load; Debian's cloud kernel has all of virtio as modules.
VIRTIO = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
)
NETWORK = ("net/core/failover.ko", "drivers/net/net_failover.ko", "drivers/net/virtio_net.ko")
SERVERS = ("redis-server", "dropbear")
# What the guest is known by, and who may log in: made once, the same for all labs of this machine.
KEYS = "guest-keys"
HOST_KEY, CLIENT_KEY, AUTHORIZED = "ssh-host", "ssh-client", "authorized_keys"
TLS_NAME = "guest"  # in the server's certificate
IN_GUEST = {  # file of KEYS -> its place in the guest
    HOST_KEY: "etc/dropbear/dropbear_ed25519_host_key",
    AUTHORIZED: "root/.ssh/authorized_keys",
    "ca.pem": "etc/redis/ca.pem",
    f"{TLS_NAME}.pem": "etc/redis/server.pem",
    f"{TLS_NAME}.key": "etc/redis/server.key",
}

_LIBRARY = re.compile(r"(?:=>\s*)?(/\S+) \(0x")  # of ldd's output


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the directory of its modules."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says under it."""
        return self.modules.name


def find_kernel(roots: tuple[Path, ...] = KERNEL_ROOTS) -> Kernel | None:
    """The newest linux-image-cloud-amd64 of Debian 12 below the first of `roots` that has one."""
    for root in roots:
        images = sorted(root.glob("boot/vmlinuz-6.1.*-cloud-amd64"), key=_version)
        for image in reversed(images):
            modules = root / "lib/modules" / image.name.removeprefix("vmlinuz-")
            if (modules / "kernel").is_dir():
                return Kernel(image, modules)
    return None


def modules(kernel: Kernel, wanted: tuple[str, ...]) -> dict[str, Path]:
    """Where the modules go in an archive: /modules, with names in the order in which they load."""
    paths = [kernel.modules / "kernel" / module for module in wanted]
    return {f"modules/{number:02}-{path.name}": path for number, path in enumerate(paths)}


def pack(files: Mapping[str, Path], target: Path) -> None:
    """Writes an initramfs with `files` (path in it -> file of this machine) to `target`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        tree = Path(directory) / "tree"
        for name, source in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tree / name)  # follows links, keeps modes
        (tree / "init").chmod(0o755)
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        draft = Path(directory) / "archive"
        with draft.open("wb") as archive:
            subprocess.run(
                ["cpio", "--quiet", "-o", "-H", "newc"], input=names.encode(), cwd=tree, stdout=archive, check=True
            )
        os.replace(draft, target)


def of_guest(cache: Path = CACHE) -> tuple[Kernel, Path]:
    """Kernel and initramfs of a lab's guest, packed if need be. Raises PreflightError if a piece is missing."""
    kernel = find_kernel()
    if kernel is None:
        raise PreflightError("no linux-image-cloud-amd64 of Debian 12: run deploy/install-deps.sh lab")
    files = guest_files(modules(kernel, VIRTIO + NETWORK), cache)
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    target = cache / f"guest-{digest.hexdigest()[:16]}.cpio"
    if not target.exists():
        pack(files, target)
        for old in cache.glob("guest-*.cpio"):
            if old != target:
                old.unlink(missing_ok=True)
    return kernel, target


def guest_files(drivers: Mapping[str, Path], cache: Path = CACHE) -> dict[str, Path]:
    """What a guest's initramfs consists of, with `drivers` (see modules()) for the devices that it will find."""
    files = {"init": INIT, "bin/busybox": BUSYBOX, **drivers}
    for server in SERVERS:
        files |= _program(server)
    secrets = keys(cache)
    return files | {place: secrets / name for name, place in IN_GUEST.items()}


def keys(cache: Path = CACHE) -> Path:
    """The directory with the guest's keys, and with the client's (CLIENT_KEY, ca.pem); made if need be."""
    directory = cache / KEYS
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as draft:
        made = Path(draft) / KEYS
        made.mkdir(mode=0o700)
        pki.init_pki(made, [TLS_NAME])
        _ssh_key(made / HOST_KEY)
        (made / AUTHORIZED).write_text(_ssh_key(made / CLIENT_KEY))
        with suppress(OSError):  # another lab was faster: its keys do
            made.rename(directory)
    return directory


def _ssh_key(path: Path) -> str:
    """Makes a key of dropbear's; returns its public half, a line of authorized_keys."""
    command = ["dropbearkey", "-t", "ed25519", "-f", str(path)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in made.stdout.splitlines() if line.startswith("ssh-")]
    if made.returncode or not lines:
        raise LabError(f"dropbearkey makes no key: {made.stderr.strip()}")
    return lines[0] + "\n"


def _program(name: str) -> dict[str, Path]:
    """A dynamically linked program and all its libraries, each where the loader looks for it."""
    found = shutil.which(name)
    if found is None:
        raise PreflightError(f"{name} not found: run deploy/install-deps.sh lab")
    listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False)
    if listed.returncode:
        raise LabError(f"ldd can't tell the libraries of {found}: {listed.stderr.strip()}")
    libraries = [Path(path) for path in _LIBRARY.findall(listed.stdout)]
    return {f"bin/{name}": Path(found), **{str(path).lstrip("/"): path for path in libraries}}


def _version(image: Path) -> list[int]:
    """6.1.0-9 sorts before 6.1.0-56."""
    return [int(part) for part in image.name.replace("-", ".").split(".") if part.isdigit()]
