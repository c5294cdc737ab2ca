"""One line an event: a sentence, then key=value pairs that a program can read."""

from __future__ import annotations

import logging
import re

_PLAIN = re.compile(r"[\w.:/@%+,\[\]-]+", re.ASCII)


def _shown(value: object) -> str:
    """A value as one word; quoted where it has spaces, quotes, or nothing in it."""
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def line(sentence: str, **fields: object) -> str:
    """`sentence key=value ...`; fields that are None are left out."""
    return " ".join([sentence, *(f"{key}={_shown(value)}" for key, value in fields.items() if value is not None)])


def say(logger: logging.Logger, level: int, sentence: str, **fields: object) -> None:
    """Logs one event; nothing is put together for a level that nobody hears."""
    if logger.isEnabledFor(level):
        logger.log(level, "%s", line(sentence, **fields))
