"""Commands in virtual machines that run beside all other tests, on CPU time that nobody else wants (SCHED_IDLE).

Emulation takes ten minutes and other tests wait most of their time. `python -m tests.vm.ahead DIRECTORY COMMAND` is one of them, a process
of its own: what it starts has its scheduling policy, and ends with it.
"""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from coloebpf.lab import image
from tests.vm import machine
from tests.vm.machine import Result, VmError

REPO = Path(__file__).resolve().parents[2]
RESULT, SAID = "result.json", "said.log"
LIMIT_S = 4000  # emulation is 10 to 20 times slower than the machine below it, which has other things to do
BOOT_LIMIT_S = 900
END_S = 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Ahead:
    """One of them, started at once."""

    def __init__(self, command: str, work_dir: Path) -> None:
        self._dir = work_dir
        argv = ["chrt", "--idle", "0", sys.executable, "-m", "tests.vm.ahead", str(work_dir), command]
        with (work_dir / SAID).open("wb") as said:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=said, stderr=said, cwd=REPO)

    def result(self) -> Result:
        """Waits for it. Raises VmError with what was said if there is none."""
        if self._process.wait() or not (self._dir / RESULT).exists():
            raise VmError((self._dir / SAID).read_text())
        return Result(**json.loads((self._dir / RESULT).read_text()))

    def end(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(work_dir: Path, command: str) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the machine ends with its `with` blocks
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)  # also when the tests are killed
    kernel = image.find_kernel()
    if kernel is None:
        sys.exit("no linux-image-cloud-amd64 of Debian 12: run deploy/install-deps.sh test")
    try:
        result = machine.run(
            kernel, command, repo=REPO, work_dir=work_dir, timeout_s=LIMIT_S, boot_limit_s=BOOT_LIMIT_S
        )
    except VmError as e:
        sys.exit(str(e))
    (work_dir / RESULT).write_text(json.dumps(asdict(result)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
