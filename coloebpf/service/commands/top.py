"""`coloebpf top`: the pairs of this host, live; a plain line for each pair and look where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from coloebpf.errors import NoServiceError
from coloebpf.service.commands import client
from coloebpf.service.status import PERIODIC_MODE
from coloebpf.units import age, duration

MEBI = 1 << 20
COLUMNS = ("pair", "role", "state", "epoch", "ckpt/s", "held", "p99", "MiB/s", "div/s", "uncmp")  # below 80 columns
LOUD = {"halted", "passthrough", "promoted", "unprotected", "UNDECIDED"}  # states that are not what protection is for


@dataclass(frozen=True)
class Sample:
    """What rates are made of, of one pair at one time (s)."""

    at: float
    checkpoints: int
    compared_bytes: int
    divergences: int


def run(
    path: Path, out: TextIO, period_s: float, looks: int | None, pause: Callable[[float], None] = time.sleep
) -> None:
    """Looks every `period_s`, `looks` times or until interrupted. Raises NoServiceError if none answers at first."""
    console = Console(file=out, highlight=False)
    last: dict[str, Sample] = {}
    live = Live(console=console, auto_refresh=False, screen=looks is None) if console.is_terminal else None
    try:
        for reply in _replies(path, period_s, looks, pause):
            if isinstance(reply, NoServiceError):
                shown: RenderableType = Text(f"{reply}", style="bold red")
                lines = [str(reply)]
            elif live is None:
                rows = _rows(reply, last, time.monotonic())
                lines = [", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row, strict=True)) for row in rows]
            else:
                shown = page(reply, last, time.monotonic())
            if live is None:
                for line in lines:
                    console.print(line, markup=False, soft_wrap=True)
                continue
            if not live.is_started:
                live.start()
            live.update(shown, refresh=True)
    except KeyboardInterrupt:
        pass  # the way to leave it
    finally:
        if live is not None:
            live.stop()


def page(reply: dict[str, Any], last: dict[str, Sample], now: float) -> RenderableType:
    """What a terminal shows of a status. `last`: samples of the look before, by pair, which are replaced; `now`: s."""
    return Group(_head(reply), _table(_rows(reply, last, now)), _tail(reply))


def _replies(
    path: Path, period_s: float, looks: int | None, pause: Callable[[float], None]
) -> Iterator[dict[str, Any] | NoServiceError]:
    """One answer a look; a service that is gone is looked for again, for a restart is what an operator watches for."""
    done = 0
    while looks is None or done < looks:
        try:
            with client.connected(path) as service:
                while looks is None or done < looks:
                    reply = service.ask("status")
                    done += 1
                    yield reply
                    if done != looks:
                        pause(period_s)
        except NoServiceError as error:
            if not done:
                raise
            done += 1
            yield error
            if done != looks:
                pause(period_s)


def _rows(reply: dict[str, Any], last: dict[str, Sample], now: float) -> list[list[str]]:
    nics = (reply["dataplane"] or {"nics": []})["nics"]
    return [
        _row(pair, [n for n in nics if n["pair"] == pair["number"]], last, now) for pair in reply["service"]["pairs"]
    ]


def _row(pair: dict[str, Any], nics: list[dict[str, Any]], last: dict[str, Sample], now: float) -> list[str]:
    sample = Sample(
        now,
        sum(pair["checkpoints"].values()),
        sum(nic["compared_bytes"] for nic in nics),
        sum(sum(nic["divergences"].values()) for nic in nics),
    )
    before = last.get(pair["name"])
    last[pair["name"]] = sample

    def rate(new: int, old: int) -> float:
        assert before is not None
        return max(new - old, 0) / max(sample.at - before.at, 1e-3)

    if before is None:  # a rate needs two looks
        rates = ["-", "-", "-"]
    else:
        rates = [
            f"{rate(sample.checkpoints, before.checkpoints):.1f}",
            f"{rate(sample.compared_bytes, before.compared_bytes) / MEBI:.1f}",
            f"{rate(sample.divergences, before.divergences):.1f}",
        ]
    return [
        pair["name"],
        pair["role"][:3],
        _state(pair),
        str(pair["epoch"]),
        rates[0],
        f"{sum(nic['held'] for nic in nics):,}",
        duration(max((nic["holding_ns"]["p99"] for nic in nics), default=None)),
        rates[1],
        rates[2],
        str(len(pair["uncompared"])),
    ]


def _state(pair: dict[str, Any]) -> str:
    if pair["alone_pending"]:
        return "UNDECIDED"  # whatever the state, it waits for the arbiter
    return f"{pair['state']} {pair['mode']}" if pair["mode"] == PERIODIC_MODE else str(pair["state"])


def _head(reply: dict[str, Any]) -> Text:
    service, peer = reply["service"], reply["service"]["peer"]
    text = Text(f"{service['host']}, up {age(service['uptime_ms'])}; ")
    if peer is None:
        return text.append("no peer")
    text.append(f"{peer['name']} ").append(
        "connected" if peer["connected"] else "NOT CONNECTED", style="green" if peer["connected"] else "bold red"
    )
    for path in service["paths"]:
        text.append(f"  {path['name']} ").append(
            "alive" if path["alive"] else "LOST", style="green" if path["alive"] else "bold red"
        )
    return text


def _table(rows: list[list[str]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("pair", "role", "state") else "right")
    for row in rows:
        loud = row[COLUMNS.index("state")].split()[0] in LOUD
        table.add_row(*(Text(cell) for cell in row), style="bold red" if loud else None)
    return table


def _tail(reply: dict[str, Any]) -> Text:
    dataplane = reply["dataplane"]
    if dataplane is None:
        return Text(f"the dataplane can't be read: {reply['dataplane_error']}", style="bold red")
    used = [(name, dataplane[name]["total"] - dataplane[name]["free"]) for name in ("slots", "flows")]
    text = Text(", ".join(f"{number:,} {name} used" for name, number in used))
    for warning in reply["service"]["warnings"]:
        text.append(f"\n{warning}", style="yellow")
    return text
