"""The Debian package, and clean Debian 12 roots to install it in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[2]
TOOLS = ("mmdebstrap", "dpkg-buildpackage", "lintian")
NEXT = "0.1.1~test"  # the version that an upgrade brings
BASE = TREE / ".cache" / "debian-root.tar"  # minimal Debian 12
STEP_S = 900.0  # for the longest step, on a busy machine


@dataclass(frozen=True)
class Packages:
    """Of this tree, and the same with a higher version."""

    now: Path
    later: Path


@dataclass(frozen=True)
class Root:
    """A Debian root file system of its own on this kernel; `path` is where it is mounted."""

    path: Path

    def run(self, *command: str, timeout: float = STEP_S) -> subprocess.CompletedProcess[str]:
        """A command in it."""
        environ = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "DEBIAN_FRONTEND": "noninteractive",
            "LC_ALL": "C.UTF-8",
        }
        return subprocess.run(
            ["chroot", str(self.path), *command],
            capture_output=True, text=True, check=False, timeout=timeout, env=environ, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def must(self, *command: str, timeout: float = STEP_S) -> str:
        """Output of a command that succeeds."""
        done = self.run(*command, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    def install(self, package: Path) -> None:
        """With apt, and what it depends on; as on a server, nothing that is only recommended."""
        shutil.copy(package, self.path / "tmp")
        try:
            self.must("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", f"/tmp/{package.name}")
        finally:
            (self.path / "tmp" / package.name).unlink()

    def files(self) -> set[str]:
        """Every path in it that a package could have left."""
        found = set()
        for top in ("etc", "usr", "var", "lib", "opt", "root", "srv"):
            for directory, names, files in os.walk(self.path / top):
                found |= {f"{directory}/{name}".removeprefix(str(self.path)) for name in (*names, *files)}
        return found


def step(*command: str, cwd: Path = TREE) -> None:
    """A command outside that succeeds."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STEP_S, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """Built from this tree."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and {', '.join(missing) or 'nothing else'}: run deploy/install-deps.sh test")
    kept, built = tmp_path_factory.mktemp("packages"), []
    for version in ((), (NEXT,)):
        step("deploy/debian/build", sys.executable, *version)
        (package,) = (TREE / "build").glob("coloebpf_*.deb")
        built.append(Path(shutil.move(package, kept)))
    return Packages(*built)


@contextmanager
def mounted(path: Path, source: Sequence[str]) -> Iterator[None]:
    """`source`: the words of mount(8) before the place."""
    path.mkdir(parents=True, exist_ok=True)
    step("mount", *source, str(path))
    try:
        yield
    finally:
        step("umount", "--recursive", str(path))


@pytest.fixture(scope="session")
def root(packages: Packages, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    """Minimal, with apt, and with the kernel's file systems: what a dom0 has before anything is installed."""
    if not BASE.exists():
        BASE.parent.mkdir(exist_ok=True)
        made = BASE.with_suffix(".new.tar")
        step("mmdebstrap", "--variant=apt", '--aptopt=Acquire::Retries "3"', "bookworm", str(made))
        made.rename(BASE)
    path = tmp_path_factory.mktemp("debian")
    step("tar", "-xf", str(BASE), "-C", str(path))
    shutil.copy("/etc/resolv.conf", path / "etc")
    with ExitStack() as stack:
        stack.enter_context(mounted(path, ("--bind", str(path))))  # `ip netns exec` wants `/` to be a mount
        for name, source in (
            ("proc", ("-t", "proc", "proc")),
            ("sys", ("--rbind", "--make-rslave", "/sys")),
            ("dev", ("--rbind", "--make-rslave", "/dev")),
            ("run", ("-t", "tmpfs", "tmpfs")),
        ):
            stack.enter_context(mounted(path / name, source))
        yield Root(path)
    shutil.rmtree(path)
