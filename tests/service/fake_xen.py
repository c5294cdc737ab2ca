"""A stand-in for libxl, run as a worker's process: `python -m tests.service.fake_xen DIR`. A host's domains are files.

A guest's memory is one text. A file DIR/hold.ORDER makes that order wait for as long as it is there; suspend and restore
do so when the guest stands still, or is half there. DIR/fail.ORDER makes it fail. DIR/log has the orders. What the
library in libxl's save helper does (deploy/xen/precopy) suspend does itself, but for DIR/deaf.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from coloebpf.errors import XenError
from coloebpf.xen.hold import VARIABLE
from coloebpf.xen.libxl import Domain
from coloebpf.xen.worker import serve

LOOK_S = 0.005
FLAGS = {"paused": False, "suspended": False, "ended": False, "reboots": False}


class FakeXen:
    """See coloebpf.xen.worker.Xen; tests use it directly too."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)

    # ---- for tests -------------------------------------------------------------------------------------------------

    def create(self, config: dict[str, Any], memory: str, **flags: bool) -> int:
        """A domain."""
        taken = [int(path.stem) for path in self.home.glob("*.json")]
        domid = next(number for number in itertools.count(1 + max(taken, default=0)))
        self.write(domid, config=config, memory=memory, **{**FLAGS, **flags})
        return domid

    def read(self, domid: int) -> dict[str, Any]:
        """All of it."""
        try:
            whole: dict[str, Any] = json.loads((self.home / f"{domid}.json").read_text())
        except FileNotFoundError as e:
            raise XenError(f"domain {domid}: there is no such domain (-21)") from e
        return whole

    def write(self, domid: int, **changed: Any) -> None:
        """Some of it."""
        path = self.home / f"{domid}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_text(json.dumps(before | changed))
        fresh.rename(path)

    # ---- coloebpf.xen.worker.Xen -----------------------------------------------------------------------------------

    def domains(self) -> list[Domain]:
        found = (self.domain(int(path.stem)) for path in sorted(self.home.glob("*.json")))
        return [domain for domain in found if domain is not None]

    def domain(self, domid: int) -> Domain | None:
        try:
            whole = self.read(domid)
        except XenError:
            return None
        info = whole["config"]["c_info"]
        return Domain(domid, info["name"], info["uuid"], **{flag: whole[flag] for flag in FLAGS})

    def configuration(self, domid: int) -> str:
        return json.dumps(self.read(domid)["config"])

    def suspend(self, domid: int, fd: int) -> None:
        self._begin("suspend", domid)
        self._keep_going()
        self.write(domid, suspended=True)
        self._hold("suspend")
        memory = self.read(domid)["memory"].encode()
        try:
            os.write(fd, b"%08d" % len(memory) + memory)
        except OSError as e:
            raise XenError(f"libxl_domain_suspend: {e.strerror}") from e

    def resume(self, domid: int) -> None:
        self._begin("resume", domid)
        self.write(domid, suspended=False)

    def pause(self, domid: int) -> None:
        self._begin("pause", domid)
        self.write(domid, paused=True)

    def unpause(self, domid: int) -> None:
        self._begin("unpause", domid)
        self._hold("unpause")
        if not self.read(domid)["paused"]:
            raise XenError(f"libxl_domain_unpause of domain {domid}: it failed (-3)")  # seen on Xen 4.17
        self.write(domid, paused=False)

    def destroy(self, domid: int) -> None:
        self._begin("destroy", domid)
        (self.home / f"{domid}.json").unlink(missing_ok=True)

    def rename(self, domid: int, old: str, new: str) -> None:
        self._begin("rename", domid)
        config = self.read(domid)["config"]
        assert config["c_info"]["name"] == old
        config["c_info"]["name"] = new
        self.write(domid, config=config)

    def restore(self, config: str, fd: int) -> int:
        domid = self.create(json.loads(config), "", paused=True)
        self._begin("restore", domid)
        self._hold("restore")
        try:
            length = int(_read(fd, 8))
            self.write(domid, memory=_read(fd, length).decode())
            self._fail("restored")
        except XenError:
            self.destroy(domid)
            raise
        return domid

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _begin(self, order: str, domid: int) -> None:
        with (self.home / "log").open("a") as log:
            log.write(f"{order} {domid}\n")
        self._fail(order)

    def _fail(self, order: str) -> None:
        if (self.home / f"fail.{order}").exists():
            raise XenError(f"{order} fails, as it was told to")

    def _keep_going(self) -> None:
        hold = os.environ.get(VARIABLE)
        if hold is None or (self.home / "deaf").exists():
            return
        while not os.path.exists(f"{hold}.go"):
            if os.path.exists(f"{hold}.end"):
                raise XenError("libxl_domain_suspend: it failed (-3)")
            time.sleep(LOOK_S)

    def _hold(self, order: str) -> None:
        while (self.home / f"hold.{order}").exists():
            time.sleep(LOOK_S)


def _read(fd: int, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = os.read(fd, length - len(data))
        if not more:
            raise XenError("the stream broke off")
        data += more
    return data


if __name__ == "__main__":
    serve(lambda: FakeXen(Path(sys.argv[1])))
