"""Loading and attaching: compiles the programs, pins maps and programs, hangs them on a guest NIC's devices."""

from __future__ import annotations

import ctypes as ct
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coloebpf import bpfsys, netdev, pins, shapes, tuning, vifs
from coloebpf.detaching import detach, remove_pins
from coloebpf.errors import BpfError, ConfigError
from coloebpf.model import MAX_NICS, MAX_PAIRS, NIC_CLSACT_FWD, NIC_CLSACT_VIF, NicSpec, Role, Sizes
from coloebpf.pins import MAPS, TC_PROGRAMS, XDP_PROGRAMS
from coloebpf.preflight import Headers, Preflight
from coloebpf.source import one_text

__all__ = ["Dataplane", "NicSpec", "Role", "Sizes", "detach"]

COMPARE_TIMEOUT_NS = 200_000_000  # docs/design.md, section 5; QEMU's is 3 s
MARK_SHIFT, MARK_MAX = 20, 0xFFF  # of skb->mark the upper 12 bits are the secret (FLOW_MASK in bpf/constants.h)
MAX_VLAN = 4094

# STAGE_* of bpf/maps.h
TC_STAGES = (
    "drain",
    "split",
    "p4_prove",
    "s1_deliver",
    "pass_whole",
    "hold",
    "split_udp",
    "partial",
    "p4_datagram",
    "answer",
    "let_go",
    "p1_alias",
    "p2_alias",
)
XDP_STAGES = ("p3_arrive", "s1_arrive")
STREAM_WORDS, DGRAM_WORDS, HASH_PAD = 512, 16384, 32  # of bpf/constants.h
JUMBO_STREAM_WORDS = 4096  # keys for a slot of 16 KiB
SPARE_MAGAZINES = 1024  # likewise of bpf/constants.h


def defines(sizes: Sizes, pin_dir: Path) -> list[str]:
    """The compiler's flags for `sizes`. Raises ConfigError for one that the programs can't have."""
    for what, n, top in (("slots", sizes.slots, 65536), ("flows", sizes.flows, 1 << 20)):
        if n < 2 or n > top or n & (n - 1):
            raise ConfigError(f"{what} = {n}: must be a power of two between 2 and {top}")
    if not 576 <= sizes.mtu <= 9000:
        raise ConfigError(f"mtu = {sizes.mtu}: must be between 576 and 9000")
    words = stream_words(sizes)
    flags = [
        f'-DPIN_DIR="{pin_dir}"',
        f"-DMAGAZINE={magazine(sizes)}",
        f"-DSTREAM_WORDS={words}u",
        f"-DHASH_KEYS_BYTES={(words + DGRAM_WORDS + 2 * HASH_PAD + 2) * 8}",
        f"-DMAX_SLOTS={sizes.slots}u",
        f"-DHELD_BYTES={sizes.slots * 64}",
        f"-DMAX_FLOWS={sizes.flows}u",
    ]
    if sizes.jumbo:  # a longer hash leaves the verifier less for the rest
        flags += ["-DSLOT_SHIFT=14", "-DHASH_ROUNDS=71", "-DDRAIN_STEPS=4", "-DGSO_BATCH=1"]
    return flags


def stream_words(sizes: Sizes) -> int:
    """Keys of the hash of streams: one for each 4 bytes of a slot, so that no segment meets a key twice."""
    return JUMBO_STREAM_WORDS if sizes.jumbo else STREAM_WORDS


def magazine(sizes: Sizes) -> int:
    """Free slots that a CPU keeps for itself: few enough not to be missed. One less than a power of two."""
    return 15 if sizes.slots >= 4096 else 1


def check_spec(spec: NicSpec) -> bytes:
    """The guest's MAC as bytes, zeros for any. Raises ConfigError for what a NIC can't have."""
    if not 0 <= spec.nic < MAX_NICS or not 0 <= spec.pair < MAX_PAIRS:
        raise ConfigError(f"nic {spec.nic}, pair {spec.pair}: both must be between 0 and {MAX_NICS - 1}")
    if not 0 <= spec.vlan <= MAX_VLAN:
        raise ConfigError(f"vlan {spec.vlan} of {spec.vif}: must be between 0 (none) and {MAX_VLAN}")
    try:
        mac = bytes.fromhex(spec.mac.replace(":", "")) if spec.mac else bytes(6)
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise ConfigError(f"mac {spec.mac!r} of {spec.vif} is not a MAC address such as 02:c0:10:00:00:01")
    return mac


