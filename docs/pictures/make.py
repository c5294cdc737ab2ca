"""`make pictures`: docs/pictures/*.svg, of the .dot files beside this one, and of `coloebpf top` in a real lab."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from coloebpf.lab import redis
from coloebpf.service.commands import client, top

HERE = Path(__file__).resolve().parent
NAME = "pictures"
LOOK_S = 4.0  # between the two looks that rates are made of
WIDTH = 80


def coloebpf(*words: str) -> None:
    """A command that succeeds."""
    subprocess.run([sys.executable, "-m", "coloebpf", *words], check=True, stdout=subprocess.DEVNULL)


def graphs() -> None:
    """By graphviz."""
    for source in sorted(HERE.glob("*.dot")):
        subprocess.run(["dot", "-Tsvg", "-o", str(source.with_suffix(".svg")), str(source)], check=True)
        print(source.with_suffix(".svg"))


def live() -> None:
    """What `top` shows of a primary under load."""
    coloebpf("lab", "up", "--name", NAME, "--guests", "process", "--", *redis.SERVER)
    try:
        on_client = ("lab", "exec", "client", "--name", NAME, "--")
        coloebpf(*on_client, "redis-cli", "-h", "10.77.0.10", "setrange", "big", "8191", "x")
        load = ("redis-benchmark", "-h", "10.77.0.10", "-c", "20", "-n", "100000", "-l", "get", "big")
        command = [sys.executable, "-m", "coloebpf", *on_client, *load]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as busy:
            last: dict[str, top.Sample] = {}
            console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
            with client.connected(Path(f"/run/coloebpf/lab/{NAME}/primary/control.sock")) as service:
                for _ in range(2):
                    time.sleep(LOOK_S)
                    page = top.page(service.ask("status"), last, time.monotonic())
            console.print(page)
            busy.terminate()
        (HERE / "top.svg").write_text(console.export_svg(title="coloebpf top", unique_id="top"))
        print(HERE / "top.svg")
    finally:
        coloebpf("lab", "down", "--name", NAME)


if __name__ == "__main__":
    graphs()
    live()
