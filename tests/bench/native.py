"""Compiles and runs the benchmark's C programs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.bench.errors import BenchError

SOURCES = Path(__file__).parent
COMPILER = "gcc"
FLAGS = ("-O2", "-Wall", "-Wextra", "-pthread")

Meter = Callable[[], Mapping[str, float]]


def build(name: str, directory: Path) -> Path:
    """Compiles NAME.c into `directory`."""
    if shutil.which(COMPILER) is None:
        raise BenchError(f"{COMPILER} is missing, and the feeder is written in C: apt-get install gcc libc6-dev")
    binary = directory / name
    command = [COMPILER, *FLAGS, "-o", str(binary), str(SOURCES / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{name}.c doesn't compile: {done.stderr.strip()}")
    return binary


def options(**values: float) -> list[str]:
    """Long options as the programs take them."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run(command: list[str], meter: Meter | None = None, pass_fds: Sequence[int] = ()) -> tuple[str, dict[str, float]]:
    """Runs it to its end: its last line, and how far the meter went between its marks."""
    readings: list[Mapping[str, float]] = []
    last = ""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, pass_fds=pass_fds) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            last = line
            if line == "mark\n":
                readings.append(meter() if meter else {})
                process.stdin.write("\n")
                process.stdin.flush()
        error = process.stderr.read().strip()
    if process.returncode:
        raise BenchError(f"{Path(command[0]).name} failed: {error} ({' '.join(command)})")
    return last, {key: readings[-1][key] - readings[0][key] for key in readings[0]} if readings else {}
