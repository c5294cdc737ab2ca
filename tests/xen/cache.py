"""What takes long to make is made once, and kept under a name that tells what it was made from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

KEPT = 2  # results of a step: another worktree's lab may stand on the one before


def tell(sentence: str) -> None:
    """Progress, for whoever waits."""
    print(f"xen-lab: {sentence}", flush=True)


class Cache:
    """A directory of results, `<step>-<digest of its inputs>`; a step's result is a directory too."""

    def __init__(self, root: Path, say: Callable[[str], None] = tell) -> None:
        self._root, self._say = root, say

    def step(self, name: str, inputs: Sequence[str | Path], make: Callable[[Path], None]) -> Path:
        """The result that `make` has put into the directory it was given, maybe long ago.

        An input is a text, or a file of which the contents count.
        """
        self._root.mkdir(parents=True, exist_ok=True)
        target = self._root / f"{name}-{_digest(inputs)}"
        with self._locked(name):
            if target.exists():
                os.utime(target)
                self._say(f"{name}: from the cache")
                return target
            start = time.monotonic()
            self._say(f"{name} ...")
            draft = self._root / f".{name}"
            remove(draft)
            draft.mkdir()
            make(draft)
            draft.rename(target)
            os.utime(target)
            self._say(f"{name}: made in {time.monotonic() - start:.0f} s")
            self._prune(name)
        return target

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Two labs that want the same thing make it once."""
        with (self._root / f".{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _prune(self, name: str) -> None:
        results = sorted(self._root.glob(f"{name}-" + "[0-9a-f]" * 16), key=lambda path: path.stat().st_mtime)
        for old in results[:-KEPT]:
            remove(old)


def remove(tree: Path) -> None:
    """Never across a mount: a root file system that is being made may have this machine's /dev in it."""
    subprocess.run(["rm", "-rf", "--one-file-system", str(tree)], check=True)


def _digest(inputs: Sequence[str | Path]) -> str:
    digest = hashlib.sha256()
    for each in inputs:
        data = each.read_bytes() if isinstance(each, Path) else each.encode()
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()[:16]
