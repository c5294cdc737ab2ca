"""`coloebpf config example`: a file with every key, made of the same table that reads it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from enum import Enum
from typing import Any

from coloebpf.service.config import Config
from coloebpf.service.config_reader import name_of

HEAD = """\
# coloebpf's configuration of one host, in TOML. The other host has its own, with the same pairs, names and numbers,
# the roles and the peer turned round. A key behind a # has that value anyway.
"""


def example() -> str:
    """A whole file that load() takes."""
    return HEAD + "\n".join(_table(Config, "", "")) + "\n"


def _toml(value: Any) -> str:
    """A setting's value as TOML."""
    if isinstance(value, Enum):
        return json.dumps(value.name.lower())
    if isinstance(value, int | list):
        return json.dumps(value)
    return json.dumps("" if value is None else str(value))


def _table(cls: Any, at: str, head: str) -> Iterator[str]:
    fields = [field for field in dataclasses.fields(cls) if field.metadata]
    settings = [field for field in fields if "kind" in field.metadata]
    if settings:
        says = cls.__doc__.partition(": ")[2].splitlines()[0]
        yield from ("", f"# {says[0].upper()}{says[1:]}", head)
    for field in settings:
        shown, default = field.metadata["shown"], field.default
        given = shown is not dataclasses.MISSING
        usual = f"usually {_toml(default)}" if given and default is not dataclasses.MISSING else ""
        notes = "; ".join(filter(None, (field.metadata["doc"], field.metadata["kind"].brief, usual)))
        yield f"# {notes[0].upper()}{notes[1:]}"
        yield f"{'' if given else '#'}{name_of(field)} = {_toml(shown if given else default)}"
    for field in fields:
        if "table" in field.metadata:
            key = f"{at}{name_of(field)}"
            head = f"[[{key}]]" if field.metadata["many"] else f"[{key}]"
            for line in _table(field.metadata["table"], f"{key}.", head):
                yield f"#{line}" if field.metadata["off"] and line and not line.startswith("#") else line