def _compile(flags: Iterable[str], headers: Headers) -> Any:
    headers.tell_bcc(os.environ)
    from bcc import BPF

    try:
        return BPF(text=one_text().encode(), cflags=[*headers.cflags, *flags, "-Wno-unused-function"])
    except Exception as e:  # bcc raises bare Exception
        raise BpfError(f"the programs do not compile ({e}); see the compiler's words above") from e


def _programs(module: Any) -> dict[str, int]:
    from bcc import BPF

    fds = {}
    for names, kind in ((TC_PROGRAMS, BPF.SCHED_CLS), (XDP_PROGRAMS, BPF.XDP)):
        for name in names:
            try:
                fds[name] = module.load_func(name.encode(), kind).fd
            except Exception as e:  # bcc raises bare Exception
                raise BpfError(f"the kernel refuses program {name}: {e}") from e
    return fds


def _source(flags: Iterable[str]) -> str:
    """Stands for all that a compile depends on."""
    whole = "\0".join((one_text(), *flags, os.uname().release))
    return hashlib.sha256(whole.encode()).hexdigest()


def _descriptions(module: Any) -> dict[str, list[Any]]:
    from bcc import lib

    said = {}
    for name in MAPS:
        key = lib.bpf_table_key_desc(module.module, name.encode())
        leaf = lib.bpf_table_leaf_desc(module.module, name.encode())
        said[name] = [json.loads(text) if text else None for text in (key, leaf)]
    return said


