"""What a check is given, and what it yields."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

from coloebpf.service.config import Config

OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """`level`: OK, WARN (it works, and should be looked at) or FAIL. `advice`: what to do, "" if `text` says it."""

    level: str
    text: str
    advice: str = ""


@dataclass(frozen=True)
class Host:
    """The host to look at; the defaults are this one. `now`: Unix seconds. Devices are those of the caller's netns."""

    now: float
    root: Path = Path("/")
    euid: int | None = None
    release: str | None = None
    load: Callable[[str], ModuleType] = importlib.import_module
    path: str = os.environ.get("PATH", os.defpath)  # where programs are looked for
    config: Config | None = None

    def having(self, config: Config | None) -> Host:
        """The same host with its configuration."""
        return replace(self, config=config)

    @property
    def known(self) -> Config:
        """The configuration, for checks that run only with one."""
        assert self.config is not None
        return self.config

    def at(self, path: str | Path) -> Path:
        """An absolute path of the host's."""
        return self.root / str(path).lstrip("/")
