"""The disk that both hosts boot from: Debian's packages, coloebpf's own needs, and what makes a lab's host of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coloebpf.errors import LabError
from coloebpf.lab import image
from coloebpf.source import BPF_DIR
from tests.xen import apt, guests
from tests.xen.cache import Cache
from tests.xen.modules import load_order
from tests.xen.plan import CACHE, DIRECT, HOSTS, XenPlan

REPO = BPF_DIR.parent
HERE = Path(__file__).parent
INSTALL_DEPS = REPO / "deploy/install-deps.sh"
PYPROJECT = REPO / "pyproject.toml"
IN_DOM0 = Path("/opt/coloebpf")  # as docs/operations.md has it
KEY = "id_ed25519"

XEN = ("xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xenstore-utils", "qemu-system-xen", "linux-image-amd64")
# Remus' own network buffer needs libnl-utils and net-tools; the rest is for whoever looks on.
TOOLS = (
    *(
        "openssh-server",
        "openssh-client",
        "busybox-static",
        "iputils-ping",
        "bridge-utils",
        "socat",
        "tcpdump",
        "strace",
    ),
    *("udev", "nbd-client", "qemu-utils", "libnl-utils", "net-tools", "less", "vim-tiny", "ca-certificates"),
)
# Two thirds of a kernel's modules, and everything to read.
DRIVERS = (
    *("gpu", "media", "infiniband", "usb", "staging", "iio", "hid", "isdn", "mtd", "net/wireless", "bluetooth"),
    *("input", "hwmon"),
)
NEVER_USED = (
    *("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"),
    *("/lib/modules/*/kernel/sound/*", "/lib/modules/*/kernel/arch/x86/kvm/*"),
    *(f"/lib/modules/*/kernel/drivers/{directory}/*" for directory in DRIVERS),
)
DISK_SIZE = "5G"  # sparse
BOOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
SSH_CONFIG = """\
Host *
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    # The cheapest on an emulated CPU that has AES instructions.
    Ciphers aes128-gcm@openssh.com
"""
_HOST_PACKAGES = re.compile(r"^host_packages=\(([^)]*)\)", re.MULTILINE)
SSHD_CONFIG = "PermitRootLogin yes\nUsePAM no\nUseDNS no\nMaxStartups 50\n"


@dataclass(frozen=True)
class Boot:
    """What QEMU boots a host from."""

    hypervisor: Path
    kernel: Path
    initramfs: Path
    disk: Path


def made(cache: Cache, packages: Sequence[Path] = ()) -> Boot:
    """Makes what is not there yet; `packages` (.deb files) replace Debian's own."""
    root = _packages(cache) / "root"
    wheels = _wheels(cache)
    guest = guests.archive(cache, _kernel(root))
    inputs: list[str | Path] = [
        root.parent.name,
        wheels.name,
        guest.parent.name,
        Path(__file__),
        HERE / "dom0_init.sh",
        HERE / "boot_init.sh",
    ]
    inputs += [ssh_key().with_suffix(".pub"), *packages]
    result = cache.step("disk", inputs, lambda draft: _disk(draft, root, wheels, guest, packages))
    return Boot(result / "xen", result / "vmlinuz", result / "initramfs", result / "disk.raw")


def ssh_key() -> Path:
    """Opens the hosts, from outside and from each other; made once."""
    key = CACHE / "keys" / KEY
    if not key.exists():
        key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "coloebpf-xen-lab", "-f", str(key)])
    return key


def _packages(cache: Cache) -> Path:
    wanted = (*XEN, *TOOLS)
    needed = _HOST_PACKAGES.search(INSTALL_DEPS.read_text())
    if needed is None:
        raise LabError(f"{INSTALL_DEPS} has no host_packages")
    versions = apt.versions((*wanted, *needed[1].split()))
    inputs: list[str | Path] = [*apt.sources(), versions, *wanted, *NEVER_USED]
    return cache.step("packages", inputs, lambda draft: _bootstrap(draft / "root", wanted))


def _bootstrap(root: Path, packages: Sequence[str]) -> None:
    hooks = [
        f"--customize-hook=upload {INSTALL_DEPS} /root/install-deps.sh",
        '--customize-hook=chroot "$1" sh /root/lab-install',
    ]
    # The kernel's package would make an initramfs; the hosts have one of their own.
    script = root.parent / "lab-install"
    script.write_text("INITRD=No bash /root/install-deps.sh host\n")
    hooks.insert(0, f"--customize-hook=upload {script} /root/lab-install")
    options = ["--mode=root", "--variant=minbase", "--format=directory", f"--include={','.join(packages)}"]
    options += [f"--dpkgopt=path-exclude={pattern}" for pattern in NEVER_USED]
    # In a mount namespace of its own: what it mounts in the tree is gone with it, however it ends.
    _run(
        ["unshare", "--mount", "mmdebstrap", *options, *hooks, apt.RELEASE, str(root), *apt.sources()],
        env={**os.environ, "INITRD": "No"},
    )


