"""`coloebpf config xl`: what has to change in a guest's own configuration, and why."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import NamedTuple

from coloebpf.errors import ConfigError
from coloebpf.service.checks.live import domain_of, wrong_in
from coloebpf.service.config import Config, PairConfig
from coloebpf.service.disks import ColoDisk
from coloebpf.xen import xlcfg

WIDTH = 79


class Changes(NamedTuple):
    """For people, below 80 columns; and the command's exit code: 1 if there is something to change."""

    text: str
    code: int


def changes(path: Path, config: Config) -> Changes:
    """Of the guest whose file this is. Raises ConfigError if no pair is for it."""
    pair = _pair(path, config)
    lines = []
    for wrong in wrong_in(path, pair):
        lines += textwrap.wrap(wrong.text[0].upper() + wrong.text[1:] + ":", WIDTH)
        lines += ["    " + wrong.advice, ""]
    if not lines:
        return Changes(f"{path} is as engine {pair.engine} of pair {pair.name} needs it", 0)
    paused = " -p" if ColoDisk.of(pair) is not None else ""  # the images must be the same when it begins to write
    return Changes("\n".join([*lines, f"Start the guest anew with it: xl shutdown, xl create{paused}."]), 1)


def _pair(path: Path, config: Config) -> PairConfig:
    try:
        name = xlcfg.settings(path.read_text(errors="replace")).get("name")
    except OSError as e:
        raise ConfigError(f"{path} can't be read: {e.strerror}") from e
    guests = {domain_of(pair): pair for pair in config.pairs if pair.on_ports}
    if name not in guests:
        known = ", ".join(guests) or "none"
        raise ConfigError(
            f'{config.path} has no pair with domain = "{name}" whose NICs are on ports; there are: {known}. '
            "What libxl-colo without a stream_listen needs, `coloebpf doctor` says of /etc/xen/NAME.cfg"
        )
    return guests[name]
