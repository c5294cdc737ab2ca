"""What must be there before a program can be compiled and loaded: one clear sentence for each missing piece."""

import ctypes
import importlib
import os
import re
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from coloebpf.errors import PreflightError

OLDEST_KERNEL = (5, 15)  # the oldest long-term kernel with all that the programs use
BPFFS = Path("sys/fs/bpf")
HEADERS = re.compile(r"linux-headers-(?P<version>\d.*?)-(?:cloud-)?amd64")
ARCH_INCLUDES = ("include", "include/generated/uapi", "arch/x86/include/generated", "arch/x86/include/generated/uapi")


@dataclass(frozen=True)
class Headers:
    """Where bcc finds kernel headers. `source` None: it finds those of the running kernel by itself."""

    source: Path | None
    cflags: tuple[str, ...]

    def tell_bcc(self, environ: MutableMapping[str, str]) -> None:
        """Sets the variable that libbcc reads in its own process at each compilation."""
        if self.source is not None:
            environ["BCC_KERNEL_SOURCE"] = str(self.source)


def mount_bpffs(target: Path) -> None:
    """mount(2) of a bpf file system at `target`; raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(target), b"bpf", 0, None) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(target))


@dataclass(frozen=True)
class Preflight:
    """The machine to check; the defaults are this one."""

    root: Path = Path("/")
    euid: int | None = None
    release: str | None = None
    mount: Callable[[Path], None] = mount_bpffs
    load: Callable[[str], ModuleType] = importlib.import_module

    def check(self) -> Headers:
        """Everything that loading programs needs; mounts bpffs if it is not mounted yet."""
        self.check_root()
        self.check_kernel()
        self.check_btf()
        self.ensure_bpffs()
        self.check_bcc()
        return self.kernel_headers()

    def check_root(self) -> None:
        """Loading programs, network namespaces and mounts all need root."""
        euid = os.geteuid() if self.euid is None else self.euid
        if euid != 0:
            raise PreflightError("coloebpf must run as root: it loads eBPF programs and configures network devices")

    def check_kernel(self) -> None:
        """The running kernel is new enough."""
        release = self._release()
        found = re.match(r"(\d+)\.(\d+)", release)
        if found is None:
            raise PreflightError(f"can't read a version out of the kernel's release {release!r}")
        if (int(found[1]), int(found[2])) < OLDEST_KERNEL:
            oldest = ".".join(map(str, OLDEST_KERNEL))
            raise PreflightError(f"kernel {release} is too old: coloebpf needs {oldest} or newer")

    def check_btf(self) -> None:
        """The kernel has BTF: spin locks in map values and readable map dumps depend on it."""
        if not (self.root / "sys/kernel/btf/vmlinux").exists():
            raise PreflightError(
                "this kernel has no BTF (no /sys/kernel/btf/vmlinux): use one built with CONFIG_DEBUG_INFO_BTF=y"
            )

    def ensure_bpffs(self) -> None:
        """A bpf file system is mounted at /sys/fs/bpf; mounts one if not."""
        target = self.root / BPFFS
        if self._bpffs_mounted():
            return
        try:
            self.mount(target)
        except OSError as error:
            raise PreflightError(
                f"no bpf file system at /sys/fs/bpf and none can be mounted ({error.strerror}): "
                "try `mount -t bpf bpf /sys/fs/bpf`"
            ) from error

    def check_bcc(self) -> None:
        """bcc can be imported by this Python."""
        try:
            self.load("bcc")
        except ImportError as error:
            if (self.root / "usr/lib/python3/dist-packages/bcc").is_dir():
                raise PreflightError(
                    f"python3-bpfcc is installed but this Python can't import it ({error}): "
                    "make the venv with `/usr/bin/python3 -m venv --system-site-packages`"
                ) from error
            raise PreflightError(f"bcc is missing ({error}): apt-get install python3-bpfcc") from error

    def kernel_headers(self) -> Headers:
        """The running kernel's headers if they are there, else the newest Debian ones.

        A program compiled with another kernel's headers is as good: coloebpf uses nothing but the stable UAPI of them.
        """
        if (self.root / "lib/modules" / self._release() / "build/include/generated/autoconf.h").exists():
            return Headers(None, ())
        trees: list[tuple[list[int], Path, Path]] = []
        for arch in (self.root / "usr/src").glob("linux-headers-*amd64"):
            found = HEADERS.fullmatch(arch.name)
            common = arch.with_name(f"linux-headers-{found['version']}-common") if found else arch
            if found and common.is_dir():
                trees.append(([int(number) for number in re.findall(r"\d+", found["version"])], arch, common))
        if not trees:
            raise PreflightError(
                f"no kernel headers, neither the running {self._release()}'s nor Debian's: "
                "apt-get install linux-headers-amd64"
            )
        _, arch, common = max(trees)
        return Headers(common, tuple(f"-I{arch / directory}" for directory in ARCH_INCLUDES))

    def _release(self) -> str:
        return os.uname().release if self.release is None else self.release

    def _bpffs_mounted(self) -> bool:
        # The last mount on a path is the one that shows.
        kinds = [
            fields[2]
            for line in (self.root / "proc/self/mounts").read_text().splitlines()
            if (fields := line.split())[1] == f"/{BPFFS}"
        ]
        return bool(kinds) and kinds[-1] == "bpf"
