"""`coloebpf doctor`: what is wrong with this host, before it matters, and what to do about it.

A table of checks; each yields findings. Nothing is changed, and nothing runs that could disturb a running pair.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from coloebpf.errors import ColoError
from coloebpf.service.checks import disks, guest, link, live, machine, network, qemu
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import Config, load
from coloebpf.service.config_reader import ConfigErrors

Check = Callable[[Host], Iterable[Finding]]

# Name of a check -> what does it, in the order in which an operator mends things.
CHECKS: tuple[tuple[str, Check], ...] = (
    ("root", machine.root),
    ("kernel", machine.kernel),
    ("btf", machine.btf),
    ("bpffs", machine.bpffs),
    ("bcc", machine.bcc),
    ("headers", machine.headers),
    ("tools", machine.tools),
    ("memory", machine.memory),
    ("clock", machine.clock),
)
# Those that need a configuration.
CONFIGURED: tuple[tuple[str, Check], ...] = (
    ("devices", network.devices),
    ("forward", network.forward),
    ("hooks", network.hooks),
    ("offloads", network.offloads),
    ("bridge", network.bridge),
    ("xen", guest.toolstack),
    ("guest", guest.configuration),
    ("libxl", live.engine),
    ("disks", disks.replicated),
    ("qemu", qemu.engine),
    ("certificates", link.certificates),
    ("peer", link.peer),
    ("arbiter", link.arbiter),
    ("service", link.service),
)


@dataclass(frozen=True)
class Row:
    """One finding of one check."""

    check: str
    level: str
    text: str
    advice: str


def examine(path: Path, host: Host | None = None) -> list[Row]:
    """All findings on this host (or on one that a test describes), with the configuration at `path`."""
    rows: list[Row] = []
    config: Config | None = None
    try:
        config = load(path)
        rows.append(Row("config", OK, f"{path} is good", ""))
    except ConfigErrors as error:
        rows += [
            Row("config", FAIL, f"{m.file}: {m.key + ' ' if m.key else ''}{m.wrong}", m.right) for m in error.mistakes
        ]
    host = (host or Host(now=time.time())).having(config)
    for name, check in CHECKS if config is None else (*CHECKS, *CONFIGURED):
        rows += _rows(name, check, host)
    return rows


def _rows(name: str, check: Check, host: Host) -> Iterator[Row]:
    try:
        for finding in check(host):
            yield Row(name, finding.level, finding.text, finding.advice)
    except ColoError as error:
        yield Row(name, FAIL, str(error), "")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        yield Row(name, WARN, f"can't be checked ({where}{error.strerror})", "run it as root")


def exit_code(rows: Sequence[Row]) -> int:
    """0 unless something fails; a warning is no failure."""
    return int(any(row.level == FAIL for row in rows))


def as_dict(rows: Sequence[Row]) -> dict[str, Any]:
    """As JSON knows it."""
    return {"findings": [asdict(row) for row in rows], **{level: _count(rows, level) for level in (OK, WARN, FAIL)}}


def text(rows: Sequence[Row]) -> str:
    """For people, below 80 columns: a finding, and under it what to do."""
    lines = []
    for row in rows:
        head = f"{row.level.upper() if row.level == FAIL else row.level:5}{row.check:13}"
        lines += textwrap.wrap(row.text, 79, initial_indent=head, subsequent_indent=" " * 18, break_on_hyphens=False)
        if row.advice:
            lines += textwrap.wrap(
                row.advice, 79, initial_indent=" " * 16 + "> ", subsequent_indent=" " * 18, break_on_hyphens=False
            )
    lines += ["", f"{_count(rows, OK)} ok, {_count(rows, WARN)} to look at, {_count(rows, FAIL)} failed"]
    return "\n".join(lines)


def _count(rows: Sequence[Row], level: str) -> int:
    return sum(row.level == level for row in rows)
