"""Going over all entries, of which there may be many: in slices, between which an event loop takes turns."""

from __future__ import annotations

import pytest

from coloebpf import bpfsys
from coloebpf.aliases import Aliases
from tests.unit.rig import Rig
from tests.unit.test_aliases import age, aliases, anew, text_of, texts_of
from tests.unit.test_translate import Connection

pytestmark = pytest.mark.kernel

__all__ = ["aliases"]  # a fixture


def many(count: int) -> list[str]:
    """Entries for the ports from 1 on."""
    return [text_of(port) for port in range(1, count + 1)]


SLICES = 3


def test_the_event_loop_gets_its_turns(rig: Rig, aliases: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody looks at more than a slice of the map at a time, and all come up once."""
    monkeypatch.setattr("coloebpf.aliases.SLICE", 10)
    entries = many(10 * SLICES)
    anew(aliases, entries)
    parts = list(aliases.texts())
    assert [len(part) for part in parts] == [10] * SLICES
    assert sorted(text for part in parts for text in part) == entries
    assert len(list(aliases.end_idle())) == SLICES
    assert len(list(aliases.clear())) == SLICES
    assert texts_of(aliases) == []
    assert list(aliases.end_idle()) == []
    assert not rig.control.aliased(1)


def test_an_entry_that_goes_meanwhile_hides_no_other(
    rig: Rig, aliases: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one at which a slice has ended: from there the kernel begins again."""
    monkeypatch.setattr("coloebpf.aliases.SLICE", 10)
    anew(aliases, many(30))
    walk = aliases.texts()
    found = next(walk)
    gone = bpfsys.some_keys(rig.control.fd("aliases"), rig.control.shapes.key("aliases"), None, 10)[-1]
    assert bpfsys.delete(rig.control.fd("aliases"), gone)
    found += [text for part in walk for text in part]
    assert sorted(found) == many(30)


def test_what_comes_while_others_end_is_looked_for(rig: Rig, aliases: Aliases, monkeypatch: pytest.MonkeyPatch) -> None:
    """The walk has passed its place."""
    c = Connection(rig)
    anew(aliases, [text_of(99, end="reset")])
    age(rig)
    slices = iter([bpfsys.keys(rig.control.fd("aliases"), rig.control.shapes.key("aliases")), []])
    walk = aliases.end_idle()
    with monkeypatch.context() as patch:
        patch.setattr("coloebpf.bpfsys.some_keys", lambda *_: next(slices))
        next(walk)
        aliases.take([text_of(c.port)])
        assert list(walk) == []
    assert rig.control.aliased(1)
    assert texts_of(aliases) == [text_of(c.port)]
