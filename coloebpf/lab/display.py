"""What `lab show` prints: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table

from coloebpf.units import amount, duration

PLAIN_PERIOD = 1.0  # seconds between two plain lines


@dataclass(frozen=True)
class Sample:
    """The primary's counters at one time."""

    at: float
    requests: int
    compared_bytes: int
    released_packets: int
    held: int
    held_p50_ns: float | None
    held_p99_ns: float | None
    divergences: int

    @classmethod
    def of(cls, nic: dict[str, Any], requests: int, at: float) -> Sample:
        return cls(
            at=at,
            requests=requests,
            compared_bytes=nic["compared_bytes"],
            released_packets=nic["released_packets"],
            held=nic["held"],
            held_p50_ns=nic["holding_ns"]["p50"],
            held_p99_ns=nic["holding_ns"]["p99"],
            divergences=sum(n for why, n in nic["divergences"].items() if not why.startswith("missing")),
        )


class Display:
    """Prints phases, samples and the summary."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)
        self._live: Live | None = None
        self._last: Sample | None = None
        self._printed = 0.0

    def say(self, text: str) -> None:
        """A sentence about what happens now."""
        self.settle()
        self._console.print(text, markup=False, soft_wrap=True)

    def sample(self, label: str, sample: Sample) -> None:
        """Show the newest counters; rates are those since the one before."""
        cells = _cells(sample, self._last)
        self._last = sample
        if self._console.is_terminal:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8)
                self._live.start()
            self._live.update(_table(label, cells))
        elif time.monotonic() - self._printed >= PLAIN_PERIOD:
            self._printed = time.monotonic()
            self._console.print(
                f"  {label}: " + ", ".join(f"{name} {value}" for name, value in cells), markup=False, soft_wrap=True
            )

    def settle(self) -> None:
        """Leave the live table as it is and go on below it."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def summary(self, checks: list[tuple[str, bool]], facts: list[tuple[str, str]]) -> None:
        """Each check with its outcome, then the figures."""
        self.settle()
        self._console.print()
        for text, held in checks:
            self._console.print(f"[{'green' if held else 'bold red'}]{'ok    ' if held else 'FAILED'}[/] {text}")
        self._console.print()
        for name, value in facts:
            self._console.print(f"{name:28} {value}", markup=False, soft_wrap=True)


def _cells(sample: Sample, last: Sample | None) -> list[tuple[str, str]]:
    rate = (sample.requests - last.requests) / (sample.at - last.at) if last and sample.at > last.at else 0
    return [
        ("requests/s", f"{rate:,.0f}"),
        ("compared", amount(sample.compared_bytes)),
        ("released", f"{sample.released_packets:,}"),
        ("held", f"{sample.held}"),
        ("held p50", duration(sample.held_p50_ns)),
        ("p99", duration(sample.held_p99_ns)),
        ("diverged", f"{sample.divergences}"),
    ]


def _table(label: str, cells: list[tuple[str, str]]) -> Table:
    table = Table(title=label, title_justify="left")
    for name, _ in cells:
        table.add_column(name, justify="right")
    table.add_row(*(value for _, value in cells))
    return table
