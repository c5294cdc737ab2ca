"""Entering a network namespace with the network part alone: `ip netns exec` would also remount /sys and hide bpffs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyroute2 import netns as _netns

from coloebpf.errors import DeviceError

RUN_NETNS = Path("/run/netns")


@contextmanager
def inside(name: str, run: Path = RUN_NETNS) -> Iterator[None]:
    """This thread works in namespace `name` until the block ends. Raises DeviceError if there is no such namespace."""
    path = run / name
    if not path.exists():
        raise DeviceError(f"network namespace {name!r} does not exist ({path})")
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _netns.setns(str(path))
        try:
            yield
        finally:
            _netns.setns(home)
    finally:
        os.close(home)
