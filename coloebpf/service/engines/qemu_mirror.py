"""The PVM's disks on their way: each write is on the secondary before the guest hears that it is done.

QEMU's mirror job with copy-mode write-blocking, into NBD exports of the other host (qemu_disks.py). It lives through
migrations: QEMU lets a mirror's target become inactive with the rest, and be active again at `cont`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.config import QemuConfig
from coloebpf.service.engines.qmp import Qmp

END_S = 2.0
JOB = "coloebpf-{}"
FILTER = "coloebpf-{}-mirror"
TARGET = "coloebpf-{}-replica"


def unreplicated(devices: Iterable[Mapping[str, Any]], mirrors: Mirrors) -> str | None:
    """Which disk of `query-block` keeps a guest from being protected: it can be written, and its SVM would lack it."""
    for device in devices:
        medium = device.get("inserted")
        if medium and not medium.get("ro") and not mirrors.has(str(medium.get("node-name"))):
            return f"disk {device.get('device') or device.get('qdev') or medium.get('node-name')}"
    return None


async def refusal(pair: str, qmp: Qmp, mirrors: Mirrors) -> str | None:
    """Why this guest can't be protected: a disk that it can write, and its SVM would have none like it.

    Raises EngineError.
    """
    if (disk := unreplicated(await qmp.do("query-block"), mirrors)) is None:
        return None
    return (
        f"{disk} of {pair} can be written and is not replicated: "
        "make it read-only, or keep the guest's data in its memory"
    )


class Mirrors:
    """All disks of a pair. `ready`: they are equal, and stay so. `broken`: why they are not any more, if so."""

    def __init__(self, config: QemuConfig) -> None:
        self.nodes = [disk.node for disk in config.disks]
        self.ready = not self.nodes
        self.broken = ""
        self._begun = False
        self._equal: set[str] = set()

    def has(self, node: str) -> bool:
        """It is replicated."""
        return any(node in (name, FILTER.format(i)) for i, name in enumerate(self.nodes))

    @property
    def due(self) -> bool:
        """There are disks, and none is copied."""
        return bool(self.nodes) and not self._begun

    async def adopt(self, qmp: Qmp) -> bool:
        """Goes on with the jobs of an earlier service. False: not all are there and ready. Raises EngineError."""
        if not self.nodes:
            return True
        jobs = [job for job in await qmp.do("query-block-jobs") if job["device"].startswith(JOB.format(""))]
        self._equal = {job["device"] for job in jobs if job.get("ready")}
        self.ready = len(self._equal) == len(self.nodes)
        self._begun = bool(jobs)
        return self.ready

    async def sizes(self, qmp: Qmp) -> list[int]:
        """Bytes of each. Raises EngineError if the guest has no such disk."""
        known = {node["node-name"]: node for node in await qmp.do("query-named-block-nodes")}
        for name in self.nodes:
            if name not in known:
                raise EngineError(f"{qmp.name} has no disk with node-name {name}")
        return [int(known[name]["image"]["virtual-size"]) for name in self.nodes]

    async def begin(self, qmp: Qmp, host: str, port: int) -> None:
        """Copies all of them; `ready` follows. Raises EngineError."""
        self._begun = True
        for i, node in enumerate(self.nodes):
            server = {"type": "inet", "host": host, "port": str(port)}
            target = TARGET.format(i)
            await qmp.do("blockdev-add", driver="nbd", node_name=target, server=server, export=f"disk{i}")
            await qmp.do(
                "blockdev-mirror", job_id=JOB.format(i), device=node, target=target, sync="full",
                copy_mode="write-blocking", filter_node_name=FILTER.format(i),
            )  # fmt: skip

    def event(self, name: str, data: Mapping[str, Any]) -> bool:
        """Of the PVM's QEMU. True: something has changed."""
        if not self._begun or not str(data.get("device", "")).startswith(JOB.format("")):
            return False
        if name == "BLOCK_JOB_READY":
            self._equal.add(str(data["device"]))
            self.ready = len(self._equal) == len(self.nodes)
            return True
        if name in ("BLOCK_JOB_ERROR", "BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED"):
            self.ready = False
            self.broken = f"the copy of a disk has broken: {data.get('error', name)}"
            return True
        return False

    async def end(self, qmp: Qmp) -> None:
        """The guest goes on with its own disks alone, also if the other host does not answer any more."""
        self._begun, self.ready, self.broken = False, not self.nodes, ""
        self._equal.clear()
        if not self.nodes:
            return
        jobs = {job["device"] for job in await qmp.do("query-block-jobs")}
        known = {node["node-name"] for node in await qmp.do("query-named-block-nodes")}
        for i in range(len(self.nodes)):
            with contextlib.suppress(EngineError):
                if TARGET.format(i) in known:
                    await qmp.do("yank", instances=[{"type": "block-node", "node-name": TARGET.format(i)}])
                if JOB.format(i) in jobs:
                    await qmp.do("block-job-cancel", device=JOB.format(i), force=True)
        async with asyncio.timeout(END_S):
            while any(job["device"].startswith(JOB.format("")) for job in await qmp.do("query-block-jobs")):
                await asyncio.sleep(0.01)
        for i in range(len(self.nodes)):
            with contextlib.suppress(EngineError):
                await qmp.do("blockdev-del", node_name=TARGET.format(i))
