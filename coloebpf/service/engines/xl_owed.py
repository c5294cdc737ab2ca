"""Remus: when the secondary has what the PVM had done at a standstill, so that what was sent until then may leave."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Owed:
    """From a standstill that was told until its commit; `commit` is called then. Checkpoints count from 1 in a stream.

    Not each one has what was sent before it was told of (see forth() in coloebpf/xen/records.py): the first that is
    SURE does, and only when the secondary has said that it is there.
    """

    def __init__(self, commit: Callable[[], object], passed_on: int = 0) -> None:
        self._commit = commit
        self._passed_on = passed_on  # checkpoints that the relay here has passed on
        self._there = 0  # checkpoints that the secondary has
        self._open = False  # a standstill was told, and none was sure since
        self._due = 0  # the checkpoint that was sure, until the secondary has it; 0: none
        self._settled = asyncio.Event()
        self._settled.set()

    def stood(self) -> None:
        """The PVM stands still, and it was told."""
        self._open = True

    def sure(self) -> None:
        """The checkpoint that passes has it. One that was told to an earlier service is left to the next."""
        if self._open:
            self._open, self._due = False, self._passed_on + 1
            self._settled.clear()
            self._look()

    def whole(self) -> None:
        """The relay here has passed on another one."""
        self._passed_on += 1

    def there(self, number: int) -> None:
        """The secondary has so many."""
        self._there = number
        self._look()

    async def settled(self) -> None:
        """Returns when no commit is due: each is of all that was sent before it, so the next must not be told yet."""
        await self._settled.wait()

    def _look(self) -> None:
        if 0 < self._due <= self._there:
            self._due = 0
            self._commit()
            self._settled.set()
