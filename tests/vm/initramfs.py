"""The initramfs of the machine that shares this host's root: init, busybox, modules and the command to run."""

from pathlib import Path

from coloebpf.lab import image
from coloebpf.lab.image import Kernel

INIT = Path(__file__).with_name("init.sh")
SHARING = ("fs/fuse/fuse.ko", "fs/fuse/virtiofs.ko", "fs/overlayfs/overlay.ko")  # the cloud kernel has no 9p at all


def build(kernel: Kernel, command: str, repo: Path, work_dir: Path, under: str) -> Path:
    """Packs init, busybox, the boot modules and the shell text `command` (run in `repo`); returns the archive.

    `under`: what is process 1 then, "init" for init.sh itself, or "systemd".
    """
    (work_dir / "command").write_text(command + "\n")
    (work_dir / "settings").write_text(f"REPO='{repo}'\nMODULES='{kernel.modules}'\nUNDER='{under}'\n")
    target = work_dir / "initramfs.cpio"
    files = {
        "init": INIT,
        "bin/busybox": image.BUSYBOX,
        "command": work_dir / "command",
        "settings": work_dir / "settings",
        **image.modules(kernel, image.VIRTIO + SHARING),
    }
    image.pack(files, target)
    return target
