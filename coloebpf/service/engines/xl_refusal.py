"""Why xl can't copy a guest of this host: what is wrong with the host, with the guest as it runs, or with its disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from coloebpf.errors import DiskError
from coloebpf.service.engines.xen_pvm import Pvm
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.engines.xl_disk import PrimaryDisk
from coloebpf.xen.guest import unfit


class Refusal:
    """`ports`: of the guest's NICs; `disk`: its, if it has one; `lacks`: what this host lacks (checks/live.py)."""

    def __init__(
        self,
        stream: Stream,
        tools: Toolstack,
        pvm: Pvm,
        ports: Sequence[str],
        disk: PrimaryDisk | None,
        lacks: Callable[[], str],
    ) -> None:
        self._stream, self._tools, self._pvm, self._ports = stream, tools, pvm, ports
        self._disk, self._lacks = disk, lacks

    async def reason(self, domid: int, wanted: Callable[[], bool]) -> str:
        """Why this guest can't be protected, or "". No image is read on if that is not `wanted`. Raises XenError."""
        if lacks := await asyncio.to_thread(self._lacks):
            return lacks
        if self._pvm.name != self._stream.domain:  # xl would call the SVM so too
            return f"the guest is {self._pvm.name} here (xl rename {self._pvm.name} {self._stream.domain})"
        found, disk = await self._tools.configuration(domid), self._disk
        replicated = disk.disk.in_libxl() if disk is not None else None
        wrong = unfit(found, [[port] for port in self._ports], emulated=self._stream.colo, disk=replicated)
        if wrong or disk is None:
            return "; ".join(f"{one.text} ({one.advice})" for one in wrong)
        guest = await self._tools.numbered(domid)
        try:
            await disk.begin(domid, guest is not None and guest.paused, wanted)
        except DiskError as e:
            return str(e)
        return ""
