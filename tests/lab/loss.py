"""Losing frames on purpose: a tc program that drops a share of what passes a device, and counts it."""

from __future__ import annotations

import ctypes as ct
import os
from types import TracebackType
from typing import Any

from pyroute2 import IPRoute, NetlinkError

from coloebpf.netns import inside
from coloebpf.preflight import Preflight

PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
# In front of the dataplane's filters. TC_ACT_UNSPEC (-1): the next filter; TC_ACT_SHOT (2): drop.
PREFERENCE = 1
ETH_P_ALL = 3
PROGRAM = """
BPF_ARRAY(seen, u64, 2);
int lose(struct __sk_buff *skb) {
    int lost = bpf_get_prandom_u32() % 1000 < PER_MILLE;
    u64 *count = seen.lookup(&lost);
    if (count) __sync_fetch_and_add(count, 1);
    return lost ? 2 : -1;
}
"""


_spare: dict[int, list[Any]] = {}  # modules by rate that no device uses: a compile takes half a second


def _module(per_mille: int) -> Any:
    if spare := _spare.get(per_mille):
        return spare.pop()
    headers = Preflight().kernel_headers()
    headers.tell_bcc(os.environ)
    from bcc import BPF

    return BPF(text=PROGRAM, cflags=[*headers.cflags, f"-DPER_MILLE={per_mille}"])


class Loss:
    """One device side that loses `per_mille` of its frames for the length of a `with` block."""

    def __init__(self, namespace: str, device: str, side: str, per_mille: int = 10) -> None:
        self._namespace, self._device, self._side, self._per_mille = namespace, device, side, per_mille
        self._module = _module(per_mille)
        self._program = self._module.load_func(b"lose", self._module.SCHED_CLS)
        self._before = 0
        self._before = self.lost

    @property
    def lost(self) -> int:
        """Frames dropped so far."""
        return int(self._module[b"seen"][ct.c_int(1)].value) - self._before

    def __enter__(self) -> Loss:
        with inside(self._namespace), IPRoute() as route:
            index = route.link_lookup(ifname=self._device)[0]
            try:
                route.tc("add", "clsact", index)
            except NetlinkError as error:
                if error.code != 17:  # EEXIST: the dataplane's own
                    raise
            route.tc(
                "add-filter",
                "bpf",
                index,
                handle=1,
                prio=PREFERENCE,
                protocol=ETH_P_ALL,
                parent=PARENTS[self._side],
                fd=self._program.fd,
                name="lose",
                direct_action=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with inside(self._namespace), IPRoute() as route:
            index = route.link_lookup(ifname=self._device)[0]
            route.tc(
                "del-filter", "bpf", index, handle=1, prio=PREFERENCE, protocol=ETH_P_ALL, parent=PARENTS[self._side]
            )
        _spare.setdefault(self._per_mille, []).append(self._module)
