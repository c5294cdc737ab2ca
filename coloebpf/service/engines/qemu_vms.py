"""A pair's virtual machines on this host: two places that they take in turn, each with taps of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coloebpf.service.config import PairConfig, QemuConfig
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.qemu_process import Process, Processes

SLOTS = (0, 1)


class Vms(Processes):
    """`taps`: names of the devices of each slot, in the order of the pair's NICs."""

    def __init__(
        self, name: str, config: QemuConfig, taps: Sequence[tuple[str, ...]], encryption: Encryption | None = None
    ) -> None:
        super().__init__(config.run_dir / name, name)
        self.name, self.config, self.encryption = name, config, encryption
        self._taps = taps

    @classmethod
    def of(cls, pair: PairConfig, config: QemuConfig, encryption: Encryption | None) -> Vms:
        """As the pair's configuration says."""
        taps = [tuple((nic.vif, nic.standby_vif)[slot] for nic in pair.nics) for slot in SLOTS]
        return cls(pair.name, config, taps, encryption)

    def taps(self, slot: int) -> tuple[str, ...]:
        """Names of the slot's devices."""
        return self._taps[slot]

    async def boot(self, slot: int, disks: Sequence[Path] = ()) -> Process:
        """A fresh QEMU that waits for a migration, with these files for its disks. Raises EngineError."""
        holes = {"{qmp}": str(self.socket(str(slot))), "{name}": self.name}
        holes |= {f"{{tap{i}}}": tap for i, tap in enumerate(self._taps[slot])}
        holes |= {f"{{disk{i}}}": str(disk) for i, disk in enumerate(disks)}
        argv = [*self.config.command, "-S", "-incoming", "defer"]
        for hole, value in holes.items():
            argv = [word.replace(hole, value) for word in argv]
        return await self.start(str(slot), argv)

    def guest(self) -> int | None:
        """The slot of a QEMU that has become the guest by a failover."""
        try:
            return int((self.home / "guest").read_text())
        except (OSError, ValueError):
            return None

    def monitor(self) -> Path:
        """Where the guest's own QEMU answers, if this host has the guest."""
        slot = self.guest()
        return self.config.qmp if slot is None else self.socket(str(slot))

    def note_guest(self, slot: int | None) -> None:
        """For the next service, whatever this host's role will be."""
        if slot is None:
            (self.home / "guest").unlink(missing_ok=True)
        else:
            (self.home / "guest").write_text(str(slot))
