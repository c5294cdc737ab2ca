"""What a changed file means for what is running."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coloebpf.service.config import Config, PairConfig
from coloebpf.service.config_reader import name_of


@dataclass(frozen=True)
class PairChange:
    """A pair that is in both files, by its name. `keys`: what differs, dotted, without the pair's own place.

    `restart`: not all of it can be applied to the running pair.
    """

    old: PairConfig
    new: PairConfig
    keys: tuple[str, ...]
    restart: bool


@dataclass(frozen=True)
class Reload:
    """`unchanged`: not to be touched. The keys are those that differ in sections other than pairs: `live_keys` a reload
    applies, `service_keys` only a restart of the service."""

    unchanged: tuple[PairConfig, ...] = ()
    changed: tuple[PairChange, ...] = ()
    added: tuple[PairConfig, ...] = ()
    removed: tuple[PairConfig, ...] = ()
    service_keys: tuple[str, ...] = ()
    live_keys: tuple[str, ...] = ()


def diff(old: Config, new: Config) -> Reload:
    """From one valid configuration to another. A pair whose name changed is one removed and one added."""
    before = {pair.name: pair for pair in old.pairs}
    after = {pair.name: pair for pair in new.pairs}
    changes: list[PairChange] = []
    unchanged: list[PairConfig] = []
    for name in before.keys() & after.keys():
        found = dict(_differences(before[name], after[name]))
        if found:
            changes.append(PairChange(before[name], after[name], tuple(found), not all(found.values())))
        else:
            unchanged.append(after[name])
    rest = [
        (key, live)
        for section in ("host", "peer", "arbiter")
        for key, live in _differences(getattr(old, section), getattr(new, section), section)
    ]
    return Reload(
        unchanged=tuple(sorted(unchanged, key=lambda pair: pair.number)),
        changed=tuple(sorted(changes, key=lambda change: change.new.number)),
        added=tuple(pair for pair in new.pairs if pair.name not in before),
        removed=tuple(pair for pair in old.pairs if pair.name not in after),
        service_keys=tuple(key for key, live in rest if not live),
        live_keys=tuple(key for key, live in rest if live),
    )


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, bool]]:
    """Keys that differ, and whether a reload can apply each."""
    if old is None or new is None:
        if old is not new:
            yield at, False
        return
    for field in dataclasses.fields(old):
        a, b = getattr(old, field.name), getattr(new, field.name)
        if a == b or not field.metadata:
            continue
        key = f"{at}.{name_of(field)}" if at else name_of(field)
        live = bool(field.metadata["live"])
        if "table" not in field.metadata or live:
            yield key, live
        elif not field.metadata["many"]:
            yield from _differences(a, b, key)
        elif len(a) != len(b):
            yield key, False
        else:
            for i, (one, other) in enumerate(zip(a, b, strict=True)):
                yield from _differences(one, other, f"{key}[{i}]")
