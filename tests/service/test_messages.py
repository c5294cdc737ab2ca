"""The messages' form: what one side writes the other reads, and nothing else gets through."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloebpf.aliases import TEXT_LENGTH
from coloebpf.errors import MessageError
from coloebpf.model import MAX_PAIRS, Role, State
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import (
    ALIASES_MAX,
    Aliases,
    AliasesTaken,
    Beat,
    Bye,
    Committed,
    EngineWord,
    Hello,
    Message,
    PairNote,
    Patience,
    Prepare,
    Prepared,
    Restarting,
    Settled,
    StateNote,
    Suspended,
)
from coloebpf.service.status import REFUSALS

PAIR = PairNote(3, "web", Role.PRIMARY, State.LOCKSTEP, 17)
EXAMPLES: list[Message] = [
    Hello("a", "0123456789abcdef" * 2, 1, 300_000_000, (PAIR,)),
    Beat(1, 0, 0, ()),
    Beat(0xFFFFFFFF, 5, 1_000_000, (0, 63)),
    Prepare(0, 1),
    Prepared(63, 0xFFFFFFFFFFFFFFFF),
    Suspended(1, 2),
    Committed(1, 0xFFFFFFFF),
    EngineWord(5, "standby", 0xFFFFFFFF, "127.0.0.1 7790 00ff"),
    Restarting(5000, 7, (0, 3)),
    Patience(5000, ()),
    Settled(3),
    StateNote(1, State.HALTED, 9),
    Bye("stopped by the operator"),
    Aliases(2, 1, 0, ()),
    Aliases(2, 2, 1, ("0f" * (TEXT_LENGTH // 2),) * ALIASES_MAX),
    AliasesTaken(2, 1),
]


def body(message: Message, seq: int = 1) -> bytes:
    return messages.encode(message, seq)[messages.HEADER_BYTES :]


def changed(message: Message, **fields: Any) -> bytes:
    """The message's body with some fields set, or left out where they are None."""
    content = json.loads(body(message)) | fields
    return json.dumps({key: value for key, value in content.items() if value is not None}).encode()


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: m.TYPE)
def test_what_is_written_is_read(message: Message) -> None:
    frame = messages.encode(message, 7)
    assert messages.body_bytes(frame[:4]) == len(frame) - 4
    assert messages.decode(frame[4:], 7) == message


def test_every_type_has_an_example() -> None:
    assert {message.TYPE for message in EXAMPLES} == set(messages.TYPES)


def test_the_form_on_the_wire() -> None:
    """Other versions will have to read this, so it does not change by accident."""
    assert json.loads(body(EXAMPLES[0])) == {
        "v": 2, "type": "hello", "seq": 1, "name": "a", "session": "0123456789abcdef" * 2, "connection": 1, "lease_ns": 300_000_000,
        "pairs": [{"number": 3, "name": "web", "role": "primary", "state": "lockstep", "epoch": 17}],
    }  # fmt: skip


def test_the_longest_hello_fits() -> None:
    note = PairNote(63, "a" * 63, Role.SECONDARY, State.CHECKPOINTING, 0xFFFFFFFF)
    hello = Hello("a" * 63, "f" * 32, messages.U64, messages.U64, (note,) * MAX_PAIRS)
    assert messages.decode(body(hello, messages.U64), messages.U64) == hello


def test_what_is_too_long_is_not_sent() -> None:
    note = PairNote(63, "a" * 1000, Role.SECONDARY, State.CHECKPOINTING, 0)
    with pytest.raises(MessageError, match="a hello of"):
        messages.encode(Hello("a", "f" * 32, 0, 0, (note,) * MAX_PAIRS), 1)


def test_the_version_is_that_of_these_messages() -> None:
    """Whoever adds a message, or changes one, changes VERSION first, and then this."""
    kinds = [PairNote, *messages.TYPES.values()]
    forms = {kind.__name__: [field.name for field in dataclasses.fields(kind)] for kind in kinds}
    told = hashlib.sha256(json.dumps([forms, TEXT_LENGTH]).encode()).hexdigest()
    assert (messages.VERSION, told[:8]) == (2, "f6e11dc3")


def test_lengths() -> None:
    assert messages.body_bytes((65_536).to_bytes(4, "big")) == 65_536
    with pytest.raises(MessageError, match="announced 65537") as caught:
        messages.body_bytes((65_537).to_bytes(4, "big"))
    assert caught.value.kind == "oversized"
    with pytest.raises(MessageError):
        messages.body_bytes(b"\xff\xff\xff\xff")


