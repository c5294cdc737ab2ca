"""What a dataplane leaves under its pin directory: the names, and whether all of it is there."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from coloebpf import bpfsys
from coloebpf.errors import BpfError
from coloebpf.shapes import RUN_DIR, Shapes

TC_PROGRAMS = (
    "p1_mirror", "p2_output", "hold", "split", "split_udp", "pass_whole", "partial", "p4_prove", "p4_datagram",
    "answer", "drain", "s1_deliver", "s2_output", "s3_isolate", "link_deliver", "let_go", "flush", "sweep",
    "p1_alias", "p2_alias", "keep_numbers",
)  # fmt: skip
XDP_PROGRAMS = ("link_arrive", "p3_arrive", "s1_arrive")
MAPS = (
    "settings", "hash_keys", "pairs", "nics", "vif_hints", "nic_by_id", "links", "fwd_beats", "walks", "flow_refs",
    "flows", "held", "slab", "magazines", "full_magazines", "empty_magazines", "free_flows", "exempt", "counters",
    "holding", "scratch", "gauges", "tc_stages", "xdp_stages", "last_events", "events", "aliases",
)  # fmt: skip
UPKEEP = ("flush", "sweep", "keep_numbers")  # programs that user space runs
ENTRIES_LOCK = threading.Lock()  # `nics` and `nic_by_id`: entries are written whole, by several threads


def any_there(pin_dir: Path) -> bool:
    """Something is pinned, whole or not."""
    return pin_dir.is_dir() and any(pin_dir.iterdir())


def complete(pin_dir: Path, names: Iterable[str], run: Path = RUN_DIR) -> Shapes:
    """The shapes of what is pinned. Raises BpfError if they or any of `names` are missing."""
    missing = [name for name in names if not (pin_dir / name).exists()]
    if missing:
        raise BpfError(
            f"{pin_dir} is incomplete, {', '.join(missing)} missing: a load was interrupted or pins were removed; "
            "detach, then load again"
        )
    return Shapes(pin_dir, run)


class Maps:
    """The maps pinned at `pin_dir`, of the types `shapes`; each is opened when it is needed first."""

    def __init__(self, pin_dir: Path, shapes: Shapes) -> None:
        self.pin_dir, self.shapes = pin_dir, shapes
        self._fds: dict[str, int] = {}

    def fd(self, name: str) -> int:
        """File descriptor of a map."""
        if name not in self._fds:
            self._fds[name] = bpfsys.obj_get(self.pin_dir / name)
        return self._fds[name]
