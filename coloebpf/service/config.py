"""The configuration of one host, and how its file is read: whole, all mistakes at once."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from coloebpf.model import MAX_NICS, MAX_PAIRS, NicSpec, Policy, Role
from coloebpf.service import config_checks
from coloebpf.service import config_keys as keys
from coloebpf.service.config_engines import (
    LibxlColoConfig,
    LibxlDisk,
    LibxlLiveConfig,
    LibxlRemusConfig,
    ModelConfig,
    QemuConfig,
    QemuDisk,
)
from coloebpf.service.config_keys import HOUR_MS, Address, ms, setting, table
from coloebpf.service.config_reader import ConfigErrors, Mistake, Reader
from coloebpf.service.peer.witness import GRACE_MAX_MS

__all__ = [
    "Address", "ArbiterConfig", "CommandConfig", "Config", "ConfigErrors", "EtcdConfig", "Exemption", "HostConfig",
    "LibxlColoConfig", "LibxlDisk", "LibxlLiveConfig", "LibxlRemusConfig", "Mistake", "ModelConfig", "NicConfig",
    "PairConfig", "PeerConfig", "QemuConfig", "QemuDisk", "load", "parse",
]  # fmt: skip

MAX_VLAN = 4094  # IEEE 802.1Q: 4,095 is reserved


@dataclass(frozen=True, kw_only=True)
class HostConfig:
    """[host]: this host."""

    name: str = setting(
        keys.NAME, "this host's name, in messages to the other one and in the arbiter's keys", shown="a"
    )
    control_socket: Path = setting(
        keys.SOCKET, "for `coloebpf status` and the like", Path("/run/coloebpf/control.sock")
    )
    metrics_listen: Address | None = setting(
        keys.optional(keys.ADDRESS, None, "no metrics"), "where Prometheus finds /metrics", Address("127.0.0.1", 9877)
    )
    pins: Path = setting(
        keys.PATH, "the dataplane's directory, on a bpf file system", Path("/sys/fs/bpf/coloebpf/host")
    )
    mtu: int = setting(keys.integer(576, 9000, "bytes"), "the largest of the guests'", 1500)
    log_level: str = setting(keys.choice("debug", "info", "warning", "error"), "what is logged", "info", live=True)


@dataclass(frozen=True, kw_only=True)
class PeerConfig:
    """[peer]: the other host."""

    name: str = setting(keys.NAME, "the other host's name, as its certificate and its own file have it", shown="b")
    listen: Address = setting(keys.ADDRESS, "this host's address on the management network", shown="192.0.2.1:7788")
    connect: Address = setting(keys.ADDRESS, "the other host's", shown="192.0.2.2:7788")
    ca: Path = setting(
        keys.PATH,
        "of the authority that signed both certificates (`coloebpf config init-pki`)",
        Path("/etc/coloebpf/pki/ca.pem"),
    )
    certificate: Path = setting(keys.PATH, "this host's certificate", Path("/etc/coloebpf/pki/host.pem"))
    key: Path = setting(keys.PATH, "this host's private key", Path("/etc/coloebpf/pki/host.key"))
    heartbeat_interval_ms: int = setting(ms(5, 10_000), "between two heartbeats on each path", 50)
    heartbeat_timeout_ms: int = setting(
        ms(10, 60_000), "without a heartbeat on either path for so long the other host is lost", 200
    )
    restart_grace_ms: int = setting(
        ms(0, GRACE_MAX_MS), "... but after a word of goodbye a service may be away for so long: a restart", 5000
    )
    encrypt_copies: bool = setting(
        keys.SWITCH,
        "guests' memory goes to the other host through TLS, with these certificates; the same on both hosts (what QEMU "
        "copies of disks, and forwarded frames, go as they are)",
        False,
    )


@dataclass(frozen=True, kw_only=True)
class NicConfig:
    """[[pair.nic]]: a NIC of the guest."""

    number: int = setting(keys.integer(0, MAX_NICS - 1), "of the dataplane, the same on both hosts", shown=0)
    vif: str = setting(keys.DEVICE, "the guest's device on this host", shown="vif1.0-emu")
    standby_vif: str = setting(
        keys.optional(keys.DEVICE, "", "none"),
        'for engine = "qemu" and "libxl-live": the guest\'s copies take this one and vif in turn',
        "",
    )
    fwd: str = setting(keys.DEVICE, "the device that is wired to the other host", shown="fwd0")
    vlan: int = setting(keys.integer(0, MAX_VLAN), "this NIC's VLAN id on fwd; 0: fwd is this NIC's alone", 0)
    mac: str = setting(
        keys.optional(keys.MAC, "", "any"), "the guest's; its frames have no other", "", shown="02:c0:10:00:00:01"
    )
    bridge: str = setting(
        keys.optional(keys.DEVICE, "", "the one that vif is in"), "where a promoted SVM speaks", "", shown="br0"
    )
    arp: Policy = setting(keys.member(Policy), "what happens to the guest's ARP frames", Policy.PASS, live=True)
    nd: Policy = setting(keys.member(Policy), "what happens to its IPv6 neighbour discovery", Policy.PASS, live=True)
    other: Policy = setting(
        keys.member(Policy), "what happens to its frames of other Ethernet types", Policy.COMPARE, live=True
    )

    def spec(self, pair: PairConfig) -> NicSpec:
        """As the dataplane's attach() takes it."""
        return NicSpec(
            nic=self.number, pair=pair.number, role=pair.role, vif=self.vif, fwd=self.fwd, vlan=self.vlan, mac=self.mac,
            arp=self.arp, nd=self.nd, other=self.other, standby_vif=self.standby_vif,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Exemption:
    """[[pair.exempt]]: traffic that passes uncompared."""

    protocol: int = setting(keys.PROTOCOL, "the IP protocol, a name or a number", shown="udp")
    guest_port: int = setting(keys.integer(0, 65535), "the guest's port; 0: every port", 0, shown=123)
    remote: str = setting(keys.PREFIX, "addresses of the other side", "0.0.0.0/0")
    nic: int = setting(keys.integer(0, MAX_NICS - 1), "number of the guest's NIC", shown=0)


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """[[pair]]: a guest on two hosts."""

    name: str = setting(keys.NAME, "the pair's name, in commands, logs and metrics", shown="web")
    number: int = setting(keys.integer(0, MAX_PAIRS - 1), "of the dataplane, the same on both hosts", shown=0)
    role: Role = setting(keys.member(Role), "what this host is to the guest", shown="primary")
    engine: Literal["libxl-colo", "libxl-live", "libxl-remus", "qemu", "model"] = setting(
        keys.choice("libxl-colo", "libxl-live", "libxl-remus", "qemu", "model"),
        "what makes the checkpoints",
        shown="libxl-colo",
    )
    arbiter: Literal["none", "etcd", "command"] = setting(
        keys.choice("none", "etcd", "command"), "who says which host goes on alone", "none", shown="command"
    )
    on_service_loss: Literal["hold", "open"] = setting(
        keys.choice("hold", "open"),
        "without the service: hold what is unproven, or let everything pass",
        "hold",
        live=True,
    )
    service_loss_after_ms: int = setting(
        ms(100, HOUR_MS), 'for "open": without the service for so long', 2000, live=True
    )
    compare_timeout_ms: int = setting(
        ms(10, 60_000),
        "output unproven for longer asks for a checkpoint",
        200,
        live=True,
    )
    interval_min_ms: int = setting(
        ms(0, 60_000), "from a commit to the next request for a checkpoint, at least", 20, live=True
    )
    interval_max_ms: int = setting(
        ms(10, HOUR_MS), "from a commit to the next request for a checkpoint, at most", 4000, live=True
    )
    commit_timeout_ms: int = setting(
        ms(100, HOUR_MS), "a checkpoint that takes longer has failed for good: the secondary is gone", 10_000, live=True
    )
    storm_count: int = setting(
        keys.integer(2, 10_000),
        "so many requests because of the traffic are a storm (periodic mode), if",
        20,
        live=True,
    )
    storm_window_ms: int = setting(ms(10, HOUR_MS), "... they come within so long", 2000, live=True)
    periodic_interval_ms: int = setting(
        ms(10, 60_000), "in periodic mode: from a commit to the next request", 100, live=True
    )
    calm_ms: int = setting(
        ms(100, HOUR_MS), "in periodic mode: without a cause for so long, back to lock-step mode", 10_000, live=True
    )
    nics: tuple[NicConfig, ...] = table(NicConfig, "nic", "the guest's NICs", many=True)
    exempts: tuple[Exemption, ...] = table(Exemption, "exempt", "passes uncompared", (), many=True, live=True)
    libxl_colo: LibxlColoConfig | None = table(LibxlColoConfig, "libxl_colo", 'for engine = "libxl-colo"', None)
    libxl_live: LibxlLiveConfig | None = table(LibxlLiveConfig, "libxl_live", 'for engine = "libxl-live"', None)
    libxl_remus: LibxlRemusConfig | None = table(LibxlRemusConfig, "libxl_remus", 'for engine = "libxl-remus"', None)
    qemu: QemuConfig | None = table(QemuConfig, "qemu", 'for engine = "qemu"', None)
    model: ModelConfig = table(ModelConfig, "model", 'for engine = "model"', ModelConfig())

    @property
    def relayed(self) -> bool:
        """`xl remus` is started and ended by this service, and its stream goes through a relay."""
        colo = self.engine == "libxl-colo" and self.libxl_colo is not None and self.libxl_colo.stream_listen is not None
        return colo or self.engine == "libxl-remus"

    @property
    def on_ports(self) -> bool:
        """Its vifs are ports that this service makes (coloebpf/xen/ports.py)."""
        return self.engine == "libxl-live" or self.relayed


@dataclass(frozen=True, kw_only=True)
class EtcdConfig:
    """[arbiter.etcd]: a lease in etcd."""

    endpoints: tuple[str, ...] = setting(keys.URLS, "members of the cluster", shown=["http://127.0.0.1:2379"])
    lease_s: int = setting(
        keys.integer(1, 60, "seconds"), "how long the right to go on alone lasts after each renewal", 2
    )
    prefix: str = setting(keys.NAME, "prefix of its keys: /prefix/pair/...", "coloebpf")
    ca: Path | None = setting(
        keys.optional(keys.PATH, None, "none"),
        "for https: of the authority of the members' certificates",
        None,
    )
    certificate: Path | None = setting(
        keys.optional(keys.PATH, None, "none"), "what this host shows to etcd, if that asks for a certificate", None
    )
    key: Path | None = setting(keys.optional(keys.PATH, None, "none"), "of that certificate", None)
    user: str = setting(
        keys.optional(keys.NAME, "", "none"), "of etcd, if that has authentication; reads and writes /prefix/", ""
    )
    password_file: Path | None = setting(
        keys.optional(keys.PATH, None, "none"), "has the user's password as its first line", None
    )
    request_timeout_ms: int = setting(ms(10, 60_000), "longest time for one answer", 500)


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """[arbiter.command]: turns the other host off; exit code 0 says that it is off."""

    fence: tuple[str, ...] = setting(
        keys.WORDS, "the command and its arguments", shown=["/usr/sbin/stonith_admin", "--reboot", "b"]
    )
    timeout_s: int = setting(keys.integer(1, 3600, "seconds"), "a command that takes longer has failed", 30)


@dataclass(frozen=True, kw_only=True)
class ArbiterConfig:
    """[arbiter]: those that pairs name."""

    etcd: EtcdConfig | None = table(EtcdConfig, "etcd", 'for arbiter = "etcd"', None)
    command: CommandConfig | None = table(CommandConfig, "command", 'for arbiter = "command"', None)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One host's file. `path`: where it was read."""

    path: Path = Path()
    host: HostConfig = table(HostConfig, "host", "this host")
    peer: PeerConfig | None = table(PeerConfig, "peer", "the other host; pairs need it", None)
    arbiter: ArbiterConfig = table(ArbiterConfig, "arbiter", "who says who goes on alone", ArbiterConfig())
    pairs: tuple[PairConfig, ...] = table(PairConfig, "pair", "the guests", (), many=True)


def parse(text: str, path: Path) -> Config:
    """The configuration that `text`, read from `path`, describes. Raises ConfigErrors with all that is wrong in it."""
    reader = Reader(path)
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigErrors([Mistake(path, "", f"is no TOML ({e})", "see https://toml.io")]) from e
    config = reader.read(Config, raw)
    if config is not None:
        config_checks.check(config, reader)
    if config is None or reader.mistakes:
        raise ConfigErrors(reader.mistakes)
    return replace(config, path=path)


def load(path: Path) -> Config:
    """Reads a host's file. Raises ConfigErrors with all that is wrong in it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is not UTF-8"
        raise ConfigErrors([Mistake(path, "", f"can't be read ({why})", "write one: coloebpf config example")]) from e
    return parse(text, path)
