"""Names that the programs' numbers have: states, roles, policies, reasons.

The order is the C enums' (bpf/types.h); tests/unit/test_model.py compares them.
"""

from dataclasses import dataclass
from enum import IntEnum


class State(IntEnum):
    """State of a pair (docs/design.md, section 8)."""

    UNPROTECTED = 0
    SYNCING = 1
    LOCKSTEP = 2
    CHECKPOINTING = 3
    PASSTHROUGH = 4
    PROMOTED = 5
    HALTED = 6


class Role(IntEnum):
    """What a host is to a guest NIC."""

    PRIMARY = 1
    SECONDARY = 2


class Policy(IntEnum):
    """What happens to frames that are no flow's: ARP, ND, other Ethernet types."""

    PASS = 0
    COMPARE = 1
    DROP = 2


REASONS = ("payload", "flags", "options", "rst", "fin", "datagram", "missing_on_svm", "missing_on_pvm", "structure")
DROPS = (
    "no_slot",
    "fifo_full",
    "no_flow",
    "flow_race",
    "policy",
    "foreign_mac",
    "too_long",
    "halted",
    "unknown_link",
    "no_metadata",
    "old_epoch",
    "isolated",
    "short",
    "state",
    "emit",
    "early_ack",
    "bad_gso",
    "closed",
)
EVENTS = {1: "divergence", 2: "high_water", 3: "timeout", 4: "kick"}
MAX_NICS = 64  # likewise of bpf/constants.h
MAX_PAIRS = 64
NIC_CLSACT_VIF, NIC_CLSACT_FWD = 1, 2  # flags of struct nic: attach() made these qdiscs


@dataclass(frozen=True)
class Sizes:
    """Sizes of the dataplane: `mtu` of the guests (bytes), slots of the slab, flows of the table; powers of two."""

    mtu: int = 1500
    slots: int = 65536
    flows: int = 65536

    @classmethod
    def of_mtu(cls, mtu: int) -> "Sizes":
        """The usual sizes: slots for jumbo frames take 16 KiB each, so there are fewer."""
        return cls(mtu=mtu, slots=8192 if mtu > 1500 else cls.slots)

    @property
    def jumbo(self) -> bool:
        """Frames don't fit slots of 2 KiB."""
        return self.mtu > 1500


@dataclass(frozen=True)
class NicSpec:
    """One guest NIC on this host: its numbers, its devices, its policies.

    `vlan`: its id on `fwd`, 0 if fwd is this NIC's own. `mac`: the guest's, "" for any. `standby_vif`: the other one
    that the guest's VMs take in turn, if its engine makes a new VM for each checkpoint.
    """

    nic: int
    pair: int
    role: Role
    vif: str
    fwd: str
    vlan: int = 0
    mac: str = ""
    arp: Policy = Policy.PASS
    nd: Policy = Policy.PASS
    other: Policy = Policy.COMPARE
    standby_vif: str = ""


@dataclass(frozen=True)
class FwdBeat:
    """What the program on fwd has noted of a NIC's heartbeats.

    `last_ns`: CLOCK_MONOTONIC of the last one with the right cookie; `counter`: its; `strangers`: frames of the
    Ethertype with anything else in them.
    """

    last_ns: int
    cookie: bytes
    counter: int
    strangers: int

    @property
    def number(self) -> int:
        return self.counter >> 32

    @property
    def echo(self) -> int:
        return self.counter & 0xFFFFFFFF
