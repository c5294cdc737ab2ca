"""What goes from host to host in a copy: xl's header with the guest's configuration, then libxl's own stream.

It is what `xl save` writes, so `xl restore -p` can read it too.
"""

from __future__ import annotations

import os
import struct

from coloebpf.errors import XenError

_MAGIC = b"Xen saved domain, xl format\n \0 \r".ljust(32, b"\0")
_HEAD = struct.Struct("=32sIIII")  # magic, byte order, mandatory flags, optional flags, length of what follows
_ORDER = 0x01020304
_FLAGS = 3  # the configuration is JSON; libxl's stream is of version 2
_LENGTH = struct.Struct("=I")
MAX_CONFIG = 1 << 20  # bytes; one of some 10 KiB is usual
HEAD_BYTES = _HEAD.size


def write_head(fd: int, config: str) -> None:
    """The header and the configuration."""
    text = config.encode() + b"\0"
    data = _HEAD.pack(_MAGIC, _ORDER, _FLAGS, 0, _LENGTH.size + len(text)) + _LENGTH.pack(len(text)) + text
    while data:
        data = data[os.write(fd, data) :]


def read_head(fd: int) -> str:
    """The configuration; libxl's stream is next. Raises XenError for anything else."""
    length = check_head(_exactly(fd, HEAD_BYTES))
    return _exactly(fd, length)[_LENGTH.size :].rstrip(b"\0").decode(errors="replace")


def check_head(head: bytes) -> int:
    """How many bytes with the configuration follow. Raises XenError for what is no header."""
    magic, order, flags, _, length = _HEAD.unpack(head)
    if (magic, order, flags) != (_MAGIC, _ORDER, _FLAGS) or not _LENGTH.size < length < MAX_CONFIG:
        raise XenError("what came is no copy of a guest")
    return int(length)


def _exactly(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            raise XenError("the copy broke off at its beginning")
        data += more
    return data
