"""The processes that load the hosts' dataplanes: their errors, their deaths, and what an interruption leaves of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coloebpf.errors import BpfError, LabError
from coloebpf.lab import loaders

HANG = 60.0  # seconds; nothing here lasts so long


def touch(path: Path) -> None:
    path.touch()


def fail(text: str) -> None:
    raise BpfError(text)


def die(signum: int) -> None:
    os.kill(os.getpid(), signum)


def end(code: int) -> None:
    os._exit(code)


def hang(started: Path) -> None:
    started.write_text(str(os.getpid()))
    time.sleep(HANG)


def test_every_job_is_done(tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    loaders.run(touch, [(path.name, (path,)) for path in paths])
    assert all(path.exists() for path in paths)


def test_a_jobs_error_is_the_callers() -> None:
    with pytest.raises(BpfError, match="the kernel refuses"):
        loaders.run(fail, [("the primary host", ("the kernel refuses",))])


@pytest.mark.parametrize(
    ("work", "argument", "words"),
    [
        (die, signal.SIGKILL, "the loader of the primary host was killed by SIGKILL before it was done; dmesg"),
        (end, 7, "the loader of the primary host ended with code 7 before it was done"),
    ],
)
def test_a_loader_that_dies_is_one_sentence(work: object, argument: int, words: str) -> None:
    with pytest.raises(LabError, match=words):
        loaders.run(work, [("the primary host", (argument,))])  # type: ignore[arg-type]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_an_error_ends_the_others(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    script = f"""
from pathlib import Path
import time
from tests.lab import test_lab_loaders as t

def work(first):
    if first:
        while not Path({str(path)!r}).exists() or not Path({str(path)!r}).read_text():
            time.sleep(0.01)
        t.fail("no")
    t.hang(Path({str(path)!r}))

if __name__ == "__main__":
    from coloebpf.lab import loaders
    loaders.run(work, [("one", (True,)), ("two", (False,))])
"""
    program = tmp_path / "both.py"
    program.write_text(script)
    done = subprocess.run(
        [sys.executable, program], env=environment(), capture_output=True, text=True, timeout=HANG / 2, check=False
    )
    assert "BpfError: no" in done.stderr
    assert gone(int(path.read_text()))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.getcwd()}


def test_a_terminals_signal_reaches_the_parent_alone(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    script = f"""
import signal
from pathlib import Path
from tests.lab import test_lab_loaders as t

if __name__ == "__main__":
    from coloebpf.lab import loaders
    try:
        loaders.run(t.hang, [("one", (Path({str(path)!r}),))])
    except KeyboardInterrupt:
        print("interrupted")
"""
    program = tmp_path / "parent.py"
    program.write_text(script)
    parent = subprocess.Popen(
        [sys.executable, program],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + HANG / 2
    while (not path.exists() or not path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    status = Path(f"/proc/{path.read_text()}/status").read_text()
    blocked = int(next(line for line in status.splitlines() if line.startswith("SigBlk")).split()[1], 16)
    os.killpg(parent.pid, signal.SIGINT)
    out, errors = parent.communicate(timeout=HANG / 2)
    assert (out, errors) == ("interrupted\n", "")
    assert [number for number in loaders.INTERRUPTIONS if not blocked >> (number - 1) & 1] == []
    assert gone(int(path.read_text()))


@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another thread"])
@pytest.mark.parametrize("late", [False, True], ids=["its handler", "the default"])
def test_a_signal_that_is_held_back_comes_at_the_end(tmp_path: Path, others: int, late: bool) -> None:
    """The kernel gives it to the other thread, and Python calls the handler in this one."""
    program = tmp_path / "held.py"
    program.write_text(f"""
import os, signal, threading, time
from coloebpf.lab import loaders

def interrupt(*_):
    raise KeyboardInterrupt

if not {late}:
    signal.signal(signal.SIGHUP, interrupt)
for _ in range({others}):
    threading.Thread(target=time.sleep, args=({HANG},), daemon=True).start()
try:
    with loaders.held_back(loaders.INTERRUPTIONS):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.2)
        print("after the signal", flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
again = signal.getsignal(signal.SIGHUP) is interrupt, signal.pthread_sigmask(signal.SIG_BLOCK, [])
print("again as before" if again == (True, set()) else again)
""")
    done = subprocess.run(
        [sys.executable, program], env=environment(), capture_output=True, text=True, timeout=HANG, check=False
    )
    if late:
        assert (done.stdout, done.returncode) == ("after the signal\n", -signal.SIGHUP)
    else:
        assert (done.stdout, done.stderr) == ("after the signal\ninterrupted\nagain as before\n", "")