class Dataplane:
    """The programs and maps of one host, pinned under `pin_dir`."""

    def __init__(self, pin_dir: Path, kinds: shapes.Shapes, programs: dict[str, int], sizes: Sizes) -> None:
        self.pin_dir, self.sizes = pin_dir, sizes
        self._kinds, self._programs = kinds, programs
        self._fds: dict[str, int] = {}
        self._module: Any = None  # keeps the descriptors of what it has loaded

    @classmethod
    def load(cls, pin_dir: Path, sizes: Sizes | None = None, check: Callable[[], Headers] | None = None) -> Dataplane:
        """Compiles (some 3 s), loads and pins; what is pinned already: maps are kept, programs replaced.

        Raises a child of ColoError; a first load that fails leaves no pins.
        """
        sizes = sizes or Sizes()
        headers = (check or Preflight().check)()
        flags = defines(sizes, pin_dir)
        with ExitStack() as undo:
            kept = _kept(pin_dir, sizes) if pins.any_there(pin_dir) else None
            if kept is None:
                undo.callback(remove_pins, pin_dir)
                pin_dir.mkdir(parents=True, exist_ok=True)
            module = _compile(flags, headers)
            said = _descriptions(module)
            if kept is None:
                shapes.save(pin_dir, said)
            elif said != kept.said:
                raise ConfigError(f"{pin_dir} has maps of another version of coloebpf: detach, then load again")
            plane = cls(pin_dir, kept or shapes.Shapes(pin_dir), _programs(module), sizes)
            plane._module = module
            if kept is None:
                plane._fill()
            shapes.note_source(pin_dir, "")  # until settled()
            plane._publish()
            undo.pop_all()
        tuning.raise_backlog(2 * sizes.slots)
        return plane

    @classmethod
    def reuse(cls, pin_dir: Path, sizes: Sizes) -> Dataplane | None:
        """What is pinned and settled, if load() would make the same; else None. Raises as load() does for its maps."""
        if not pins.any_there(pin_dir) or shapes.noted_source(pin_dir) != _source(defines(sizes, pin_dir)):
            return None
        kinds = _kept(pin_dir, sizes)
        pins.complete(pin_dir, (*TC_PROGRAMS, *XDP_PROGRAMS))
        programs = {name: bpfsys.obj_get(pin_dir / name) for name in (*TC_PROGRAMS, *XDP_PROGRAMS)}
        return cls(pin_dir, kinds, programs, sizes)

    def _fd(self, table: str) -> int:
        if table not in self._fds:
            self._fds[table] = bpfsys.obj_get(self.pin_dir / table)
        return self._fds[table]

    def _fill(self) -> None:
        """What a fresh set of maps needs once: secrets, free lists, sizes. The settings come last: they say "done"."""
        size = ct.sizeof(self._kinds.leaf("hash_keys"))
        keys, start = bytearray(os.urandom(size)), 0
        for words in (stream_words(self.sizes), DGRAM_WORDS):  # the first keys of each table again behind its last
            end = start + words * 8
            keys[end : end + HASH_PAD * 8] = keys[start : start + HASH_PAD * 8]
            start = end + HASH_PAD * 8
        bpfsys.update(self._fd("hash_keys"), ct.c_uint32(0), (ct.c_char * size).from_buffer(keys))
        for number in reversed(range(self.sizes.flows)):  # a stack: the lowest come first
            bpfsys.update(self._fd("free_flows"), None, ct.c_uint32(number))
        self._fill_magazines()
        settings = self._kinds.leaf("settings")()
        settings.mark = (secrets.randbelow(MARK_MAX) + 1) << MARK_SHIFT
        settings.slots, settings.flows, settings.slot_bytes = _figures(self.sizes)
        settings.compare_timeout_ns = COMPARE_TIMEOUT_NS
        bpfsys.update(self._fd("settings"), ct.c_uint32(0), settings)

    def _fill_magazines(self) -> None:
        """All slots into magazines; those behind them stay empty."""
        size = magazine(self.sizes)
        full = -(-self.sizes.slots // size)
        for number in range(1, full + 1):
            slots = range((number - 1) * size, min(number * size, self.sizes.slots))
            value = self._kinds.leaf("magazines")()
            words = (ct.c_uint32 * (size + 1)).from_buffer(value)
            words[: len(slots) + 1] = [len(slots), *slots]
            bpfsys.update(self._fd("magazines"), ct.c_uint32(number), value)
        empty = range(full + SPARE_MAGAZINES, full, -1)
        for table, numbers in (("full_magazines", range(full, 0, -1)), ("empty_magazines", empty)):
            for number in numbers:
                bpfsys.update(self._fd(table), None, ct.c_uint32(number))

    def _publish(self) -> None:
        """Tail calls find the programs, and so do others by their pins."""
        for stages, table in ((TC_STAGES, "tc_stages"), (XDP_STAGES, "xdp_stages")):
            for number, name in enumerate(stages):
                bpfsys.update(self._fd(table), ct.c_uint32(number), ct.c_uint32(self._programs[name]))
        for name, fd in self._programs.items():
            bpfsys.obj_pin(fd, self.pin_dir / name)

    def prog_fd(self, name: str) -> int:
        """File descriptor of a loaded program."""
        return self._programs[name]

    def attach(self, spec: NicSpec, xdp_mode: str = "auto", rps: bool = True) -> None:
        """Hangs the programs on the NIC's devices, in the caller's network namespace.

        Again over a running one: replaces them without a gap, and keeps the NIC's exemptions. When it fails, what this
        call has added to hooks and maps is taken away again; the offloads of `fwd` stay off.

        With a `standby_vif` the guest is behind whichever of the two it was, and a secondary's hooks are on both.
        """
        mac = check_spec(spec)
        with netdev.Devices() as devices, ExitStack() as undo:
            fwd = devices.find(spec.fwd)
            vifs = self._vifs(spec, devices)
            for vif in vifs:
                devices.check_forward(fwd, vif, self.sizes.mtu)
            hooks = _hooks(spec, vifs, fwd)
            ours = [devices.check_free(device, side) for device, side, _ in hooks]
            xdp_ours = devices.check_xdp_free(fwd)
            tuning.offloads_off(spec.fwd)
            made = dict.fromkeys((vif.index for vif in vifs), 0)
            for device in (*vifs, fwd):
                if devices.ensure_clsact(device):
                    undo.callback(devices.remove_clsact, device.index)
                    of_vif = device.index != fwd.index
                    made[device.index if of_vif else vifs[0].index] |= NIC_CLSACT_VIF if of_vif else NIC_CLSACT_FWD
            self._register(undo, spec, mac, fwd.index, made)
            for (device, side, program), there in zip(hooks, ours, strict=True):
                if not there:
                    undo.callback(devices.remove_tc, device.index, side)
                devices.attach_tc(device, side, program, self._programs[program])
            if not xdp_ours:
                undo.callback(devices.remove_xdp, fwd.index)
            devices.attach_xdp(fwd, self._programs[netdev.XDP_PROGRAM], xdp_mode)
            if rps:
                for vif in vifs:
                    tuning.spread_receive(vif.name)
            undo.pop_all()

    def detach(self, nic: int) -> None:
        """Takes the programs off one NIC's devices, and the NIC out of the maps; fwd stays if another NIC uses it."""
        value, link = self._kinds.leaf("nics")(), self._kinds.key("links")()
        bpfsys.lookup(self._fd("nic_by_id"), ct.c_uint32(nic), value)
        of_vif = self._of_nic(nic)
        with netdev.Devices() as devices:
            for vif, flags in of_vif.items():
                devices.detach(vif, bool(flags & NIC_CLSACT_VIF))
            link.fwd, link.vlan = value.fwd, value.vlan
            bpfsys.delete(self._fd("links"), link)
            if not any(key.fwd == value.fwd for key in bpfsys.keys(self._fd("links"), type(link))):
                devices.detach(value.fwd, any(flags & NIC_CLSACT_FWD for flags in of_vif.values()))
        for vif in of_vif:
            bpfsys.delete(self._fd("nics"), ct.c_uint32(vif))
        bpfsys.update(self._fd("nic_by_id"), ct.c_uint32(nic), type(value)())

    def settled(self) -> None:
        """Every NIC has these programs: a start after this one may go on with them (reuse)."""
        shapes.note_source(self.pin_dir, _source(defines(self.sizes, self.pin_dir)))

    def is_attached(self, spec: NicSpec) -> bool:
        """For programs that were reused: attach() would change nothing, but for offloads that somebody turned on."""
        mac = check_spec(spec)
        with netdev.Devices() as devices:
            fwd = devices.find(spec.fwd)
            vifs = self._vifs(spec, devices)
            there = self._kinds.leaf("nics")()
            for vif in vifs:
                if not bpfsys.lookup(self._fd("nics"), ct.c_uint32(vif.index), there):
                    return False
                wanted = self._nic(spec, mac, vif.index, fwd.index)
                wanted.exempts, wanted.flags = there.exempts, there.flags
                if bytes(wanted) != bytes(there):
                    return False
            hooks = _hooks(spec, vifs, fwd)
            return all(devices.check_free(device, side) for device, side, _ in hooks) and devices.check_xdp_free(fwd)

    def _vifs(self, spec: NicSpec, devices: netdev.Devices) -> list[netdev.Device]:
        """Those that get hooks, the one that the guest is behind first."""
        both = [devices.find(name) for name in (spec.vif, spec.standby_vif) if name]
        before = self._kinds.leaf("nic_by_id")()
        bpfsys.lookup(self._fd("nic_by_id"), ct.c_uint32(spec.nic), before)
        both.sort(key=lambda vif: vif.index != before.vif)  # stable: `vif` is first if it was neither
        return both if spec.role == Role.SECONDARY else both[:1]

    def _of_nic(self, nic: int) -> dict[int, int]:
        """Flags by ifindex of the vifs that a NIC has."""
        found, value = {}, self._kinds.leaf("nics")()
        for key in bpfsys.keys(self._fd("nics"), ct.c_uint32):
            if bpfsys.lookup(self._fd("nics"), key, value) and value.id == nic:
                found[key.value] = value.flags
        return found

    def _nic(self, spec: NicSpec, mac: bytes, vif: int, fwd: int) -> Any:
        nic = self._kinds.leaf("nics")()
        nic.id, nic.pair, nic.role = spec.nic, spec.pair, int(spec.role)
        nic.vif, nic.fwd, nic.vlan, nic.mac[:] = vif, fwd, spec.vlan, mac
        nic.arp, nic.nd, nic.other = int(spec.arp), int(spec.nd), int(spec.other)
        return nic

    def _register(self, undo: ExitStack, spec: NicSpec, mac: bytes, fwd: int, made: dict[int, int]) -> None:
        """`made`: flags by ifindex of the vifs, the guest's own first."""
        before = self._of_nic(spec.nic)
        link = self._kinds.key("links")()
        link.fwd, link.vlan = fwd, spec.vlan
        nic_by_id = ct.c_uint32(spec.nic)
        with vifs.LOCK:
            kept = self._kinds.leaf("nic_by_id")()
            bpfsys.lookup(self._fd("nic_by_id"), nic_by_id, kept)
            own = (
                kept.vif if kept.vif in made else next(iter(made))
            )  # it may have been exchanged since the caller looked
            for vif, flags in made.items():
                nic = self._nic(spec, mac, vif, fwd)
                nic.exempts = kept.exempts  # the exemption map is by NIC, whatever device it had
                nic.flags = before.get(vif, 0) | flags
                self._put(undo, "nics", ct.c_uint32(vif), nic)
                if vif == own:
                    if kept.vif == own:
                        nic.next_vif, nic.next_epoch = kept.next_vif, kept.next_epoch
                    undo.callback(self._put_back, nic_by_id, kept, kept.vif == own)
                    bpfsys.update(self._fd("nic_by_id"), nic_by_id, nic)
        self._put(undo, "links", link, ct.c_uint32(spec.nic))
        for vif in before.keys() - made.keys():
            bpfsys.delete(self._fd("nics"), ct.c_uint32(vif))  # one that this NIC had before it was made again

    def _put_back(self, nic_by_id: ct.c_uint32, before: Any, same: bool) -> None:
        """What was there before attach(). `same`: the guest was where it is, so what became of it since counts."""
        with vifs.LOCK:
            if same:
                now = type(before)()
                bpfsys.lookup(self._fd("nic_by_id"), nic_by_id, now)
                before.vif, before.next_vif, before.next_epoch = now.vif, now.next_vif, now.next_epoch
            bpfsys.update(self._fd("nic_by_id"), nic_by_id, before)

    def _put(self, undo: ExitStack, table: str, key: Any, value: Any) -> None:
        """Writes an entry; `undo` will bring back what was there."""
        before = type(value)()
        if bpfsys.lookup(self._fd(table), key, before):
            undo.callback(bpfsys.update, self._fd(table), key, before)
        else:
            undo.callback(bpfsys.delete, self._fd(table), key)
        bpfsys.update(self._fd(table), key, value)


def _hooks(
    spec: NicSpec, of_guest: Iterable[netdev.Device], fwd: netdev.Device
) -> list[tuple[netdev.Device, str, str]]:
    """Devices, sides and programs of all tc hooks."""
    out, into = ("p1_mirror", "p2_output") if spec.role == Role.PRIMARY else ("s3_isolate", "s2_output")
    found = [hook for vif in of_guest for hook in ((vif, "egress", out), (vif, "ingress", into))]
    return [*found, (fwd, "ingress", "link_deliver")]


def _figures(sizes: Sizes) -> tuple[int, int, int]:
    """Slots, flows, and bytes of a slot, as the maps were or are to be made."""
    return sizes.slots, sizes.flows, 16384 if sizes.jumbo else 2048


def _kept(pin_dir: Path, sizes: Sizes) -> shapes.Shapes:
    """The shapes of the maps that are pinned. Raises BpfError if some are missing, ConfigError for other sizes."""
    kinds = pins.complete(pin_dir, MAPS)
    settings = kinds.leaf("settings")()
    with bpfsys.opened(pin_dir / "settings") as fd:
        bpfsys.lookup(fd, ct.c_uint32(0), settings)
    have = (settings.slots, settings.flows, settings.slot_bytes)
    if not settings.slots:
        raise BpfError(f"{pin_dir}: a load was interrupted before its maps were filled; detach, then load again")
    if have != _figures(sizes):
        raise ConfigError(
            f"{pin_dir}: loaded with (slots, flows, slot bytes) {have}, asked for {_figures(sizes)}; detach first"
        )
    return kinds
