"""A user without rights, for what is refused to such a one."""

import subprocess
import sys

import pytest

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")


def need_nobody() -> None:
    """Skips where nobody can't reach this checkout's Python (a clone under /root, say)."""
    if subprocess.run([*AS_NOBODY, "test", "-x", sys.executable], check=False).returncode:
        pytest.skip(f"nobody but root can read {sys.executable}")
