"""What a key of the configuration may hold: each kind says what is right, and reads a value of TOML."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

IFNAMSIZ = 15  # characters of a device's name, linux/if.h
SUN_PATH = 107  # bytes of a UNIX socket's path, unix(7): 108 with the NUL
PROTOCOLS = {"icmp": 1, "tcp": 6, "udp": 17, "esp": 50, "icmpv6": 58, "sctp": 132}  # IANA's numbers
HOUR_MS = 3_600_000
MULTICAST_BIT = 1  # of a MAC address's first byte

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_ID = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,62}")
_FILE = re.compile(r"/[^\s,:'\"]+")
_DEVICE = re.compile(rf"[^\s/:]{{1,{IFNAMSIZ}}}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")

Member = TypeVar("Member", bound=Enum)


class Address(NamedTuple):
    """Where to listen or connect: what asyncio's functions take as host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """No other machine can reach it."""
        return ipaddress.ip_address(self.host).is_loopback


@dataclass(frozen=True)
class Kind:
    """`right`: what a value must be, as the end of "must be ..."; `read` raises ValueError for anything else.

    `brief`: that again for an example, "" where the example's own value says it.
    """

    right: str
    read: Callable[[Any], Any]
    brief: str = ""


MISSING = dataclasses.MISSING


def setting(kind: Kind, doc: str, default: Any = MISSING, shown: Any = MISSING, *, live: bool = False) -> Any:
    """A field that is a key, required if it has no `default`.

    `shown`: what the example has, as TOML writes it. `live`: a reload changes it in what is running.
    """
    return dataclasses.field(default=default, metadata={"kind": kind, "doc": doc, "shown": shown, "live": live})


def table(
    cls: type, name: str, doc: str, default: Any = MISSING, *, many: bool = False, live: bool = False, off: bool = False
) -> Any:
    """A field that is a table `[name]`, or with `many` a row of `[[name]]`; without `default` it is always there.

    `off`: the example has it behind #, since it does not go with the rest of the example.
    """
    metadata = {"table": cls, "name": name, "doc": doc, "many": many, "live": live, "off": off}
    return dataclasses.field(default=default, metadata=metadata)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("is no text")
    return value


def _matching(pattern: re.Pattern[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not pattern.fullmatch(_text(value)):
            raise ValueError(f"is {value!r}")
        return str(value)

    return read


def integer(low: int, high: int, unit: str = "") -> Kind:
    """A whole number, both ends included."""

    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"is {value!r}")
        if not low <= value <= high:
            raise ValueError(f"is {value}")
        return value

    limits = f"from {low} to {high}"
    return Kind(
        f"a whole number{' of ' + unit if unit else ''} {limits}", read, f"{limits}{' ' + unit if unit else ''}"
    )


def ms(low: int, high: int) -> Kind:
    """A time in milliseconds."""
    return integer(low, high, "milliseconds")


def choice(*words: str) -> Kind:
    """One of some words."""

    def read(value: Any) -> str:
        if _text(value) not in words:
            raise ValueError(f"is {value!r}")
        return str(value)

    right = " or ".join(f'"{word}"' for word in words)
    return Kind(right, read, right)


def member(enum: type[Member]) -> Kind:
    """The name of an enum's member in small letters."""
    names: Mapping[str, Member] = {each.name.lower(): each for each in enum}
    words = choice(*names)
    return Kind(words.right, lambda value: names[words.read(value)], words.brief)


def optional(kind: Kind, empty: Any, what: str) -> Kind:
    """`""` for none, which reads as `empty`."""
    brief = f'"": {what}'
    return Kind(f'{kind.right}, or "" for {what}', lambda value: empty if value == "" else kind.read(value), brief)


def texts(right: str, each: Callable[[str], str]) -> Kind:
    """An array of texts, at least one."""

    def read(value: Any) -> tuple[str, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError("is no array" if not isinstance(value, list) else "is empty")
        return tuple(each(_text(item)) for item in value)

    return Kind(right, read)


def _address(value: Any) -> Address:
    host, colon, port = _text(value).rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"is {value!r}: an IPv6 address goes in brackets")
    if not colon or not port.isascii() or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ValueError(f"is {value!r}, which has no port from 1 to 65535")
    try:
        return Address(str(ipaddress.ip_address(host)), int(port))
    except ValueError as e:
        raise ValueError(f"is {value!r}, where {host!r} is no IP address") from e


def _path(value: Any) -> Path:
    if not _text(value).startswith("/"):
        raise ValueError(f"is {value!r}")
    return Path(value)


def _socket(value: Any) -> Path:
    path = _path(value)
    if len(bytes(path)) > SUN_PATH:
        raise ValueError(f"has {len(bytes(path))} bytes")
    return path


def _mac(value: Any) -> str:
    if not _MAC.fullmatch(_text(value)):
        raise ValueError(f"is {value!r}")
    if int(value[:2], 16) & MULTICAST_BIT or not int(value.replace(":", ""), 16):
        raise ValueError(f"is {value!r}, which no NIC can have")
    return str(value).lower()


def _prefix(value: Any) -> str:
    try:
        return str(ipaddress.ip_network(_text(value)))
    except ValueError as e:
        raise ValueError(f"is {value!r} ({e})") from e


def _switch(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"is {value!r}")
    return value


def _protocol(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255:
        return value
    if isinstance(value, str) and value.lower() in PROTOCOLS:
        return PROTOCOLS[value.lower()]
    raise ValueError(f"is {value!r}")


def _url(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+/?", value):
        raise ValueError(f"has {value!r}")
    return value.rstrip("/")


NAME = Kind("letters, digits, '-', '_' and '.', at most 63, a letter or digit first", _matching(_NAME))
ID = Kind("letters, digits, '-', '_' and '.', at most 63, a letter first", _matching(_ID))
DEVICE = Kind(
    f"the name of a network device, 1 to {IFNAMSIZ} characters without spaces, '/' and ':'", _matching(_DEVICE)
)
ADDRESS = Kind('an IP address and a port, such as "192.0.2.1:7788" or "[2001:db8::1]:7788"', _address)
SOCKET = Kind(f'an absolute path of at most {SUN_PATH} bytes, such as "/run/coloebpf/control.sock"', _socket)
PATH = Kind('an absolute path, such as "/etc/coloebpf/pki/ca.pem"', _path)
FILE = Kind(
    "an absolute path without spaces, commas, colons and quotes, which xl and QEMU take for something else",
    lambda value: Path(_matching(_FILE)(value)),
)
MAC = Kind('the MAC address of one NIC, such as "02:c0:10:00:00:01"', _mac)
SWITCH = Kind("true or false", _switch)
PREFIX = Kind('an address prefix without host bits, such as "10.0.0.0/8" or "fd00::/8"', _prefix)
PROTOCOL = Kind(f"an IP protocol: {', '.join(PROTOCOLS)}, or a number from 0 to 255", _protocol)
URLS = texts('an array of URLs, such as ["http://127.0.0.1:2379"]', _url)
WORDS = texts('a command as an array of words, such as ["/usr/sbin/stonith_admin", "--reboot", "b"]', _text)
