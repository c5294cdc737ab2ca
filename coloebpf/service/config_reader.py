"""From tables of TOML to dataclasses whose fields are settings and tables; every mistake with its key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from coloebpf.errors import ConfigError

Table = TypeVar("Table")


@dataclass(frozen=True)
class Mistake:
    """One thing wrong in a file. `key`: dotted, indexes from 0, such as pair[0].nic[1].vif; "" for the file itself."""

    file: Path
    key: str
    wrong: str
    right: str

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ' ' if self.key else ''}{self.wrong}: {self.right}"


class ConfigErrors(ConfigError):
    """All that is wrong in a file, a line a mistake."""

    def __init__(self, mistakes: list[Mistake]) -> None:
        super().__init__("\n".join(str(mistake) for mistake in mistakes))
        self.mistakes = tuple(mistakes)


def name_of(field: dataclasses.Field[Any]) -> str:
    """A field's key in the file."""
    return str(field.metadata.get("name", field.name))


class Reader:
    """Reads one file's tables and collects what is wrong.

    A table that has a mistake reads as None, in a row of tables too, so that what depends on several of them can still
    be checked; nobody but the reader's caller may see such an object.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.mistakes: list[Mistake] = []

    def wrong(self, key: str, wrong: str, right: str) -> None:
        """Notes a mistake."""
        self.mistakes.append(Mistake(self.file, key, wrong, right))

    def read(self, cls: type[Table], raw: Mapping[str, Any], at: str = "") -> Table | None:
        """An object of `cls`, or None if a setting of its own is missing or wrong."""
        dot = f"{at}." if at else ""
        fields = {name_of(f): f for f in dataclasses.fields(cls) if f.metadata}  # type: ignore[arg-type]
        for unknown in sorted(raw.keys() - fields.keys()):
            close = get_close_matches(unknown, fields, n=1)
            known = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(fields)}"
            self.wrong(dot + unknown, "is no key of this table", known)
        values: dict[str, Any] = {}
        before = len(self.mistakes)
        for name, field in fields.items():
            if "kind" in field.metadata:
                self._setting(field, raw, name, dot + name, values)
        good = len(self.mistakes) == before
        for name, field in fields.items():
            if "table" in field.metadata:
                self._tables(field, raw, name, dot + name, values)
        return cls(**values) if good else None

    def _setting(
        self, field: dataclasses.Field[Any], raw: Mapping[str, Any], name: str, key: str, values: dict[str, Any]
    ) -> None:
        kind = field.metadata["kind"]
        if name in raw:
            try:
                values[field.name] = kind.read(raw[name])
            except ValueError as e:
                self.wrong(key, str(e), f"must be {kind.right}")
        elif field.default is dataclasses.MISSING:
            self.wrong(key, "is missing", f"must be {kind.right}")

    def _tables(
        self, field: dataclasses.Field[Any], raw: Mapping[str, Any], name: str, key: str, values: dict[str, Any]
    ) -> None:
        cls, many, optional = field.metadata["table"], field.metadata["many"], field.default is not dataclasses.MISSING
        given, head = raw.get(name, [] if many else {}), re.sub(r"\[\d+\]", "", key)
        if many:
            if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
                self.wrong(key, "is no row of tables", f"write [[{head}]]")
            elif not given and not optional:
                self.wrong(key, "is missing", f"at least one table [[{head}]]")
            else:
                values[field.name] = tuple(self.read(cls, each, f"{key}[{i}]") for i, each in enumerate(given))
        elif not isinstance(given, dict):
            self.wrong(key, "is no table", f"write [{head}]")
        elif name in raw or not optional:
            values[field.name] = self.read(cls, given, key)
        values.setdefault(field.name, () if many else None if not optional else field.default)
