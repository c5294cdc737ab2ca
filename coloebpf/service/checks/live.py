"""What engines need of a host whose guests' NICs are on ports: Xen with a known libxl, its hotplug script, sch_plug.

What is asked for is in docs/xen.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from coloebpf.errors import ConfigError
from coloebpf.service.checks import guest
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.checks.guest import LIBRARIES
from coloebpf.service.checks.qemu import free_address
from coloebpf.service.config import PairConfig
from coloebpf.service.disks import ColoDisk
from coloebpf.xen import hold, xlcfg
from coloebpf.xen.guest import SCRIPT, Wrong, port_of
from coloebpf.xen.libxl import VERSIONS

SCRIPTS = "/etc/xen/scripts"
PRIVCMD = ("/dev/xen/privcmd", "/proc/xen/privcmd")
AUTOBALLOON_OFF = re.compile(r"""^\s*autoballoon\s*=\s*["']?(off|0)["']?\s*$""", re.MULTILINE)
PRECOPY_ADVICE = "install what `deploy/xen/rebuild.sh precopy` makes, or take the key out: checkpoints copy more then"
MODULES = ("sch_plug", "act_mirred", "cls_u32")  # what keeps frames, and what joins taps and ports


def engine(host: Host) -> Iterator[Finding]:
    """The engine could start."""
    pairs = [pair for pair in host.known.pairs if pair.on_ports]
    if not pairs:
        yield Finding(OK, "no pair's NICs are on ports")
        return
    yield _library(host)
    yield _xen(host)
    yield _script(host)
    yield from _modules(host)
    for pair in pairs:
        yield from _addresses(pair)
        yield from _precopy(host, pair)
        yield from _guest(host, pair)
    yield from _lock(host, pairs)


def lacks(pair: PairConfig, host: Host) -> str:
    """Why the pair's guest can't be protected with this host, in one sentence; "" if nothing speaks against it."""
    found = [_library(host), _xen(host), _script(host), *_modules(host)]
    if pair.engine == "libxl-colo":
        found += guest.stack(host, [pair])
    return "; ".join(f"{one.text} ({one.advice})" for one in found if one.level == FAIL)


def _addresses(pair: PairConfig) -> Iterator[Finding]:
    """What must be free to listen at."""
    if pair.engine == "libxl-live" and pair.libxl_live:
        yield free_address(f"[pair.libxl_live] listen of pair {pair.name}", pair.libxl_live.listen)
    if pair.engine == "libxl-remus" and pair.libxl_remus:
        yield free_address(f"[pair.libxl_remus] stream_listen of pair {pair.name}", pair.libxl_remus.stream_listen)
    if pair.engine == "libxl-colo" and pair.libxl_colo and pair.libxl_colo.stream_listen:
        yield free_address(f"[pair.libxl_colo] stream_listen of pair {pair.name}", pair.libxl_colo.stream_listen)


def _precopy(host: Host, pair: PairConfig) -> Iterator[Finding]:
    """The library is there, and is ours: one that can't be loaded only changes that checkpoints are slow."""
    if pair.engine != "libxl-live" or pair.libxl_live is None or pair.libxl_live.precopy is None:
        return
    path = host.at(str(pair.libxl_live.precopy))
    try:
        text = path.read_bytes()
    except OSError as e:
        yield Finding(FAIL, f"[pair.libxl_live] precopy of pair {pair.name}: {path}: {e.strerror}", PRECOPY_ADVICE)
        return
    if all(mark in text for mark in hold.MARKS):
        yield Finding(OK, f"{path} keeps copies going")
    else:
        yield Finding(FAIL, f"{path} is no library of coloebpf's", PRECOPY_ADVICE)


def _lock(host: Host, pairs: list[PairConfig]) -> Iterator[Finding]:
    """xl takes a lock for a whole session of Remus or COLO if it may balloon (xl_vmcontrol.c, acquire_lock())."""
    if not any(pair.relayed for pair in pairs):
        return
    path = host.at("/etc/xen/xl.conf")
    text = path.read_text(errors="replace") if path.exists() else ""
    if AUTOBALLOON_OFF.search(text):
        yield Finding(OK, f"{path} has autoballoon off")
    else:
        yield Finding(
            WARN,
            f"{path} does not say that autoballoon is off: unless dom0's memory is fixed on Xen's command line, the "
            "secondary's xl keeps its lock for as long as a guest is protected, and no other guest can be started",
            'autoballoon="off"',
        )


def _library(host: Host) -> Finding:
    known = {f"libxenlight.so.{version}" for version in VERSIONS}
    there = [path for pattern in LIBRARIES for path in sorted(host.root.glob(pattern))]
    for path in there:
        if path.name in known:
            return Finding(OK, f"libxl is of a version that coloebpf knows ({path})")
    advice = f"apt-get install xen-utils-{VERSIONS[0]} (Debian 12's)"
    if not there:
        return Finding(FAIL, "there is no libxenlight", advice)
    return Finding(FAIL, f"{there[0].name} is of another version than coloebpf knows: {', '.join(VERSIONS)}", advice)


def _xen(host: Host) -> Finding:
    if any(host.at(path).exists() for path in PRIVCMD):
        return Finding(OK, "this host runs under Xen")
    return Finding(FAIL, "this host does not run under Xen, or is no dom0", "boot the entry with Xen; see `xl info`")


def _script(host: Host) -> Finding:
    path = host.at(f"{SCRIPTS}/{SCRIPT}")
    if path.exists() and os.access(path, os.X_OK):
        return Finding(OK, f"the hotplug script {path} is there")
    return Finding(FAIL, f"there is no hotplug script {path}", f"install deploy/xen/{SCRIPT} there, with mode 755")


def _modules(host: Host) -> Iterator[Finding]:
    modules = host.at(f"/lib/modules/{host.release or os.uname().release}")
    try:
        builtin = (modules / "modules.builtin").read_text()
    except OSError:
        builtin = ""
    for name in MODULES:
        loaded = host.at(f"/sys/module/{name}").exists()
        if loaded or f"/{name}.ko" in builtin or any(modules.glob(f"kernel/net/sched/{name}.ko*")):
            yield Finding(OK, f"the kernel has {name}")
        elif not modules.exists():
            yield Finding(WARN, f"nobody can say whether the kernel has {name}", f"modprobe {name}")
        else:
            yield Finding(FAIL, f"the kernel has no {name}", "use Debian's kernel, or build one with it")


def _guest(host: Host, pair: PairConfig) -> Iterator[Finding]:
    path = host.at(f"/etc/xen/{domain_of(pair)}.cfg")
    if not path.exists():
        yield Finding(
            WARN,
            f"{path} is not there, so the guest of pair {pair.name} can't be checked",
            "coloebpf config xl FILE says the same of another file",
        )
        return
    try:
        found = wrong_in(path, pair)
    except ConfigError as error:
        yield Finding(FAIL, f"{path} can't be read: {error}", "`xl create -n` says what is wrong with it")
        return
    yield from (Finding(FAIL, f"{path}: {one.text}", one.advice) for one in found)
    if not found:
        yield Finding(OK, f"{path} is as {pair.engine} needs it")


def domain_of(pair: PairConfig) -> str:
    """A guest's name in xl; "" of an engine without Xen."""
    of = {"libxl-live": pair.libxl_live, "libxl-remus": pair.libxl_remus, "libxl-colo": pair.libxl_colo}
    config = of.get(pair.engine)
    return config.domain if config is not None else ""


def wrong_in(path: Path, pair: PairConfig) -> list[Wrong]:
    """What has to change in a guest's file. Raises ConfigError."""
    try:
        text = path.read_text(errors="replace")
    except OSError as e:
        raise ConfigError(f"{path} can't be read: {e.strerror}") from e
    ports = [port_of(nic.vif) for nic in pair.nics]
    disk = ColoDisk.of(pair)
    line = disk.line() if disk is not None else ""
    needs = xlcfg.Needs(emulated=pair.engine != "libxl-remus", replicates=pair.engine == "libxl-colo", disk=line)
    return xlcfg.changes(xlcfg.settings(text), ports, [nic.mac for nic in pair.nics], needs)
