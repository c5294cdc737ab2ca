"""A live copy that goes on until it is wanted: orders to a library in libxl's save helper (deploy/xen/precopy)."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "COLOEBPF_HOLD"  # the library looks there
MARKS = (VARIABLE.encode(), b"xc_domain_save")  # are in the library


class Hold:
    """`path`: of the files that tell `library`, without their ends. Its methods raise OSError."""

    def __init__(self, path: Path, library: Path) -> None:
        self.path, self.library = path, library
        self._go, self._end = Path(f"{path}.go"), Path(f"{path}.end")

    def begin(self) -> None:
        """What an earlier copy was told does not count."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._go.unlink(missing_ok=True)
        self._end.unlink(missing_ok=True)

    def go(self) -> None:
        """The guest is to be stopped now, and its rest sent."""
        self._go.touch()

    def end(self) -> None:
        """It comes to nothing; the guest need not be stopped for that."""
        self._end.touch()

    @property
    def kept(self) -> bool:
        """Nothing was said yet."""
        return not self._go.exists() and not self._end.exists()

    def preload(self) -> None:
        """Into the helpers that this process's libxl starts."""
        os.environ |= {"LD_PRELOAD": str(self.library), VARIABLE: str(self.path)}