def _wheels(cache: Cache) -> Path:
    """coloebpf's dependencies from PyPI, for this machine's Python, which is dom0's."""
    return cache.step("wheels", [PYPROJECT], _download)


def _download(draft: Path) -> None:
    # A build of coloebpf itself in dom0 needs setuptools.
    _run([sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(draft), str(REPO), "setuptools>=68"])
    for own in draft.glob("coloebpf-*.whl"):
        own.unlink()


def _disk(draft: Path, packages: Path, wheels: Path, guest: Path, debs: Sequence[Path]) -> None:
    kernel = _kernel(packages)
    (draft / "xen").write_bytes(_unpacked(packages / "boot/xen-4.17-amd64.gz"))
    shutil.copy(kernel.image, draft / "vmlinuz")
    drivers = image.modules(kernel, load_order(kernel, BOOT_MODULES))
    image.pack({"init": HERE / "boot_init.sh", "bin/busybox": packages / "bin/busybox", **drivers}, draft / "initramfs")

    root = draft / "root"
    _run(["cp", "--archive", "--reflink=auto", str(packages), str(root)])
    _install(root, wheels, debs)
    _configure(root)
    shutil.copytree(guest.parent, root / "lab", dirs_exist_ok=True)
    shutil.copy(kernel.image, root / "lab/vmlinuz")
    disk = draft / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(_bytes(DISK_SIZE))
    options = ["-q", "-F", "-m", "0", "-O", "^has_journal,^metadata_csum", "-d", str(root)]
    _run(["mkfs.ext4", *options, str(disk)])
    shutil.rmtree(root)


def _install(root: Path, wheels: Path, debs: Sequence[Path]) -> None:
    """Packages of our own, and the project with its venv; the project's files are brought up to date when a host is up."""
    place = root / str(IN_DOM0).lstrip("/")
    place.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPO / name, place)
    (place / "coloebpf").mkdir()
    (place / "coloebpf/__init__.py").touch()
    shutil.copytree(wheels, root / "lab/wheels")
    for deb in debs:
        shutil.copy(deb, root / "lab")
    script = f"""
        set -e
        for deb in /lab/*.deb; do [ ! -e "$deb" ] || found=1; done
        [ -z "$found" ] || dpkg --install --force-downgrade --force-depends /lab/*.deb
        python3 -m venv --system-site-packages {IN_DOM0}/.venv
        {IN_DOM0}/.venv/bin/pip install --quiet --disable-pip-version-check --no-index --find-links /lab/wheels \\
            --config-settings editable_mode=compat --editable {IN_DOM0}
        ln -s {IN_DOM0}/.venv/bin/coloebpf /usr/local/bin/coloebpf
        rm -r /lab/wheels
    """
    _run(["unshare", "--mount", "chroot", str(root), "/bin/sh", "-c", script])


def _configure(root: Path) -> None:
    shutil.copy(HERE / "dom0_init.sh", root / "sbin/lab-init")
    (root / "sbin/lab-init").chmod(0o755)
    home = root / "root/.ssh"
    home.mkdir(mode=0o700, exist_ok=True)
    key = ssh_key()
    shutil.copy(key, home / KEY)
    (home / "authorized_keys").write_bytes(key.with_suffix(".pub").read_bytes())
    (home / "config").write_text(SSH_CONFIG)
    (root / "etc/ssh/sshd_config.d/lab.conf").write_text(SSHD_CONFIG)
    plan = XenPlan()
    names = "".join(f"{plan.address(DIRECT, host)} host{host}\n" for host in HOSTS)
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{names}")
    # dom0's memory stays what the hypervisor's command line says.
    with (root / "etc/xen/xl.conf").open("a") as config:
        config.write('autoballoon="off"\n')
    # nl-qdisc-add looks for its plug-ins where Debian has not put them.
    (root / "usr/lib/x86_64-linux-gnu/libnl").symlink_to("libnl-3")


def _kernel(root: Path) -> image.Kernel:
    images = list(root.glob("boot/vmlinuz-*-amd64"))
    if len(images) != 1:
        raise LabError(f"{len(images)} kernels in {root}/boot, one was expected")
    return image.Kernel(images[0], root / "lib/modules" / images[0].name.removeprefix("vmlinuz-"))


def _unpacked(path: Path) -> bytes:
    return subprocess.run(["zcat", str(path)], check=True, capture_output=True).stdout


def _bytes(size: str) -> int:
    return int(size.removesuffix("G")) << 30


def _run(argv: Sequence[str], env: dict[str, str] | None = None) -> None:
    """Raises LabError with the command's last words."""
    done = subprocess.run(
        ["nice", "-n", "10", *argv],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        words = done.stdout.decode(errors="replace").strip().splitlines()[-20:]
        raise LabError("\n".join([f"{argv[0]} ended with {done.returncode}:", *words]))
