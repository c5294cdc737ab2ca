"""What a configuration must be as a whole: numbers and devices used once, times that fit each other, sections there.

A table that has a mistake of its own is None here (config_reader): what it would be compared with is skipped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from typing import TYPE_CHECKING

from coloebpf.service.config_keys import Address
from coloebpf.service.config_reader import Reader
from coloebpf.xen.guest import MAX_NAME, SUFFIX

if TYPE_CHECKING:
    from coloebpf.service.config import Config, EtcdConfig, NicConfig, PairConfig
    from coloebpf.service.config_engines import XenGuestConfig

LIBXL_INTERVAL_MS = 5000  # libxl checkpoints by itself after that time (shared/reference/xen-libxl-colo.md)
HEARTBEATS = 2  # that may be late or lost before the other host is
RENEWALS = 3  # that a lease must have time for: one may be lost, and the next be slow

Pairs = list[tuple[str, "PairConfig"]]  # with their keys, as below
Nics = list[tuple[str, "NicConfig"]]


def check(config: Config, reader: Reader) -> None:
    """Notes each mistake in `reader`."""
    pairs = [(f"pair[{i}]", pair) for i, pair in enumerate(config.pairs) if pair]
    nics = [(f"{at}.nic[{i}]", nic) for at, pair in pairs for i, nic in enumerate(pair.nics) if nic]
    _once(reader, ((f"{at}.name", pair.name) for at, pair in pairs), "a pair's name is its own")
    _once(reader, ((f"{at}.number", pair.number) for at, pair in pairs), "a pair's number is its own")
    _once(reader, ((f"{at}.number", nic.number) for at, nic in nics), "a NIC's number is its own on the whole host")
    _once(reader, ((f"{at}.mac", nic.mac) for at, nic in nics if nic.mac), "a NIC's MAC address is its own")
    _once(reader, _listening(config, pairs), "give it a port of its own")
    _devices(reader, nics)
    for at, pair in pairs:
        _times(reader, at, pair)
        _engine(reader, at, pair)
        if pair.engine == "libxl-colo" and not pair.relayed and pair.arbiter == "etcd":
            # libxl goes on copying a halted PVM over the promoted SVM for as long as its host and xl live.
            why = 'must be "command" or "none" with engine libxl-colo: only an end of that host ends libxl there'
            reader.wrong(f"{at}.arbiter", "is etcd", why)
        if pair.on_service_loss == "open" and pair.arbiter != "none":
            why = 'must be "hold" with an arbiter: without this host\'s service the other one takes over'
            reader.wrong(f"{at}.on_service_loss", "is open", why)
        _exemptions(reader, at, pair)
    _arbiters(reader, config, pairs)
    _peer(reader, config)


def _once(reader: Reader, values: Iterable[tuple[str, Hashable]], right: str) -> None:
    first: dict[Hashable, str] = {}
    for key, value in values:
        if value in first:
            reader.wrong(key, f"is {value}, as {first[value]} is", right)
        first.setdefault(value, key)


def _listening(config: Config, pairs: Pairs) -> Iterator[tuple[str, Address]]:
    if config.host and config.host.metrics_listen:
        yield "host.metrics_listen", config.host.metrics_listen
    if config.peer:
        yield "peer.listen", config.peer.listen
    for at, pair in pairs:
        if pair.engine == "libxl-colo" and pair.libxl_colo:
            yield f"{at}.libxl_colo.listen", pair.libxl_colo.listen
            if pair.libxl_colo.stream_listen:
                yield f"{at}.libxl_colo.stream_listen", pair.libxl_colo.stream_listen
            for i, disk in enumerate(pair.libxl_colo.disks):
                if disk:
                    yield f"{at}.libxl_colo.disk[{i}].listen", disk.listen
        if pair.engine == "libxl-remus" and pair.libxl_remus:
            yield f"{at}.libxl_remus.stream_listen", pair.libxl_remus.stream_listen
        if pair.engine == "libxl-live" and pair.libxl_live:
            yield f"{at}.libxl_live.listen", pair.libxl_live.listen
        if pair.engine == "qemu" and pair.qemu:
            yield f"{at}.qemu.listen", pair.qemu.listen
            if pair.qemu.disk_listen:
                yield f"{at}.qemu.disk_listen", pair.qemu.disk_listen


def _devices(reader: Reader, nics: Nics) -> None:
    of_vms = [(f"{at}.vif", nic.vif) for at, nic in nics]
    of_vms += [(f"{at}.standby_vif", nic.standby_vif) for at, nic in nics if nic.standby_vif]
    _once(reader, of_vms, "a vif is one NIC's")
    sharing: dict[str, Nics] = defaultdict(list)
    for at, nic in nics:
        sharing[nic.fwd].append((at, nic))
    for at, nic in nics:
        if nic.vif in sharing:
            reader.wrong(f"{at}.vif", f"is {nic.vif}, as {sharing[nic.vif][0][0]}.fwd is", "fwd has no other use")
    for fwd, users in sharing.items():
        if len(users) == 1:
            continue
        for at, nic in users:
            if not nic.vlan:
                other = next(key for key, _ in users if key != at)
                reader.wrong(f"{at}.vlan", f"is 0 while {other} is on {fwd} too", "NICs that share fwd have VLAN ids")
        tagged = ((f"{at}.vlan", nic.vlan) for at, nic in users if nic.vlan)
        _once(reader, tagged, f"NICs that share {fwd} have different ones")


def _times(reader: Reader, at: str, pair: PairConfig) -> None:
    def below(low: str, high: str, equal: bool = False) -> None:
        a, b = getattr(pair, low), getattr(pair, high)
        if a > b or (a == b and not equal):
            reader.wrong(f"{at}.{low}", f"is {a}", f"must be {'at most' if equal else 'below'} {high}, which is {b}")

    below("interval_min_ms", "interval_max_ms")
    below("compare_timeout_ms", "interval_max_ms")
    below("interval_min_ms", "periodic_interval_ms", equal=True)
    below("periodic_interval_ms", "interval_max_ms", equal=True)
    below("storm_window_ms", "calm_ms", equal=True)
    if pair.engine == "libxl-colo" and not pair.relayed and pair.interval_max_ms >= LIBXL_INTERVAL_MS:
        why = f"must be below {LIBXL_INTERVAL_MS}: libxl checkpoints by itself then"
        reader.wrong(f"{at}.interval_max_ms", f"is {pair.interval_max_ms}", why)
    fastest = pair.storm_count * pair.interval_min_ms
    if fastest > pair.storm_window_ms:
        why = f"must be at least storm_count * interval_min_ms, which is {fastest}, or no storm is ever seen"
        reader.wrong(f"{at}.storm_window_ms", f"is {pair.storm_window_ms}", why)


def _engine(reader: Reader, at: str, pair: PairConfig) -> None:
    if pair.engine == "qemu":
        _qemu(reader, at, pair)
    if pair.engine == "libxl-live":
        _xen(reader, at, pair, "libxl_live", pair.libxl_live, standby=True)
    if pair.engine == "libxl-remus":
        _xen(reader, at, pair, "libxl_remus", pair.libxl_remus, standby=False)
    if pair.engine != "libxl-colo":
        return
    if pair.relayed:
        _xen(reader, at, pair, "libxl_colo", pair.libxl_colo, standby=False)
    if not pair.libxl_colo:
        _missing(reader, f"{at}.libxl_colo", f'{at}.engine = "libxl-colo" needs it')
        return
    listen = pair.libxl_colo.listen
    if not listen.loopback or ":" in listen.host:
        why = "must be an IPv4 address of loopback: libxl knows no other, and nothing protects the connection"
        reader.wrong(f"{at}.libxl_colo.listen", f"is {listen}", why)
    disks = pair.libxl_colo.disks
    if len(disks) > 1:
        why = "must be one: libxl's check of a second one reads a dangling pointer"
        reader.wrong(f"{at}.libxl_colo.disk", f"are {len(disks)}", why)
    if disks and not pair.relayed:
        _missing(reader, f"{at}.libxl_colo.stream_listen", "a disk needs it: libxl alone does not hand it over whole")
    for i, disk in enumerate(disks):
        if disk and disk.listen == disk.peer_listen:
            key = f"{at}.libxl_colo.disk[{i}]"
            reader.wrong(f"{key}.peer_listen", f"is {disk.peer_listen}, as {key}.listen is", "the other host's address")


def _xen(reader: Reader, at: str, pair: PairConfig, name: str, config: XenGuestConfig | None, standby: bool) -> None:
    """`standby`: its copies are domains of their own, in turn behind two ports."""
    needs = f'{at}.engine = "{pair.engine}" needs'
    if not config:
        _missing(reader, f"{at}.{name}", f"{needs} it")
    elif pair.commit_timeout_ms < config.copy_timeout_s * 1000:
        why = f"must be at least {at}.{name}.copy_timeout_s, which is {config.copy_timeout_s} s"
        reader.wrong(f"{at}.commit_timeout_ms", f"is {pair.commit_timeout_ms}", why)
    for i, nic in enumerate(pair.nics):
        if not nic:
            continue
        if standby and not nic.standby_vif:
            _missing(reader, f"{at}.nic[{i}].standby_vif", f"{needs} a second port for each NIC")
        if not nic.bridge:
            _missing(reader, f"{at}.nic[{i}].bridge", f"{needs} to know where its ports belong")
        for key in ("vif", "standby_vif"):
            if len(port := getattr(nic, key)) > MAX_NAME:
                why = f"must have {MAX_NAME} characters at most, for the other end's name has {SUFFIX} behind it"
                reader.wrong(f"{at}.nic[{i}].{key}", f"is {port}", why)


def _qemu(reader: Reader, at: str, pair: PairConfig) -> None:
    if not pair.qemu:
        _missing(reader, f"{at}.qemu", f'{at}.engine = "qemu" needs it')
    for i, nic in enumerate(pair.nics):
        if nic and not nic.standby_vif:
            _missing(reader, f"{at}.nic[{i}].standby_vif", f'{at}.engine = "qemu" needs a second tap for each NIC')
    if pair.qemu and pair.qemu.disks and not pair.qemu.disk_listen:
        _missing(reader, f"{at}.qemu.disk_listen", "disks need it")
    for i in range(len(pair.qemu.disks) if pair.qemu else 0):
        if pair.qemu and f"{{disk{i}}}" not in " ".join(pair.qemu.command):
            reader.wrong(f"{at}.qemu.command", f"has no {{disk{i}}}", "must have the file of each disk")
    if pair.qemu and "{qmp}" not in " ".join(pair.qemu.command):
        reader.wrong(f"{at}.qemu.command", "has no {qmp}", "must make QEMU listen there, or nobody can speak to it")


def _exemptions(reader: Reader, at: str, pair: PairConfig) -> None:
    numbers = sorted(nic.number for nic in pair.nics if nic)
    if len(numbers) < len(pair.nics):
        return
    for i, exempt in enumerate(pair.exempts):
        if exempt and exempt.nic not in numbers:
            known = ", ".join(map(str, numbers))
            reader.wrong(f"{at}.exempt[{i}].nic", f"is {exempt.nic}", f"must be one of this pair's NICs: {known}")


def _arbiters(reader: Reader, config: Config, pairs: Pairs) -> None:
    for at, pair in pairs:
        if pair.arbiter != "none" and config.arbiter and getattr(config.arbiter, pair.arbiter) is None:
            _missing(reader, f"arbiter.{pair.arbiter}", f'{at}.arbiter = "{pair.arbiter}" needs it')
    etcd = config.arbiter.etcd if config.arbiter else None
    if etcd is None:
        return
    _etcd_access(reader, etcd)
    for key, least in (
        (f"{RENEWALS} * arbiter.etcd.request_timeout_ms", RENEWALS * etcd.request_timeout_ms),
        ("peer.heartbeat_timeout_ms", config.peer.heartbeat_timeout_ms if config.peer else 0),
    ):
        if etcd.lease_s * 1000 < least:
            reader.wrong("arbiter.etcd.lease_s", f"is {etcd.lease_s}", f"must not be shorter than {key}: {least} ms")


def _etcd_access(reader: Reader, etcd: EtcdConfig) -> None:
    at = "arbiter.etcd"
    secured = {url.startswith("https:") for url in etcd.endpoints}
    if len(secured) > 1:
        reader.wrong(f"{at}.endpoints", "are of http and https", "a cluster speaks one of them")
    elif secured == {True} and etcd.ca is None:
        reader.wrong(f"{at}.ca", "is missing", f"{at}.endpoints are of https: name the authority of their certificates")
    elif secured == {False} and (etcd.ca or etcd.certificate or etcd.key):
        reader.wrong(f"{at}.endpoints", "are of http", f"must be of https, for {at} has files for that")
    for both in (("certificate", "key"), ("user", "password_file")):
        there = [key for key in both if getattr(etcd, key)]
        if len(there) == 1:
            other = both[both[0] == there[0]]
            reader.wrong(f"{at}.{other}", "is missing", f"goes with {at}.{there[0]}")


def _peer(reader: Reader, config: Config) -> None:
    peer = config.peer
    if peer is None:
        if config.pairs:
            _missing(reader, "peer", "a pair has two hosts")
        return
    if config.host and peer.name == config.host.name:
        reader.wrong("peer.name", f"is {peer.name}, as host.name is", "hosts have different names")
    if peer.connect == peer.listen:
        reader.wrong("peer.connect", f"is {peer.connect}, as peer.listen is", "must be the other host's address")
    least = HEARTBEATS * peer.heartbeat_interval_ms
    if peer.heartbeat_timeout_ms <= least:
        why = f"must be above {HEARTBEATS} * heartbeat_interval_ms, which is {least}"
        reader.wrong("peer.heartbeat_timeout_ms", f"is {peer.heartbeat_timeout_ms}", why)


def _missing(reader: Reader, key: str, right: str) -> None:
    """The table isn't there; if it is, with a mistake in it, that one is noted already."""
    if not any(mistake.key == key or mistake.key.startswith(f"{key}.") for mistake in reader.mistakes):
        reader.wrong(key, "is missing", right)
