"""Debian packages: where this machine gets them, and in which versions."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

from coloebpf.errors import PreflightError

RELEASE = "bookworm"


def sources(kind: str = "deb") -> list[str]:
    """Lines of a sources.list with the mirrors of this machine's own apt. Raises PreflightError if it knows no Debian 12."""
    columns = "$(SITE) $(CODENAME) $(COMPONENT)"
    listed = _output(["apt-get", "indextargets", "--format", columns, "Created-By: Packages"])
    lines = set()
    for line in listed.splitlines():
        site, codename, component = line.split()
        if codename.split("-")[0] == RELEASE and component == "main":
            lines.add(f"{kind} {site} {codename} main")
    if not lines:
        raise PreflightError(f"apt knows no packages of Debian 12 ({RELEASE}): apt-get update")
    return sorted(lines)


def versions(packages: Iterable[str]) -> str:
    """Which versions would be installed: another one is another input."""
    told = _output(["apt-cache", "policy", *sorted(packages)])
    return "\n".join(line for line in told.splitlines() if not line.startswith(" ") or "Candidate:" in line)


def _output(argv: list[str]) -> str:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=environment).stdout