BEAT, HELLO, STATE, ALIASES = EXAMPLES[1], EXAMPLES[0], EXAMPLES[8], EXAMPLES[-2]


@pytest.mark.parametrize(
    ("given_body", "kind"),
    [
        (b"", "malformed"),
        (b"GET / HTTP/1.1\r\n", "malformed"),
        (b"\xff\xfe{}", "malformed"),
        (b"[]", "malformed"),
        (b"null", "malformed"),
        (b"[" * 60_000, "malformed"),
        (b'{"v":2,"seq":' + b"9" * 60_000 + b"}", "malformed"),
        (b'{"v":2,"seq":1,"type":"settled","pair":NaN}', "malformed"),
        (b'{"v":2,"seq":1,"type":"settled","pair":1,"pair":2}', "malformed"),
        (changed(BEAT, v=1), "version"),
        (changed(BEAT, v=None), "version"),
        (changed(BEAT, v="2"), "version"),
        (changed(BEAT, v=True), "version"),
        (changed(BEAT, seq=0), "replay"),
        (changed(BEAT, seq=2), "replay"),
        (changed(BEAT, seq=None), "replay"),
        (changed(BEAT, seq=True), "replay"),
        (changed(BEAT, seq=1.0), "replay"),
        (changed(BEAT, type="shutdown"), "malformed"),
        (changed(BEAT, type=["beat"]), "malformed"),
        (changed(BEAT, type=None), "malformed"),
        (changed(BEAT, number=None), "malformed"),
        (changed(BEAT, more=1), "malformed"),
        (changed(BEAT, number=-1), "malformed"),
        (changed(BEAT, number=2**32), "malformed"),
        (changed(BEAT, number=1.5), "malformed"),
        (changed(BEAT, number=True), "malformed"),
        (changed(BEAT, granted=[64]), "malformed"),
        (changed(BEAT, granted=[0] * 65), "malformed"),
        (changed(BEAT, granted={}), "malformed"),
        (changed(HELLO, session="0" * 31), "malformed"),
        (changed(HELLO, session="G" * 32), "malformed"),
        (changed(HELLO, session=0), "malformed"),
        (changed(HELLO, name="a\nb"), "malformed"),
        (changed(HELLO, name="a" * 64), "malformed"),
        (changed(HELLO, name=""), "malformed"),
        (changed(HELLO, pairs=[1]), "malformed"),
        (changed(HELLO, pairs=[{}]), "malformed"),
        (changed(STATE, state="on fire"), "malformed"),
        (changed(STATE, state=2), "malformed"),
        (changed(ALIASES, entries=["0f" * (TEXT_LENGTH // 2)] * (ALIASES_MAX + 1)), "malformed"),
        (changed(ALIASES, entries=["0g" * (TEXT_LENGTH // 2)]), "malformed"),
        (changed(ALIASES, entries=["0f"]), "malformed"),
        (changed(EXAMPLES[9], reason="x" * 1001), "malformed"),
        (changed(EXAMPLES[9], reason="line\nbreak"), "malformed"),
    ],
)
def test_what_does_not_get_through(given_body: bytes, kind: str) -> None:
    with pytest.raises(MessageError) as caught:
        messages.decode(given_body, 1)
    assert caught.value.kind == kind
    assert kind in REFUSALS
    assert len(str(caught.value)) < 300  # it goes into the log


def test_an_error_names_the_field() -> None:
    with pytest.raises(MessageError, match=r"hello: pairs must be role must be one of primary, secondary"):
        messages.decode(changed(HELLO, pairs=[{"number": 3, "name": "w", "role": 1, "state": "halted", "epoch": 1}]), 1)


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else(garbage: bytes) -> None:
    with pytest.raises(MessageError):
        messages.decode(garbage, 1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(EXAMPLES), st.data())
def test_any_field_of_any_kind_is_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    content = json.loads(body(message))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = data.draw(json_values)
    kinds = set(REFUSALS)
    try:
        read = messages.decode(json.dumps(content).encode(), 1)
    except MessageError as e:
        kinds.remove(e.kind)  # raises for a kind that nobody counts
    else:
        assert messages.decode(body(read), 1) == read
