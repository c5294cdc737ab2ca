"""Preflight: each missing piece is one sentence, and headers are found where Debian puts them."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from coloebpf.errors import PreflightError
from coloebpf.preflight import Headers, Preflight

RELEASE = "6.1.0-56-amd64"


def no_mount(target: Path) -> None:
    """A mount(2) that this test does not expect."""
    raise AssertionError(f"mounted {target}")


def refused_mount(target: Path) -> None:
    """A mount(2) in a container."""
    raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(target))


def bcc_there(name: str) -> ModuleType:
    """An import that works."""
    return ModuleType(name)


def bcc_missing(name: str) -> ModuleType:
    """An import that does not."""
    raise ImportError(f"No module named '{name}'")


def file(root: Path, name: str, text: str = "") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine on which all is well."""
    file(tmp_path, "proc/self/mounts", "proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw 0 0\n")
    file(tmp_path, "sys/kernel/btf/vmlinux")
    file(tmp_path, f"lib/modules/{RELEASE}/build/include/generated/autoconf.h")
    return tmp_path


def machine(
    root: Path,
    euid: int = 0,
    release: str = RELEASE,
    mount: Callable[[Path], None] = no_mount,
    load: Callable[[str], ModuleType] = bcc_there,
) -> Preflight:
    return Preflight(root, euid, release, mount, load)


def test_a_good_machine_passes_and_bcc_finds_the_running_kernels_headers(root: Path) -> None:
    assert machine(root).check() == Headers(None, ())


def test_not_root(root: Path) -> None:
    with pytest.raises(PreflightError, match="must run as root"):
        machine(root, euid=1000).check()


@pytest.mark.parametrize("release", ["5.14.21-generic", "4.19.0-27-amd64", "5.4"])
def test_an_old_kernel(root: Path, release: str) -> None:
    with pytest.raises(PreflightError, match=rf"kernel {release} is too old: .*5\.15"):
        machine(root, release=release).check()


@pytest.mark.parametrize("release", ["5.15.0-91-generic", "6.1.0-56-cloud-amd64", "6.18.44-fc", "10.0-rc1"])
def test_a_new_enough_kernel(root: Path, release: str) -> None:
    machine(root, release=release).check_kernel()


def test_a_release_without_a_version(root: Path) -> None:
    with pytest.raises(PreflightError, match="can't read a version"):
        machine(root, release="custom").check()


def test_no_btf(root: Path) -> None:
    (root / "sys/kernel/btf/vmlinux").unlink()
    with pytest.raises(PreflightError, match="no BTF"):
        machine(root).check()


@pytest.mark.parametrize(
    "mounts",
    [
        "proc /proc proc rw 0 0\n",
        "bpf /sys/fs/bpf2 bpf rw 0 0\n",
        "bpf /sys/fs/bpf bpf rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n",  # hidden by another mount
    ],
)
def test_bpffs_is_mounted_where_it_is_missing(root: Path, mounts: str) -> None:
    file(root, "proc/self/mounts", mounts)
    mounted: list[Path] = []
    machine(root, mount=mounted.append).check()
    assert mounted == [root / "sys/fs/bpf"]


def test_bpffs_that_can_not_be_mounted(root: Path) -> None:
    file(root, "proc/self/mounts", "")
    with pytest.raises(PreflightError, match=r"none can be mounted \(Operation not permitted\).*mount -t bpf"):
        machine(root, mount=refused_mount).check()


def test_bcc_is_not_installed(root: Path) -> None:
    with pytest.raises(PreflightError, match="apt-get install python3-bpfcc"):
        machine(root, load=bcc_missing).check()


def test_bcc_is_installed_but_the_venv_hides_it(root: Path) -> None:
    (root / "usr/lib/python3/dist-packages/bcc").mkdir(parents=True)
    with pytest.raises(PreflightError, match="--system-site-packages"):
        machine(root, load=bcc_missing).check()


def test_no_headers(root: Path) -> None:
    with pytest.raises(PreflightError, match=r"no kernel headers.*6\.18\.1.*linux-headers-amd64"):
        machine(root, release="6.18.1").check()


def test_debians_newest_headers_serve_another_kernel(root: Path) -> None:
    for version in ("6.1.0-9", "6.1.0-56", "5.10.0-30"):
        file(root, f"usr/src/linux-headers-{version}-amd64/include/generated/autoconf.h")
        file(root, f"usr/src/linux-headers-{version}-common/Makefile")
    file(root, "usr/src/linux-headers-6.1.0-57-amd64/include/generated/autoconf.h")  # its -common tree is not there
    headers = machine(root, release="6.18.1").check()
    source = root / "usr/src/linux-headers-6.1.0-56-common"
    arch = root / "usr/src/linux-headers-6.1.0-56-amd64"
    assert headers.source == source
    assert headers.cflags == (
        f"-I{arch}/include",
        f"-I{arch}/include/generated/uapi",
        f"-I{arch}/arch/x86/include/generated",
        f"-I{arch}/arch/x86/include/generated/uapi",
    )
    environ: dict[str, str] = {}
    headers.tell_bcc(environ)
    assert environ == {"BCC_KERNEL_SOURCE": str(source)}


def test_the_cloud_kernels_headers_have_the_same_common_tree(root: Path) -> None:
    file(root, "usr/src/linux-headers-6.1.0-56-cloud-amd64/include/generated/autoconf.h")
    file(root, "usr/src/linux-headers-6.1.0-56-common/Makefile")
    assert machine(root, release="6.18.1").kernel_headers().source == root / "usr/src/linux-headers-6.1.0-56-common"


def test_a_dangling_build_link_is_no_headers(root: Path) -> None:
    (root / "lib/modules/6.5.0").mkdir(parents=True)
    (root / "lib/modules/6.5.0/build").symlink_to("/usr/src/linux-headers-gone")
    with pytest.raises(PreflightError, match="no kernel headers"):
        machine(root, release="6.5.0").check()


def test_the_running_kernels_own_headers_leave_bccs_environment_alone() -> None:
    environ: dict[str, str] = {}
    Headers(None, ()).tell_bcc(environ)
    assert environ == {}


@pytest.mark.kernel
def test_this_machine_passes_and_its_headers_compile_a_program() -> None:
    code = """
import os
from coloebpf.preflight import Preflight
headers = Preflight().check()
headers.tell_bcc(os.environ)
from bcc import BPF
source = '#include <uapi/linux/if_ether.h>\\nint hook(struct __sk_buff *skb) { return skb->len > ETH_HLEN ? 7 : 8; }'
program = BPF(text=source, cflags=list(headers.cflags)).load_func(b"hook", BPF.SCHED_CLS)
print("loaded", program.fd > 0)
"""
    # Its own process: libbcc reads BCC_KERNEL_SOURCE there, and the mount namespace is not ours.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "loaded True\n", done.stderr


@pytest.mark.kernel
def test_bpffs_is_really_mounted_in_a_mount_namespace_without_one() -> None:
    code = """
import ctypes, os
from pathlib import Path
from coloebpf.preflight import Preflight
libc = ctypes.CDLL(None, use_errno=True)
NEWNS, REC_PRIVATE = 0x20000, 0x44000
assert libc.unshare(NEWNS) == 0 and libc.mount(None, b"/", None, REC_PRIVATE, None) == 0
while libc.umount2(b"/sys/fs/bpf", 2) == 0:
    pass
Preflight().ensure_bpffs()
mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
print([mount[2] for mount in mounts if mount[1] == "/sys/fs/bpf"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "['bpf']\n", done.stderr
