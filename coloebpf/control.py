"""Working a running dataplane by its pins, without a compile: states, checkpoints, exemptions, events, counters."""

from __future__ import annotations

import ctypes as ct
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coloebpf import bpfsys, exemptions, pins, snapshot
from coloebpf.errors import BpfError, ConfigError
from coloebpf.events import EventReader
from coloebpf.model import MAX_NICS, MAX_PAIRS, FwdBeat, State
from coloebpf.shapes import Shapes

__all__ = ["Control", "PairState", "State"]

COOKIE_BYTES = 16  # of a service, in its heartbeats
FRAME = bytes(64)  # what flush and sweep are run on: a vessel to overwrite
FLUSH_ROUNDS = 100_000  # flows a flush may touch before it says that something is wrong
GAUGE_FLOW_TOP = 2  # bpf/maps.h
PAIR_WORDS = 6  # of 8 bytes in struct pair (bpf/types.h)
KEPT_EPOCH_WORD, COMPARE_TIMEOUT_WORD = 4, 5
ALIASED_SHIFT = 32  # `aliased` is the upper half of the word that `kept_epoch` is in


@dataclass(frozen=True)
class PairState:
    """State and epoch (number of checkpoints begun) of a pair."""

    state: State
    epoch: int


class Control:
    """The maps and programs pinned under one directory. Work in the host's network namespace."""

    def __init__(self, pin_dir: Path, shapes: Shapes) -> None:
        self.pin_dir, self.shapes = pin_dir, shapes
        self._fds: dict[str, int] = {}
        self._events: EventReader | None = None
        self._memory: mmap.mmap | None = None
        self._entries: dict[int, Any] = {}  # of `pairs`, in its memory

    @classmethod
    def open(cls, pin_dir: Path) -> Control:
        """Raises BpfError if no dataplane is pinned there, or not all of it."""
        if not pins.any_there(pin_dir):
            raise BpfError(f"no dataplane is loaded: {pin_dir} has no pins")
        return cls(pin_dir, pins.complete(pin_dir, (*pins.MAPS, *pins.UPKEEP)))

    def close(self) -> None:
        """Gives back all file descriptors."""
        if self._events is not None:
            self._events.close()
            self._events = None
        self._entries.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fd(self, name: str) -> int:
        """File descriptor of a pinned map or program."""
        if name not in self._fds:
            self._fds[name] = bpfsys.obj_get(self.pin_dir / name)
        return self._fds[name]

    # ---- state of a pair -------------------------------------------------------------------------------------------

    def _words(self, pair: int) -> Any:
        """The pair's entry as words of 8 bytes in the map's own memory: state and epoch, the deadline, `open_after`,...

        (struct pair of bpf/types.h).
        """
        if pair in self._entries:
            return self._entries[pair]
        if not 0 <= pair < MAX_PAIRS:
            raise ConfigError(f"pair {pair}: must be below {MAX_PAIRS}")
        if self._memory is None:
            try:
                self._memory = mmap.mmap(self.fd("pairs"), mmap.PAGESIZE)
            except OSError as e:  # made without BPF_F_MMAPABLE
                raise BpfError(f"{self.pin_dir} has maps of another version: detach, then load again") from e
        at = pair * ct.sizeof(self.shapes.leaf("pairs"))
        self._entries[pair] = (ct.c_uint64 * PAIR_WORDS).from_buffer(self._memory, at)
        return self._entries[pair]

    def _write(self, pair: int, state: State, epoch: int) -> None:
        # one store: the programs see both change together
        self._words(pair)[0] = int(state) | (epoch & 0xFFFFFFFF) << 32

    def state(self, pair: int) -> PairState:
        """What the programs read for each packet of the pair."""
        word = self._words(pair)[0]
        return PairState(State(word & 0xFFFFFFFF), word >> 32)

    def set_state(self, pair: int, state: State) -> None:
        """Takes effect on the next packet."""
        self._write(pair, state, self.state(pair).epoch)

    def set_epoch(self, pair: int, epoch: int) -> None:
        """Takes effect on the next packet."""
        self._write(pair, self.state(pair).state, epoch)

    def deadline(self, pair: int) -> int:
        """What set_deadline() wrote last, maybe of a process before this one; 0: none."""
        return int(self._words(pair)[1])

    def set_deadline(self, pair: int, deadline_ns: int) -> None:
        """End of the right to speak, CLOCK_MONOTONIC ns; 0: none. After it the programs treat the pair as halted."""
        self._words(pair)[1] = deadline_ns

    def set_open_after(self, pair: int, at_ns: int) -> None:
        """From then on, CLOCK_MONOTONIC ns, the programs of a primary go on without the SVM; 0: never.

        A service whose policy is `on_service_loss = "open"` puts it off again and again; without it they hold.
        """
        self._words(pair)[2] = at_ns

    def set_compare_timeout(self, pair: int, ns: int) -> None:
        """A packet of the pair unproven for longer is told by an event; 0: for longer than the host's default."""
        self._words(pair)[COMPARE_TIMEOUT_WORD] = ns

    # ---- heartbeats ------------------------------------------------------------------------------------------------

    def expect_beats(self, cookie: bytes) -> None:
        """From here on the heartbeats on fwd that carry `cookie` (16 bytes) count, for every NIC; all zero: none."""
        if len(cookie) != COOKIE_BYTES:
            raise ConfigError(f"a cookie of heartbeats has {COOKIE_BYTES} bytes, not {len(cookie)}")
        for nic in range(MAX_NICS):
            value = self._beat(nic)
            value.expect[:] = struct.unpack("=2Q", cookie)
            bpfsys.update(self.fd("fwd_beats"), ct.c_uint32(nic), value)

    def fwd_beats(self) -> dict[int, FwdBeat]:
        """What the programs on fwd have noted, by NIC; those that have heard nothing are left out."""
        beats = {nic: self._beat(nic) for nic in range(MAX_NICS)}
        return {
            nic: FwdBeat(beat.last_ns, struct.pack("=2Q", *beat.cookie), beat.counter, beat.strangers)
            for nic, beat in beats.items()
            if beat.last_ns or beat.strangers
        }

    def _beat(self, nic: int) -> Any:
        value = self.shapes.leaf("fwd_beats")()
        bpfsys.lookup(self.fd("fwd_beats"), ct.c_uint32(nic), value)
        return value

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def suspend(self, pair: int) -> int:
        """An engine's `suspended`: the old SVM's output proves nothing from here on. Returns the new epoch."""
        before = self.state(pair)
        if before.state is State.SYNCING:
            self.sweep()  # what flows know of an earlier protection ends (forget_stream() of bpf/upkeep.c)
        epoch = (before.epoch + 1) & 0xFFFFFFFF
        self._write(pair, State.CHECKPOINTING, epoch)
        return epoch

    def commit(self, pair: int) -> int:
        """`committed`: packets held before the suspension leave, in order. Returns how many were sent."""
        self.set_state(pair, State.LOCKSTEP)
        return self.kick()

    def clear_translations(self, pair: int) -> int:
        """On a secondary: the SVM is (about to be) a copy of the PVM, each offset is zero. Returns the new epoch.

        Until settle_translations() a connection's offset comes back if the SVM goes on with its own numbers after all.
        """
        before = self.state(pair)
        epoch = (before.epoch + 1) & 0xFFFFFFFF
        self._write(pair, before.state, epoch)
        return epoch

    def settle_translations(self, pair: int) -> None:
        """On a secondary: the checkpoint has committed, what was learnt before its epoch is void."""
        words = self._words(pair)
        aliased = words[KEPT_EPOCH_WORD] >> ALIASED_SHIFT  # both halves are written by this process alone
        words[KEPT_EPOCH_WORD] = aliased << ALIASED_SHIFT | self.state(pair).epoch

    def set_aliased(self, pair: int, on: bool) -> None:
        """The map `aliases` has entries for the pair (coloebpf/aliases.py); without this no program looks there."""
        words = self._words(pair)
        words[KEPT_EPOCH_WORD] = int(on) << ALIASED_SHIFT | words[KEPT_EPOCH_WORD] & 0xFFFFFFFF

    def aliased(self, pair: int) -> bool:
        """What set_aliased() wrote last, maybe of a process before this one."""
        return bool(self._words(pair)[KEPT_EPOCH_WORD] >> ALIASED_SHIFT)

    def keep_numbers(self, pair: int) -> None:
        """Makes such entries of what S2 and S3 know: a promoted SVM is about to become a PVM."""
        self._walk("keep_numbers", FLUSH_ROUNDS, pair)

    def kick(self) -> int:
        """Sends whatever may leave. Returns how many packets were released meanwhile."""
        before = self._released()
        self._walk("flush", FLUSH_ROUNDS)
        return self._released() - before

    def sweep(self) -> None:
        """Looks for what waits too long (events) and ends idle flows."""
        self._walk("sweep", FLUSH_ROUNDS)

    def sweep_some(self, start: int, runs: int) -> int:
        """A part of sweep(): `runs` batches of flows (SWEEP_BATCH of bpf/upkeep.c each), from flow `start` on.

        Returns where the next part begins; 0: that was the last.
        """
        return self._walk_part("sweep", start, runs)

    def _walk(self, program: str, rounds: int, pair: int = 0) -> None:
        if self._walk_part(program, 0, rounds, pair):
            raise BpfError(f"{program} did not come to an end in {rounds} runs")

    def _walk_part(self, program: str, start: int, rounds: int, pair: int = 0) -> int:
        """Runs `program` over the flows that were ever used, from `start` on; it says in `priority` where it stopped.

        Returns that, or 0 at the end. One walk at a time: kernels before 6.2 let two interrupt each other on one CPU.
        """
        top = ct.c_uint64()
        bpfsys.lookup(self.fd("gauges"), ct.c_uint32(GAUGE_FLOW_TOP), top)
        here = start
        with self.shapes.path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for _ in range(rounds):
                if here >= top.value:
                    break
                ctx = bpfsys.sk_buff(0, here, top.value, pair)
                run = bpfsys.test_run(self.fd(program), FRAME, ctx=ctx, want_ctx=len(ctx))
                here = int.from_bytes(run.ctx[bpfsys.PRIORITY_OFFSET : bpfsys.PRIORITY_OFFSET + 4], "little")
        return here if here < top.value else 0

    def _released(self) -> int:
        numbers = {nic.id for nic in snapshot.attached(self)}
        return sum(int(snapshot.counters(self, number).released_packets) for number in numbers)

    # ---- exemptions ------------------------------------------------------------------------------------------------

    def exempt_add(self, proto: int, guest_port: int, remote: str, nic: int = 0) -> None:
        """Lets traffic pass uncompared: IP protocol, the guest's port (0: every), the other side's prefix."""
        exemptions.add(self, proto, guest_port, remote, nic)

    def exempt_del(self, proto: int, guest_port: int, remote: str, nic: int = 0) -> bool:
        """False if there was no such entry."""
        return exemptions.remove(self, proto, guest_port, remote, nic)

    def set_exempts(self, nic: int, wanted: Iterable[tuple[int, int, str]]) -> None:
        """Makes these (protocol, guest's port, prefix) all the exemptions of a NIC; those that stay are never gone."""
        exemptions.replace(self, nic, wanted)

    # ---- looking ---------------------------------------------------------------------------------------------------

    def events_fd(self) -> int:
        """Readable when there are events: for select() and its like."""
        return self.fd("events")

    def events(self, timeout_s: float = 0.0, most: int | None = None) -> list[dict[str, Any]]:
        """What the programs have told since the last call, or the first `most` of it; waits up to `timeout_s`."""
        if self._events is None:
            self._events = EventReader(self.fd("events"), self.shapes.leaf("last_events"))
        return self._events.read(timeout_s, most)

    def snapshot(self) -> dict[str, Any]:
        """States, counters and holding times, as JSON knows them."""
        return snapshot.take(self)
