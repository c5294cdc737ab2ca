"""The configuration of one host, and how its file is read: whole, all mistakes at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coloebpf.model import MAX_NICS, MAX_PAIRS, NicSpec, Policy, Role
from coloebpf.service import config_keys as keys
from coloebpf.service.config_keys import Address, setting, table

__all__ = [
    "Address", "ArbiterConfig", "CommandConfig", "Config", "EtcdConfig", "Exemption", "HostConfig", "LibxlColoConfig",
    "ModelConfig", "NicConfig", "PairConfig", "PeerConfig",
]  # fmt: skip

MAX_VLAN = 4094  # IEEE 802.1Q: 4,095 is reserved
HOUR_MS = 3_600_000
LIBXL_INTERVAL_MS = 5000  # libxl checkpoints by itself after that time (shared/reference/xen-libxl-colo.md)


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """[host]: this host."""

    name: str = setting(
        keys.NAME, "this host's name, in the messages to the other one and in the arbiter's keys", shown="a"
    )
    control_socket: Path = setting(
        keys.PATH, "where `coloebpf status` and the like talk to the service", Path("/run/coloebpf/control.sock")
    )
    metrics_listen: Address | None = setting(
        keys.optional(keys.ADDRESS, None, "no metrics"), "where Prometheus finds /metrics", Address("127.0.0.1", 9877)
    )
    mtu: int = setting(
        keys.integer(576, 9000, "bytes"),
        "the largest of the guests'; above 1,500 held packets take eight times the memory",
        1500,
    )
    log_level: str = setting(keys.choice("debug", "info", "warning", "error"), "what is logged", "info")


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """[peer]: the other host."""

    name: str = setting(keys.NAME, "its name, as its certificate and its own file say", shown="b")
    listen: Address = setting(keys.ADDRESS, "this host's address on the management network", shown="192.0.2.1:7788")
    connect: Address = setting(keys.ADDRESS, "the other one's", shown="192.0.2.2:7788")
    ca: Path = setting(
        keys.PATH, "who signed both certificates (`coloebpf config init-pki`)", Path("/etc/coloebpf/pki/ca.pem")
    )
    certificate: Path = setting(keys.PATH, "this host's", Path("/etc/coloebpf/pki/host.pem"))
    key: Path = setting(keys.PATH, "its private key", Path("/etc/coloebpf/pki/host.key"))
    heartbeat_interval_ms: int = setting(keys.integer(5, 10_000, "ms"), "between two heartbeats, on either path", 50)
    heartbeat_timeout_ms: int = setting(
        keys.integer(10, 60_000, "ms"), "without any on both paths the other host counts as lost", 200
    )


@dataclass(frozen=True, kw_only=True)
class NicConfig:
    """[[pair.nic]]: a NIC of the guest."""

    number: int = setting(keys.integer(0, MAX_NICS - 1), "of the dataplane, the same on both hosts", shown=0)
    vif: str = setting(keys.DEVICE, "the guest's device on this host", shown="vif1.0-emu")
    fwd: str = setting(keys.DEVICE, "the device that is wired to the other host", shown="fwd0")
    vlan: int = setting(keys.integer(0, MAX_VLAN), "this NIC's VLAN id on fwd; 0: fwd is this NIC's alone", 0)
    mac: str = setting(
        keys.optional(keys.MAC, "", "any"),
        "the guest's; frames from another one are dropped",
        "",
        shown="02:c0:10:00:00:01",
    )
    bridge: str = setting(
        keys.optional(keys.DEVICE, "", "the one that the vif is in"),
        "where the SVM's output goes after a promotion",
        "",
        shown="br0",
    )
    arp: Policy = setting(keys.member(Policy), "what happens to the guest's ARP", Policy.PASS)
    nd: Policy = setting(keys.member(Policy), "to its IPv6 neighbour discovery", Policy.PASS)
    other: Policy = setting(keys.member(Policy), "to other Ethernet types", Policy.COMPARE)

    def spec(self, pair: PairConfig) -> NicSpec:
        """As the dataplane's attach() takes it."""
        return NicSpec(
            nic=self.number, pair=pair.number, role=pair.role, vif=self.vif, fwd=self.fwd, vlan=self.vlan, mac=self.mac,
            arp=self.arp, nd=self.nd, other=self.other,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """[[pair.exempt]]: traffic that passes uncompared."""

    protocol: int = setting(keys.PROTOCOL, "of IP", shown="udp")
    guest_port: int = setting(keys.integer(0, 65535), "the guest's; 0: every", 0, shown=123)
    remote: str = setting(keys.PREFIX, "the other side's addresses", "0.0.0.0/0")
    nic: int = setting(keys.integer(0, MAX_NICS - 1), "the NIC's number", shown=0)


@dataclass(frozen=True, kw_only=True)
class LibxlColoConfig:
    """[pair.libxl_colo]: the engine that `xl remus -c -p` connects to."""

    listen: Address = setting(
        keys.ADDRESS,
        "on loopback: colo_checkpoint_host and colo_checkpoint_port of the guest's first vif",
        shown="127.0.0.1:9000",
    )
    domain: str = setting(keys.NAME, "the guest's name in xl", shown="web")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """[pair.model]: the engine for tests; it copies nothing."""

    commit_delay_ms: int = setting(keys.integer(0, HOUR_MS, "ms"), "from Suspended to Committed", 5)
    socket: Path | None = setting(
        keys.optional(keys.PATH, None, "none"), "where a test tells it to fail, hang or die", None
    )


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """[[pair]]: a guest on two hosts."""

    name: str = setting(keys.NAME, "in commands, logs and metrics", shown="web")
    number: int = setting(keys.integer(0, MAX_PAIRS - 1), "of the dataplane, the same on both hosts", shown=0)
    role: Role = setting(keys.member(Role), "what this host is to the guest", shown="primary")
    engine: Literal["libxl-colo", "model"] = setting(
        keys.choice("libxl-colo", "model"), "what makes the checkpoints", shown="model"
    )
    arbiter: Literal["none", "etcd", "command"] = setting(
        keys.choice("none", "etcd", "command"),
        "who says which host goes on alone; with none the secondary never takes over by itself",
        "none",
    )
    on_service_loss: Literal["hold", "open"] = setting(
        keys.choice("hold", "open"), "without the service: hold what is unproven, or let everything pass", "hold"
    )
    service_loss_after_ms: int = setting(
        keys.integer(100, HOUR_MS, "ms"), 'when "open" begins after the service was seen for the last time', 2000
    )
    compare_timeout_ms: int = setting(
        keys.integer(10, 60_000, "ms"), "a packet unproven for longer asks for a checkpoint", 200
    )
    interval_min_ms: int = setting(keys.integer(0, 60_000, "ms"), "from a commit to the next request, at least", 20)
    interval_max_ms: int = setting(
        keys.integer(10, HOUR_MS, "ms"), "likewise, at most; libxl asks by itself after 5,000", 4000
    )
    commit_timeout_ms: int = setting(
        keys.integer(100, HOUR_MS, "ms"), "a checkpoint that takes longer counts the secondary as gone", 10_000
    )
    storm_count: int = setting(
        keys.integer(2, 10_000), "that many requests for a cause in storm_window_ms: periodic mode", 20
    )
    storm_window_ms: int = setting(keys.integer(10, HOUR_MS, "ms"), "see there", 2000)
    periodic_interval_ms: int = setting(
        keys.integer(10, 60_000, "ms"), "from a commit to the next request in periodic mode", 100
    )
    calm_ms: int = setting(
        keys.integer(100, HOUR_MS, "ms"), "that long without a cause: back to lock-step mode", 10_000
    )
    nics: tuple[NicConfig, ...] = table(NicConfig, "nic", "the guest's NICs", many=True, required=True)
    exempts: tuple[Exemption, ...] = table(Exemption, "exempt", "traffic that passes uncompared", many=True)
    libxl_colo: LibxlColoConfig | None = table(LibxlColoConfig, "libxl_colo", 'for engine = "libxl-colo"')
    model: ModelConfig | None = table(ModelConfig, "model", 'for engine = "model"')


@dataclass(frozen=True, kw_only=True)
class EtcdConfig:
    """[arbiter.etcd]: a lease in etcd."""

    endpoints: tuple[str, ...] = setting(keys.URLS, "the members of the cluster", shown=["http://127.0.0.1:2379"])
    lease_s: int = setting(
        keys.integer(1, 60, "s"), "the right to go on alone ends so long after it was renewed for the last time", 2
    )
    prefix: str = setting(keys.NAME, "of its keys: /prefix/pair", "coloebpf")
    request_timeout_ms: int = setting(keys.integer(10, 60_000, "ms"), "for one answer", 500)


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """[arbiter.command]: a command that turns the other host off."""

    fence: tuple[str, ...] = setting(
        keys.WORDS, "exit code 0: the other host is off", shown=["/usr/sbin/stonith_admin", "--reboot", "b"]
    )
    timeout_s: int = setting(keys.integer(1, 3600, "s"), "longer counts as failed", 30)


@dataclass(frozen=True, kw_only=True)
class ArbiterConfig:
    """[arbiter]: those that pairs name."""

    etcd: EtcdConfig | None = table(EtcdConfig, "etcd", 'for arbiter = "etcd"')
    command: CommandConfig | None = table(CommandConfig, "command", 'for arbiter = "command"')


@dataclass(frozen=True, kw_only=True)
class Config:
    """One host's file. `path`: where it was read."""

    path: Path = Path()
    host: HostConfig = table(HostConfig, "host", "this host", required=True)
    peer: PeerConfig | None = table(PeerConfig, "peer", "the other host; needed as soon as there is a pair")
    arbiter: ArbiterConfig = table(ArbiterConfig, "arbiter", "who says which host goes on alone", required=True)
    pairs: tuple[PairConfig, ...] = table(PairConfig, "pair", "the guests", many=True)
