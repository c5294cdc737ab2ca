"""A server of seeded data and a client that checks it, run in the lab's namespaces. `python -m tests.lab.traffic serve|fetch|send`.

The server knows no clock, no header and no state: what it answers depends on the request alone, so replicas agree.
A request is one line, "SIZE SEED\\n"; the answer is SIZE bytes that follow from SEED. Or it is
"put SIZE\\n" and SIZE bytes; the answer is one line, their CRC-32.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator

PORT = 7000
BLOCK = 1 << 18  # bytes; each block of an answer differs from every other
READ = 1 << 18
PATIENCE = 30.0  # seconds without a byte after which a download counts as stuck; 500 at once on a busy machine wait for their turn


def blocks(size: int, seed: int) -> Iterator[bytes]:
    """The answer to one request, piece by piece."""
    base = random.Random(seed).randbytes(BLOCK)
    for start in range(0, size, BLOCK):
        piece = start.to_bytes(8, "big") + base[8:]
        yield piece[: size - start]


def checksum(size: int, seed: int) -> int:
    """What the bytes that arrive must sum up to."""
    total = 0
    for piece in blocks(size, seed):
        total = zlib.crc32(piece, total)
    return total


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: requests one after the other."""
    try:
        while line := await reader.readline():
            if line.startswith(b"put "):
                writer.write(b"%d\n" % await sum_of(reader, int(line[4:])))
                await writer.drain()
                continue
            size, seed = (int(word) for word in line.split())
            for piece in blocks(size, seed):
                writer.write(piece)
                await writer.drain()
    except (ConnectionError, asyncio.IncompleteReadError):
        pass  # the client's test will tell
    finally:
        writer.close()


async def sum_of(reader: asyncio.StreamReader, size: int) -> int:
    """CRC-32 of the next `size` bytes."""
    total = 0
    while size:
        piece = await reader.read(min(size, READ))
        if not piece:
            raise asyncio.IncompleteReadError(b"", size)
        size -= len(piece)
        total = zlib.crc32(piece, total)
    return total


async def serve() -> None:
    """Answer until killed, on IPv4 and IPv6."""
    server = await asyncio.start_server(answer, ["0.0.0.0", "::"], PORT, backlog=1024)
    await server.serve_forever()


async def download(address: str, size: int, seed: int) -> str:
    """One download on a connection of its own; returns what was wrong with it."""
    got = total = 0
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(address, PORT, limit=READ)
        writer.write(f"{size} {seed}\n".encode())
        while got < size:
            async with asyncio.timeout(PATIENCE):
                piece = await reader.read(READ)
            if not piece:
                return f"ended after {got} of {size} bytes"
            got += len(piece)
            total = zlib.crc32(piece, total)
        writer.close()
        async with asyncio.timeout(PATIENCE):
            await writer.wait_closed()
    except OSError as error:  # a timeout is one
        return f"{type(error).__name__} {error} after {got} of {size} bytes"
    return "" if total == checksum(size, seed) else f"wrong checksum of {size} bytes"


async def upload(address: str, size: int, seed: int) -> str:
    """One upload on a connection of its own; returns what was wrong with it."""
    sent = 0
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection(address, PORT)
        writer.write(f"put {size}\n".encode())
        for piece in blocks(size, seed):
            writer.write(piece)
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
            sent += len(piece)
        async with asyncio.timeout(PATIENCE):
            line = await reader.readline()
        writer.close()
        async with asyncio.timeout(PATIENCE):
            await writer.wait_closed()
    except OSError as error:  # a timeout is one
        return f"{type(error).__name__} {error} after {sent} of {size} bytes"
    return "" if line == b"%d\n" % checksum(size, seed) else f"wrong checksum of {size} bytes"


async def at_once(
    one: Callable[[str, int, int], Awaitable[str]], address: str, count: int, least: int, most: int, seed: int
) -> dict[str, object]:
    """`count` downloads or uploads at once, of `least` to `most` bytes each."""
    chance = random.Random(seed)
    sizes = [chance.randint(least, most) for _ in range(count)]
    start = time.monotonic()
    found = await asyncio.gather(*(one(address, size, seed + number) for number, size in enumerate(sizes)))
    return {
        "bytes": sum(sizes),
        "seconds": round(time.monotonic() - start, 3),
        "errors": [text for text in found if text][:5],
    }


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        asyncio.run(serve())
    else:
        numbers = [int(word) for word in sys.argv[3:]]
        way = {"fetch": download, "send": upload}[sys.argv[1]]
        print(json.dumps(asyncio.run(at_once(way, sys.argv[2], *numbers))))
