"""What a field of a message may be: each check takes the value off the wire and gives the one that the message has."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NoReturn

from coloebpf.model import MAX_PAIRS, Role, State

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")  # of a host or a pair, as the configuration has it
SESSION_BYTES = 16  # of a service instance's random cookie

Check = Callable[[Any], Any]


def wrong(what: str) -> NoReturn:
    raise ValueError(what)


def integer(top: int) -> Check:
    def check(value: Any) -> int:
        # bool is an int to Python, not to us
        return value if type(value) is int and 0 <= value <= top else wrong(f"a number up to {top}")

    return check


def text(longest: int) -> Check:
    def check(value: Any) -> str:
        fits = isinstance(value, str) and len(value) <= longest and value.isprintable()
        return str(value) if fits else wrong(f"a text of {longest} characters at most")

    return check


def name(value: Any) -> str:
    return str(value) if isinstance(value, str) and NAME.fullmatch(value) else wrong("a name")


def digits(count: int) -> Check:
    def check(value: Any) -> str:
        plain = isinstance(value, str) and len(value) == count and not value.strip("0123456789abcdef")
        return str(value) if plain else wrong(f"{count} hexadecimal digits")

    return check


cookie = digits(2 * SESSION_BYTES)


def word(kind: type[Role] | type[State]) -> Check:
    words = {member.name.lower(): member for member in kind}

    def check(value: Any) -> Role | State:
        return words[value] if isinstance(value, str) and value in words else wrong(f"one of {', '.join(words)}")

    return check


def many(check_one: Check, most: int = MAX_PAIRS) -> Check:
    def check(value: Any) -> tuple[Any, ...]:
        fits = isinstance(value, list) and len(value) <= most
        return tuple(map(check_one, value)) if fits else wrong(f"an array of {most} at most")

    return check


def table(build: Callable[[], type[Any]]) -> Check:
    return lambda value: fill(build(), value) if isinstance(value, dict) else wrong("an object")


def by(check: Check) -> dict[str, Check]:
    """Metadata of a field: what its value on the wire has to pass."""
    return {"check": check}


def fill(kind: type[Any], content: dict[str, Any]) -> Any:
    """An instance of `kind`, each field checked. Raises ValueError with the field."""
    fields = dataclasses.fields(kind)
    if content.keys() != {f.name for f in fields}:
        raise ValueError(f"has not just the fields {', '.join(f.name for f in fields)}")
    values = {}
    for f in fields:
        try:
            values[f.name] = f.metadata["check"](content[f.name])
        except ValueError as e:
            raise ValueError(f"{f.name} must be {e}") from e
    return kind(**values)
