"""Xen's own libxl_colo_proxy.c, from Debian's source package, built into a program that drives it as libxl does (xen/peer.c).

Nothing of Xen's is in this repository: the package is fetched once into .cache, by apt, which checks its signature.
"""

from __future__ import annotations

import subprocess
import tarfile
from pathlib import Path

REPO = Path(__file__).parents[2]
CACHE = REPO / ".cache" / "xen-source"
SHIM = Path(__file__).with_name("xen")
WANTED = ("libxl_colo_proxy.c", "libxl_colo.h")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
FETCH_S = 240  # apt-get update and 5 MB


class NotToBeHadError(Exception):
    """The sources can't be had; the sentence says why."""


def peer(cache: Path = CACHE) -> Path:
    """The built program; fetched and compiled if need be. Raises NotToBeHadError, or CalledProcessError of gcc."""
    if not all((cache / name).exists() for name in WANTED):
        _fetch(cache)
    program = cache / "peer"
    sources = [SHIM / "peer.c", cache / "libxl_colo_proxy.c"]
    inputs = [*sources, *SHIM.rglob("*.h"), cache / "libxl_colo.h"]
    if not program.exists() or program.stat().st_mtime < max(path.stat().st_mtime for path in inputs):
        subprocess.run(["gcc", "-O2", "-Wall", "-I", SHIM, "-I", cache, "-o", program, *sources], check=True)
    return program


def _fetch(cache: Path) -> None:
    """Debian 12's Xen. The machine's own apt lists have no sources, so this uses lists of its own."""
    work = cache / "apt"
    (work / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    (work / "sources.list").write_text(f"deb-src [signed-by={KEYRING}] http://deb.debian.org/debian bookworm main\n")
    options = {
        "Dir::Etc::SourceList": work / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": work / "lists",
        "Dir::Cache": work / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Retries": "3",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _run(*apt, "update")
    _run(*apt, "source", "--download-only", "xen", directory=work)
    archives = sorted(work.glob("xen_*.orig.tar.*"))
    if not archives:
        raise NotToBeHadError("Debian's xen source package has no xen_*.orig.tar")
    with tarfile.open(archives[-1]) as archive:
        for member in archive:
            name = Path(member.name).name
            if name in WANTED and "/libs/light/" in member.name:
                content = archive.extractfile(member)
                assert content is not None
                (work / name).write_bytes(content.read())
                (work / name).rename(cache / name)


def _run(*command: str, directory: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NotToBeHadError(f"{command[0]}: {e}") from e
    if done.returncode:
        raise NotToBeHadError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
