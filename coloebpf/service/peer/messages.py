"""What the two services say to each other: the messages, and their form on the wire.

A frame is its length (4 bytes, big endian, MAX_BYTES at most) and a JSON object with "v" (VERSION), "type", "seq" and
the fields of the message's class, all of them and no others. `seq` is 1 for the first message of a session and one more
for each that follows: whatever else comes is a repetition, or a gap, and ends the session.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, ClassVar

from coloebpf.aliases import TEXT_LENGTH
from coloebpf.errors import MessageError
from coloebpf.model import MAX_PAIRS, Role, State
from coloebpf.service.peer import fields as wire
from coloebpf.service.peer.witness import GRACE_MAX_MS

VERSION = 2  # one more with each change of the messages' form: services of two versions don't talk to each other
MAX_BYTES = 65_536  # of a frame behind its length; a hello of MAX_PAIRS pairs takes some 8,000
HEADER_BYTES = 4
MAX_REASON = 1000  # characters of a bye
ALIASES_MAX = 256  # entries of one message: some 31,000 bytes
U32, U64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF

_PAIR, _EPOCH, _TIME, _GRACE = (
    wire.integer(MAX_PAIRS - 1),
    wire.integer(U32),
    wire.integer(U64),
    wire.integer(GRACE_MAX_MS),
)


@dataclass(frozen=True)
class PairNote:
    """A pair as its host has it; in a hello."""

    number: int = field(metadata=wire.by(_PAIR))
    name: str = field(metadata=wire.by(wire.name))
    role: Role = field(metadata=wire.by(wire.word(Role)))
    state: State = field(metadata=wire.by(wire.word(State)))
    epoch: int = field(metadata=wire.by(_EPOCH))


@dataclass(frozen=True)
class Hello:
    """First of a session, from both sides.

    `session`: random, the same for the life of the service. `connection`: counts this service's tries to connect.
    `lease_ns`: how long each of this host's grants to speak lasts (witness.py).
    """

    TYPE: ClassVar[str] = "hello"
    name: str = field(metadata=wire.by(wire.name))
    session: str = field(metadata=wire.by(wire.cookie))
    connection: int = field(metadata=wire.by(_TIME))
    lease_ns: int = field(metadata=wire.by(_TIME))
    pairs: tuple[PairNote, ...] = field(metadata=wire.by(wire.many(wire.table(lambda: PairNote))))


@dataclass(frozen=True)
class Beat:
    """A heartbeat (heartbeat.py). `echo`: the highest `number` heard of the other side, `echo_age_ns` ago.

    `granted`: the pairs whose primary, being the other host, may go on speaking because of this beat (witness.py).
    """

    TYPE: ClassVar[str] = "beat"
    number: int = field(metadata=wire.by(wire.integer(U32)))
    echo: int = field(metadata=wire.by(wire.integer(U32)))
    echo_age_ns: int = field(metadata=wire.by(_TIME))
    granted: tuple[int, ...] = field(metadata=wire.by(wire.many(_PAIR)))


@dataclass(frozen=True)
class Aliases:
    """To the secondary, before it is a replica: connections that clients know by other numbers than the guest.

    Part 0 takes the place of all that it had, those that follow add to it (coloebpf/aliases.py has the entries' form).
    """

    TYPE: ClassVar[str] = "aliases"
    pair: int = field(metadata=wire.by(_PAIR))
    request: int = field(metadata=wire.by(_TIME))
    part: int = field(metadata=wire.by(wire.integer(U32)))
    entries: tuple[str, ...] = field(metadata=wire.by(wire.many(wire.digits(TEXT_LENGTH), ALIASES_MAX)))


@dataclass(frozen=True)
class AliasesTaken:
    """The secondary's answer to the `aliases` of the same `request`."""

    TYPE: ClassVar[str] = "aliases_taken"
    pair: int = field(metadata=wire.by(_PAIR))
    request: int = field(metadata=wire.by(_TIME))


@dataclass(frozen=True)
class Prepare:
    """To the secondary: clear the translations now, a checkpoint is about to be asked for."""

    TYPE: ClassVar[str] = "prepare"
    pair: int = field(metadata=wire.by(_PAIR))
    request: int = field(metadata=wire.by(_TIME))


@dataclass(frozen=True)
class Prepared:
    """The secondary's answer to the `prepare` of the same `request`."""

    TYPE: ClassVar[str] = "prepared"
    pair: int = field(metadata=wire.by(_PAIR))
    request: int = field(metadata=wire.by(_TIME))


@dataclass(frozen=True)
class Suspended:
    """The PVM stands still; `epoch` is the new one."""

    TYPE: ClassVar[str] = "suspended"
    pair: int = field(metadata=wire.by(_PAIR))
    epoch: int = field(metadata=wire.by(_EPOCH))


@dataclass(frozen=True)
class Committed:
    """The secondary has the whole state of `epoch`."""

    TYPE: ClassVar[str] = "committed"
    pair: int = field(metadata=wire.by(_PAIR))
    epoch: int = field(metadata=wire.by(_EPOCH))


@dataclass(frozen=True)
class EngineWord:
    """From one engine to the other (engine.Talking)."""

    TYPE: ClassVar[str] = "engine"
    pair: int = field(metadata=wire.by(_PAIR))
    word: str = field(metadata=wire.by(wire.name))
    number: int = field(metadata=wire.by(wire.integer(U32)))
    detail: str = field(metadata=wire.by(wire.text(MAX_REASON)))


@dataclass(frozen=True)
class StateNote:
    """The sender's side of the pair has a new state."""

    TYPE: ClassVar[str] = "state"
    pair: int = field(metadata=wire.by(_PAIR))
    state: State = field(metadata=wire.by(wire.word(State)))
    epoch: int = field(metadata=wire.by(_EPOCH))


@dataclass(frozen=True)
class Restarting:
    """The sender's service is about to end, and wants its silence to mean nothing for `ms` (farewell.py).

    `echo`: the newest beat heard of the other side, from whose sending on it may speak for the pairs `granted` so long.
    """

    TYPE: ClassVar[str] = "restarting"
    ms: int = field(metadata=wire.by(_GRACE))
    echo: int = field(metadata=wire.by(wire.integer(U32)))
    granted: tuple[int, ...] = field(metadata=wire.by(wire.many(_PAIR)))


@dataclass(frozen=True)
class Patience:
    """The answer to `restarting`: so be it, for `ms`; so long the asking host may speak for the pairs `granted`."""

    TYPE: ClassVar[str] = "patience"
    ms: int = field(metadata=wire.by(_GRACE))
    granted: tuple[int, ...] = field(metadata=wire.by(wire.many(_PAIR)))


@dataclass(frozen=True)
class Settled:
    """To the secondary: the primary's right to speak is that of a beat of this session, and no older or longer one."""

    TYPE: ClassVar[str] = "settled"
    pair: int = field(metadata=wire.by(_PAIR))


@dataclass(frozen=True)
class Bye:
    """The service ends on purpose."""

    TYPE: ClassVar[str] = "bye"
    reason: str = field(metadata=wire.by(wire.text(MAX_REASON)))


Message = (
    Hello
    | Beat
    | Aliases
    | AliasesTaken
    | Prepare
    | Prepared
    | Suspended
    | Committed
    | EngineWord
    | StateNote
    | Restarting
    | Patience
    | Settled
    | Bye
)
TYPES: dict[str, type[Message]] = {kind.TYPE: kind for kind in Message.__args__}


def _plain(value: object) -> object:
    if isinstance(value, Role | State):
        return value.name.lower()
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return (
        {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, PairNote)
        else value
    )


def encode(message: Message, seq: int) -> bytes:
    """The message as a frame. Raises MessageError if it is too long, which a field's bounds exclude."""
    fields = {f.name: _plain(getattr(message, f.name)) for f in dataclasses.fields(message)}
    body = _ENCODER.encode({"v": VERSION, "type": message.TYPE, "seq": seq, **fields}).encode()
    if len(body) > MAX_BYTES:
        raise MessageError("oversized", f"a {message.TYPE} of {len(body)} bytes")
    return len(body).to_bytes(HEADER_BYTES, "big") + body


def body_bytes(header: bytes) -> int:
    """Length of the body that follows `header`. Raises MessageError if none can be as long."""
    length = int.from_bytes(header, "big")
    if length > MAX_BYTES:
        raise MessageError("oversized", f"announced {length} bytes, {MAX_BYTES} is the most")
    return length


def decode(body: bytes, seq: int) -> Message:
    """The message in a frame's body, which must be number `seq`. Raises MessageError with what it counts as."""
    content = _json(body)
    version = content.pop("v", None)
    if type(version) is not int or version != VERSION:
        raise MessageError("version", f"version {str(version)[:20]} instead of {VERSION}")
    number = content.pop("seq", None)
    if type(number) is not int or number != seq:
        raise MessageError("replay", f"message number {str(number)[:20]} instead of {seq}")
    name = content.pop("type", None)
    kind = TYPES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise MessageError("malformed", f"type {str(name)[:20]!r} is unknown")
    try:
        message: Message = wire.fill(kind, content)
        return message
    except ValueError as e:
        raise MessageError("malformed", f"{name}: {e}") from e


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else wire.wrong("a key comes twice")


# Made once: json.dumps() and json.loads() would make them anew for each message.
_ENCODER = json.JSONEncoder(separators=(",", ":"))
_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=wire.wrong)


def _json(body: bytes) -> dict[str, Any]:
    try:
        content = _DECODER.decode(body.decode())
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise MessageError("malformed", f"no JSON: {str(e)[:80]}") from e
    if not isinstance(content, dict):
        raise MessageError("malformed", "no JSON object")
    return content
