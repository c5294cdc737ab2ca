"""The checker of histories, against examples and against a search through all orders."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coloebpf.lab.linearizable import Operation, check


def write(value: str, began: float, ended: float | None, key: str = "k") -> Operation:
    return Operation(key, True, value, began, ended)


def read(value: str | None, began: float, ended: float, key: str = "k") -> Operation:
    return Operation(key, False, value, began, ended)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [read(None, 0, 1)],
        [write("a", 0, 1), read("a", 2, 3), write("b", 4, 5), read("b", 6, 7)],
        # While a write is under way, either value may be read, but not the old one after the new one.
        [write("a", 0, 1), write("b", 2, 9), read("a", 3, 4), read("b", 5, 6), read("b", 10, 11)],
        # A write without an answer may happen late, or never.
        [write("a", 0, 1), write("b", 2, None), read("a", 3, 4), read("b", 5, 6)],
        [write("a", 0, 1), write("b", 2, None), read("a", 30, 40)],
        # Two at once, in either order, whatever their ends.
        [write("a", 0, 5), write("b", 1, 4), read("b", 6, 7)],
        [write("a", 0, 5), write("b", 1, 4), read("a", 6, 7)],
        [write("a", 0, 1, "one"), read(None, 2, 3, "other")],
    ],
)
def test_a_linearizable_history_passes(history: list[Operation]) -> None:
    assert check(history) == []


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([write("a", 0, 1), read(None, 2, 3)], "None and 'a'"),  # an acknowledged write is lost
        ([write("a", 0, 1), write("b", 2, 3), read("a", 4, 5)], "'a' and 'b'"),  # it is lost, and an older one is back
        ([write("a", 0, 1), write("b", 2, 9), read("b", 3, 4), read("a", 5, 6)], "'b' and 'a'"),  # first new, then old
        ([write("a", 0, 1), write("b", 2, None), read("b", 3, 4), read("a", 5, 6)], "'a' and 'b'"),
        ([read("a", 0, 1), write("a", 2, 3)], "before it was written"),
        ([read("a", 0, 1)], "never written"),
        ([write("a", 0, 9), write("b", 1, 9), read("a", 10, 11), read("b", 12, 13), read("a", 14, 15)], "'a' and 'b'"),
    ],
)
def test_a_history_that_is_not_linearizable_is_told(history: list[Operation], words: str) -> None:
    found = check(history)
    names = set(words.split(" and "))
    assert any(words in sentence or names <= set(sentence.split()) for sentence in found), found


def test_two_writes_of_one_value_are_refused() -> None:
    with pytest.raises(ValueError, match="two writes of 'a'"):
        check([write("a", 0, 1), write("a", 2, 3)])


def search(history: list[Operation]) -> bool:
    """Wing and Gong: tries every order that keeps what ended before something else began."""

    def go(left: tuple[Operation, ...], value: str | None) -> bool:
        if all(operation.ended is None for operation in left):
            return True
        first_end = min(math.inf if operation.ended is None else operation.ended for operation in left)
        for here, operation in enumerate(left):
            if operation.began > first_end or not (operation.writes or operation.value == value):
                continue
            if go(left[:here] + left[here + 1 :], operation.value if operation.writes else value):
                return True
        return False

    return go(tuple(history), None)


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Up to seven operations whose reads name some write; times often coincide."""
    times = st.integers(0, 8)
    writes = draw(st.integers(0, 4))
    made = []
    for number in range(writes):
        began = draw(times)
        ended = draw(st.one_of(st.none(), st.integers(began, 9)))
        made.append(write(str(number), began, ended))
    for _ in range(draw(st.integers(0, 3))):
        began = draw(times)
        value = draw(st.sampled_from([None, *(str(number) for number in range(writes))]))
        made.append(read(value, began, draw(st.integers(began, 9))))
    return made


@settings(max_examples=2000, deadline=None)
@given(histories())
def test_the_checker_agrees_with_a_search_through_all_orders(history: list[Operation]) -> None:
    assert (check(history) == []) == search(history)
