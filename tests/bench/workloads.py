"""What is sent, in which order, and how fast: the rows of the benchmark."""

from __future__ import annotations

from dataclasses import dataclass

TCP_PAYLOAD = 1448  # bytes: a full segment with timestamps at an MTU of 1,500
UDP_PAYLOAD = 22  # bytes: with its headers the smallest Ethernet frame, 64 bytes
MANY_FLOWS = 100_000


@dataclass(frozen=True)
class Workload:
    """One kind of traffic."""

    name: str
    tcp: bool
    payload: int
    flows: int


TCP_ONE = Workload("TCP 1,448 B, 1 flow", True, TCP_PAYLOAD, 1)
TCP_64 = Workload("TCP 1,448 B, 64 flows", True, TCP_PAYLOAD, 64)
TCP_MANY = Workload("TCP 1,448 B, 100,000 flows", True, TCP_PAYLOAD, MANY_FLOWS)
UDP_ONE = Workload("UDP 64 B, 1 flow", False, UDP_PAYLOAD, 1)
UDP_MANY = Workload("UDP 64 B, 100,000 flows", False, UDP_PAYLOAD, MANY_FLOWS)

# What coloebpf, its peer and the bridge are all fed with; colo-compare isn't built for 100,000 flows.
COMMON = (TCP_ONE, TCP_64, UDP_ONE)
MANY = (TCP_MANY, UDP_MANY)


@dataclass(frozen=True)
class Order:
    """Which replica's frames are written first, and by how many frames (positive: the secondary's)."""

    name: str
    lead: int
    batch: int


SECONDARY_LEADS = Order("secondary leads by 128", 128, 16)
LOCK_STEP = Order("lock-step", 0, 16)
PRIMARY_LEADS = Order("primary leads by 8", -8, 8)
ORDERS = (SECONDARY_LEADS, LOCK_STEP, PRIMARY_LEADS)


@dataclass(frozen=True)
class Pace:
    """Open loop: frames a second, and how much later the secondary's twin is written (negative: earlier)."""

    rate: int
    lag_us: int

    @property
    def name(self) -> str:
        """As it stands in the report."""
        who = "secondary" if self.lag_us > 0 else "primary"
        return f"{self.rate:,}/s, {who} {abs(self.lag_us)} us later"


LATENCY = (TCP_ONE, UDP_ONE)
PACES = tuple(Pace(rate, lag) for rate in (1_000, 20_000) for lag in (100, -100))
