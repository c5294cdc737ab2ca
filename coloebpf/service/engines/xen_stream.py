"""What xl is told to do for a guest that is copied again and again: by COLO, or by Remus."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coloebpf.service.config import LibxlColoConfig, LibxlRemusConfig
from coloebpf.service.config_keys import Address
from coloebpf.service.disks import ColoDisk
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.xen_relay import RUNE, SOCKET
from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.engines.xl_disk import MONITORS
from coloebpf.xen.client import ARGV
from coloebpf.xen.watcher import Watcher

INCOMING = "--incoming"  # behind the guest's name while xl takes it in


@dataclass(frozen=True)
class Stream:
    """One guest's. `colo` False: Remus. `config`: of the engine; `endpoint`: where libxl's COLO connects to."""

    pair: str
    colo: bool
    domain: str
    listen: Address
    endpoint: Address | None
    interval_ms: int
    copy_timeout_s: int
    step_timeout_s: int
    run_dir: Path
    encryption: Encryption | None = None
    xl: str = "xl"
    xenstore_write: str = "xenstore-write"
    worker: Sequence[str] = ARGV
    disk: ColoDisk | None = None  # of the guest: replicated by QEMU
    monitors: Path = MONITORS

    @classmethod
    def of_colo(
        cls, pair: str, config: LibxlColoConfig, disk: ColoDisk | None, encryption: Encryption | None
    ) -> Stream:
        """`config` has a stream_listen."""
        assert config.stream_listen is not None
        return cls(
            pair, True, config.domain, config.stream_listen, config.listen, 0,
            config.copy_timeout_s, config.step_timeout_s, config.run_dir, encryption, disk=disk,
        )  # fmt: skip

    @classmethod
    def of_remus(cls, pair: str, config: LibxlRemusConfig, encryption: Encryption | None) -> Stream:
        """Timed by libxl itself."""
        return cls(
            pair, False, config.domain, config.stream_listen, None, config.interval_ms,
            config.copy_timeout_s, config.step_timeout_s, config.run_dir, encryption,
        )  # fmt: skip

    @property
    def home(self) -> Path:
        """Where its relay is found."""
        return self.run_dir / self.pair

    @property
    def incoming(self) -> str:
        """The SVM's name."""
        return f"{self.domain}{INCOMING}"

    def toolstack(self, watcher: Watcher) -> Toolstack:
        """libxl, for what is not the stream."""
        step_s, end_s = self.step_timeout_s, self.copy_timeout_s
        return Toolstack(self.pair, self.domain, self.home, step_s, end_s, watcher, self.worker)

    def sending(self) -> list[str]:
        """xl on the primary. Without an ssh (-s '') the host's name is a command: what the stream goes through."""
        kind = ["-c", "-p"] if self.colo else ["-F", "-n", "-d", "-i", str(self.interval_ms)]
        rune = shlex.join(["exec", *RUNE, str(self.home / SOCKET)])
        return [self.xl, "remus", *kind, "-u", "-s", "", self.domain, rune]

    def taking_in(self) -> list[str]:
        """xl on the secondary."""
        return [self.xl, "migrate-receive", *(["--colo", "--userspace-colo-proxy"] if self.colo else ["-r"])]
