"""What the service does to the kernel, for test_unit_file.py to run within the unit's limits.

    python -m tests.service.unit_limits PIN_DIR

Loads and pins the dataplane, hangs it on a NIC of the caller's namespace, works it, and takes it away again.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import sys
from pathlib import Path

from coloebpf.control import Control, State
from coloebpf.dataplane import Dataplane, NicSpec, Role, Sizes, detach

PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN = 65, 1  # linux/prctl.h, kernel 6.3


def deny_write_execute() -> None:
    """What MemoryDenyWriteExecute=yes does; older kernels are left as they are."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0):
        return
    try:
        mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except PermissionError:
        print("memory is never both writable and executable")


def main(pin_dir: Path) -> None:
    deny_write_execute()
    plane = Dataplane.load(pin_dir, Sizes(slots=256, flows=256))
    try:
        plane.attach(NicSpec(0, 0, Role.PRIMARY, "vif0", "fwd0"))
        with Control.open(pin_dir) as control:
            control.set_state(0, State.LOCKSTEP)
            control.suspend(0)
            control.commit(0)
            control.sweep()
            control.events(0)
            control.snapshot()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("fwd0", 0))
    finally:
        detach(pin_dir)
    print("all done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
