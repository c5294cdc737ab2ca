"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from tests.bench import colo_compare


def describe(proc: Path = Path("/proc"), repository: Path = Path(__file__).parents[2]) -> dict[str, str]:
    """CPU, kernel, versions and the commit."""
    cpuinfo = (proc / "cpuinfo").read_text()
    cpu = next((line.partition(":")[2].strip() for line in cpuinfo.splitlines() if "model name" in line), "?")
    where = " of a virtual machine" if "hypervisor" in cpuinfo else ""
    gib = int((proc / "meminfo").read_text().split()[1]) / (1 << 20)
    git = ["git", "-C", str(repository), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "cpu": f"{cpu}, {os.cpu_count()} cores{where}, {gib:.0f} GiB",
        "kernel": platform.release(),
        "peer": colo_compare.version(),
        "commit": commit or "none",
    }
