"""What a lab needs of the machine, checked before anything of it is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping

from coloebpf.errors import PreflightError
from coloebpf.preflight import Headers, Preflight

TOOLS = {"ethtool": "ethtool", "ip": "iproute2"}  # of every lab; program -> Debian's package
# Of one with virtual machines.
VIRTUAL = {
    "qemu-system-x86_64": "qemu-system-x86",
    "redis-server": "redis-server",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "dropbear": "dropbear-bin",
}
ETCD = {"etcd": "etcd-server"}  # of a lab whose arbiter it is


def check(tools: Mapping[str, str] | None = None, preflight: Callable[[], Headers] | None = None) -> None:
    """Raises PreflightError, one sentence, for the first piece that is missing. `tools`: more of them, as TOOLS."""
    (preflight or Preflight().check)()
    missing = {tool: package for tool, package in {**TOOLS, **(tools or {})}.items() if not shutil.which(tool)}
    if missing:
        raise PreflightError(
            f"{', '.join(missing)} not found: apt-get install {' '.join(dict.fromkeys(missing.values()))}"
        )
