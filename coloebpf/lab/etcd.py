"""The lab's own etcd: one member, on the management network, for labs whose arbiter it is."""

from __future__ import annotations

import subprocess
import time
import urllib.request

from coloebpf.errors import LabError
from coloebpf.lab.plan import ARBITER, MANAGEMENT, LabPlan
from coloebpf.netns import inside

URL = f"http://{MANAGEMENT[ARBITER]}:2379"
PEER_URL = "http://127.0.0.1:2380"  # of the members among themselves; there is one
LOG = "etcd.log"
START_TIMEOUT = 30.0  # seconds to elect itself on a busy machine; it takes one
ASK_TIMEOUT = 1.0  # seconds for one answer


def start(plan: LabPlan) -> subprocess.Popen[bytes]:
    """Returns when it answers; what it knew before is still there. It ends with the lab. Raises LabError."""
    with inside(plan.namespace(ARBITER)), open(plan.run_dir / LOG, "ab") as log:
        try:
            process = subprocess.Popen(
                [
                    *("etcd", "--data-dir", str(plan.run_dir / "etcd"), "--logger", "zap"),
                    *("--listen-client-urls", URL, "--advertise-client-urls", URL),
                    *("--listen-peer-urls", PEER_URL, "--initial-advertise-peer-urls", PEER_URL),
                    *("--initial-cluster", f"default={PEER_URL}"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"can't run etcd: {error.strerror}") from error
        deadline = time.monotonic() + START_TIMEOUT
        while not _healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the lab's etcd does not answer: see {plan.run_dir / LOG}")
            time.sleep(0.05)
    return process


def _healthy() -> bool:
    """By this thread's network namespace."""
    try:
        with urllib.request.urlopen(f"{URL}/health", timeout=ASK_TIMEOUT) as answer:
            return b'"true"' in answer.read()
    except OSError:
        return False
