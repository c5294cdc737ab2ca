"""A line of the log can be read back: a sentence, then key=value."""

from __future__ import annotations

import logging
import shlex

import pytest

from coloebpf.service.log import line, say


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (7, "k=7"),
        (True, "k=True"),
        ("fd77::10", "k=fd77::10"),
        ("/run/x.sock", "k=/run/x.sock"),
        ("", 'k=""'),
        ("two words", 'k="two words"'),
        ('a "quoted" one', 'k="a \\"quoted\\" one"'),
        ("back\\slash", 'k="back\\\\slash"'),
        ("two\nlines", 'k="two\\nlines"'),
        ("a=b", 'k="a=b"'),
        ("größe", 'k="größe"'),
    ],
)
def test_a_value(value: object, shown: str) -> None:
    assert line("it happened", k=value) == f"it happened {shown}"


def test_fields_keep_their_order_and_none_is_left_out() -> None:
    assert line("it happened", b=1, a=None, c="x y") == 'it happened b=1 c="x y"'
    assert shlex.split(line("it happened", c="x y"))[2:] == ["c=x y"]


def test_a_level_that_nobody_hears_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("was put into words")

    logger = logging.getLogger("coloebpf.test")
    caplog.set_level(logging.INFO, "coloebpf.test")
    say(logger, logging.DEBUG, "it happened", k=Costly())
    say(logger, logging.INFO, "100 %", k=1)
    assert [record.getMessage() for record in caplog.records] == ["100 % k=1"]
