"""Who may go on alone: the arbiters that a pair can name in its configuration."""

from __future__ import annotations

from collections.abc import Callable

from coloebpf.errors import ConfigError
from coloebpf.service.arbiters.base import Arbiter
from coloebpf.service.arbiters.command import CommandArbiter
from coloebpf.service.arbiters.etcd import EtcdArbiter
from coloebpf.service.arbiters.none import NoArbiter
from coloebpf.service.config import ArbiterConfig


def make(kind: str, config: ArbiterConfig, host: str, clock: Callable[[], int]) -> Arbiter:
    """The arbiter of `kind`, for all pairs of `host` that name it. Raises ConfigError if its table is missing."""
    if kind == "none":
        return NoArbiter()
    if kind == "etcd" and config.etcd is not None:
        return EtcdArbiter(config.etcd, host, clock)
    if kind == "command" and config.command is not None:
        return CommandArbiter(config.command, clock)
    raise ConfigError(f"a pair has arbiter {kind!r}, but there is no table [arbiter.{kind}]")
