"""The kernel that the guest boots, and the initramfs that goes with it."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

INIT = Path(__file__).with_name("init.sh")
BUSYBOX = Path("/bin/busybox")  # Debian's busybox-static
# In the order in which they load; Debian's cloud kernel has all of virtio as modules, and no 9p at all.
BOOT_MODULES = (
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "fs/fuse/fuse.ko",
    "fs/fuse/virtiofs.ko",
    "fs/overlayfs/overlay.ko",
)


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the directory of its modules."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        """What `uname -r` says under it."""
        return self.modules.name


def find_kernel(roots: tuple[Path, ...]) -> Kernel | None:
    """The newest linux-image-cloud-amd64 below the first of `roots` that has one."""
    for root in roots:
        images = sorted(root.glob("boot/vmlinuz-6.1.*-cloud-amd64"), key=_version)
        for image in reversed(images):
            modules = root / "lib/modules" / image.name.removeprefix("vmlinuz-")
            if (modules / "kernel").is_dir():
                return Kernel(image, modules)
    return None


def build(kernel: Kernel, command: str, repo: Path, work_dir: Path) -> Path:
    """Packs init, busybox, the boot modules and the shell text `command` (run in `repo`); returns the archive."""
    tree = work_dir / "initramfs"
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    shutil.copy(INIT, tree / "init")
    (tree / "init").chmod(0o755)
    for number, module in enumerate(BOOT_MODULES):
        source = kernel.modules / "kernel" / module
        shutil.copy(source, tree / "modules" / f"{number:02}-{source.name}")
    (tree / "command").write_text(command + "\n")
    (tree / "settings").write_text(f"REPO='{repo}'\nMODULES='{kernel.modules}'\n")
    names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
    archive = subprocess.run(
        ["cpio", "--quiet", "-o", "-H", "newc"], input=names.encode(), cwd=tree, capture_output=True, check=True
    )
    target = work_dir / "initramfs.cpio"
    target.write_bytes(archive.stdout)
    return target


def _version(image: Path) -> list[int]:
    """6.1.0-9 sorts before 6.1.0-56."""
    return [int(part) for part in image.name.replace("-", ".").split(".") if part.isdigit()]
