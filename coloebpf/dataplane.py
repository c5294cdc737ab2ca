"""Loading and attaching: compiles the programs, pins maps and programs, hangs them on a guest NIC's devices, and takes all of it away again."""

import ctypes as ct
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coloebpf import bpfsys, netdev, shapes
from coloebpf.errors import BpfError, ConfigError
from coloebpf.model import MAX_NICS, MAX_PAIRS, NicSpec, Role, Sizes
from coloebpf.preflight import Headers, Preflight
from coloebpf.source import one_text

__all__ = ["Dataplane", "NicSpec", "Role", "Sizes", "detach"]

PIN_ROOT = Path("/sys/fs/bpf/coloebpf")
COMPARE_TIMEOUT_NS = 200_000_000  # design.md, section 4; QEMU's is 3 s

TC_PROGRAMS = (
    "p1_mirror", "p2_output", "hold", "split", "split_udp", "pass_whole", "p4_prove", "drain",
    "s1_deliver", "s2_output", "s3_isolate", "link_deliver", "flush", "sweep",
)  # fmt: skip
XDP_PROGRAMS = ("link_arrive", "p3_arrive", "s1_arrive")
TC_STAGES = {0: "drain", 1: "split", 2: "p4_prove", 3: "s1_deliver", 4: "pass_whole", 5: "hold", 6: "split_udp"}  # STAGE_* of bpf/maps.h
XDP_STAGES = {0: "p3_arrive", 1: "s1_arrive"}
MAPS = (
    "settings", "hash_keys", "pairs", "nics", "nic_by_id", "links", "flow_refs", "flows", "held", "slab", "free_slots", "free_flows",
    "exempt", "counters", "holding", "scratch", "gauges", "tc_stages", "xdp_stages", "last_events", "events",
)  # fmt: skip
NIC_CLSACT_VIF, NIC_CLSACT_FWD = 1, 2  # bpf/types.h


def _defines(sizes: Sizes, pin_dir: Path) -> list[str]:
    for what, n, top in (("slots", sizes.slots, 65536), ("flows", sizes.flows, 1 << 20)):
        if n < 2 or n > top or n & (n - 1):
            raise ConfigError(f"{what} = {n}: must be a power of two between 2 and {top}")
    if not 576 <= sizes.mtu <= 9000:
        raise ConfigError(f"mtu = {sizes.mtu}: must be between 576 and 9000")
    flags = [f'-DPIN_DIR="{pin_dir}"', f"-DMAX_SLOTS={sizes.slots}u", f"-DHELD_BYTES={sizes.slots * 64}", f"-DMAX_FLOWS={sizes.flows}u"]
    if sizes.jumbo:  # a longer hash leaves the verifier less for the rest
        flags += ["-DSLOT_SHIFT=14", "-DHASH_ROUNDS=142", "-DDRAIN_STEPS=4", "-DGSO_BATCH=1"]
    return flags


def _compile(pin_dir: Path, sizes: Sizes, headers: Headers) -> Any:
    headers.tell_bcc(os.environ)
    from bcc import BPF

    flags = [*headers.cflags, *_defines(sizes, pin_dir), "-Wno-unused-function"]
    try:
        return BPF(text=one_text().encode(), cflags=flags)
    except Exception as e:  # bcc raises bare Exception
        raise BpfError(f"the programs do not compile ({e}); see the compiler's words above") from e


class Dataplane:
    """The programs and maps of one host, pinned under `pin_dir`."""

    def __init__(self, pin_dir: Path, module: Any, programs: dict[str, int], sizes: Sizes) -> None:
        self.pin_dir, self.sizes = pin_dir, sizes
        self._module, self._programs = module, programs

    @classmethod
    def load(cls, pin_dir: Path, sizes: Sizes | None = None, check: Callable[[], Headers] | None = None) -> "Dataplane":
        """Compiles (some 3 s), loads and pins. Maps that are pinned there already are kept, programs replaced. Raises ColoError's children."""
        sizes = sizes or Sizes()
        headers = (check or Preflight().check)()
        pin_dir.mkdir(parents=True, exist_ok=True)
        _check_sizes(pin_dir, sizes)
        from_before = (pin_dir / "settings").exists()
        module = _compile(pin_dir, sizes, headers)
        programs = {}
        from bcc import BPF

        for names, kind in ((TC_PROGRAMS, BPF.SCHED_CLS), (XDP_PROGRAMS, BPF.XDP)):
            for name in names:
                try:
                    programs[name] = module.load_func(name.encode(), kind).fd
                except Exception as e:
                    if not from_before:
                        shutil.rmtree(pin_dir, ignore_errors=True)
                    raise BpfError(f"the kernel refuses program {name}: {e}") from e
        plane = cls(pin_dir, module, programs, sizes)
        plane._fill(from_before)
        for stages, table in ((TC_STAGES, "tc_stages"), (XDP_STAGES, "xdp_stages")):
            for number, name in stages.items():
                bpfsys.update(plane._fd(table), ct.c_uint32(number), ct.c_uint32(programs[name]))
        for name, fd in programs.items():
            bpfsys.obj_pin(fd, pin_dir / name)
        netdev.raise_backlog(2 * sizes.slots)
        return plane

    def _fd(self, table: str) -> int:
        return int(self._module[table.encode()].map_fd)

    def _fill(self, from_before: bool) -> None:
        """What a fresh set of maps needs once: secrets, free lists, sizes."""
        from bcc import lib

        said = {}
        for name in MAPS:
            descs = (lib.bpf_table_key_desc(self._module.module, name.encode()), lib.bpf_table_leaf_desc(self._module.module, name.encode()))
            said[name] = [json.loads(d) if d else None for d in descs]
        shapes.save(self.pin_dir, said)
        if from_before:
            return
        size = ct.sizeof(self._module[b"hash_keys"].Leaf)
        keys = bytearray(os.urandom(size))
        # word[n + HASH_WORDS] must be word[n] again: tables of 4,096 and 16,384 keys, each with 16 behind (bpf/constants.h)
        keys[4096 * 8 : 4112 * 8] = keys[:128]
        second = 4112 * 8
        keys[second + 16384 * 8 : second + 16400 * 8] = keys[second : second + 128]
        bpfsys.update(self._fd("hash_keys"), ct.c_uint32(0), (ct.c_char * size).from_buffer(keys))
        for table, count in (("free_slots", self.sizes.slots), ("free_flows", self.sizes.flows)):
            for number in reversed(range(count)):  # a stack: the lowest come first
                bpfsys.update(self._fd(table), None, ct.c_uint32(number))
        settings = self._module[b"settings"].Leaf()
        settings.mark = (secrets.randbelow(0xFFF) + 1) << 20
        settings.slots, settings.flows, settings.slot_bytes = self.sizes.slots, self.sizes.flows, 16384 if self.sizes.jumbo else 2048
        settings.compare_timeout_ns = COMPARE_TIMEOUT_NS
        bpfsys.update(self._fd("settings"), ct.c_uint32(0), settings)

    def prog_fd(self, name: str) -> int:
        """File descriptor of a loaded program."""
        return self._programs[name]

    def attach(self, spec: NicSpec, xdp_mode: str = "auto", rps: bool = True) -> None:
        """Hangs the programs on the NIC's devices, in the caller's network namespace. Again over a running one: replaces them without a gap."""
        if not 0 <= spec.nic < MAX_NICS or not 0 <= spec.pair < MAX_PAIRS:
            raise ConfigError(f"nic {spec.nic}, pair {spec.pair}: both must be below {MAX_NICS}")
        with netdev.Devices() as devices:
            vif, fwd = devices.find(spec.vif), devices.find(spec.fwd)
            devices.check_forward(fwd, vif, self.sizes.mtu)
            hooks = (
                (vif, "egress", "p1_mirror" if spec.role == Role.PRIMARY else "s3_isolate"),
                (vif, "ingress", "p2_output" if spec.role == Role.PRIMARY else "s2_output"),
                (fwd, "ingress", "link_deliver"),
            )
            for device, side, _ in hooks:
                devices.check_free(device, side)
            devices.check_xdp_free(fwd, "link_arrive")
            netdev.offloads_off(spec.fwd)
            flags = self._flags_before(vif.index)
            flags |= NIC_CLSACT_VIF if devices.ensure_clsact(vif) else 0
            flags |= NIC_CLSACT_FWD if devices.ensure_clsact(fwd) else 0
            self._register(spec, vif.index, fwd.index, flags)
            for device, side, program in hooks:
                devices.attach_tc(device, side, program, self._programs[program])
            netdev.attach_xdp(spec.fwd, self._programs["link_arrive"], xdp_mode)
            if rps:
                netdev.spread_receive(spec.vif)

    def _flags_before(self, vif: int) -> int:
        nic = self._module[b"nics"].Leaf()
        return int(nic.flags) if bpfsys.lookup(self._fd("nics"), ct.c_uint32(vif), nic) else 0

    def _register(self, spec: NicSpec, vif: int, fwd: int, flags: int) -> None:
        nic = self._module[b"nics"].Leaf()
        nic.id, nic.pair, nic.role, nic.vif, nic.fwd, nic.vlan, nic.flags = spec.nic, spec.pair, int(spec.role), vif, fwd, spec.vlan, flags
        nic.arp, nic.nd, nic.other = int(spec.arp), int(spec.nd), int(spec.other)
        if spec.mac:
            try:
                nic.mac[:] = bytes.fromhex(spec.mac.replace(":", ""))
            except ValueError as e:
                raise ConfigError(f"mac {spec.mac!r} of {spec.vif} is not a MAC address such as 02:c0:10:00:00:01") from e
        bpfsys.update(self._fd("nic_by_id"), ct.c_uint32(spec.nic), nic)
        key = self._module[b"links"].Key()
        key.fwd, key.vlan = fwd, spec.vlan
        bpfsys.update(self._fd("links"), key, ct.c_uint32(spec.nic))
        bpfsys.update(self._fd("nics"), ct.c_uint32(vif), nic)


def _check_sizes(pin_dir: Path, sizes: Sizes) -> None:
    """Pinned maps have the sizes they were made with; programs for others must not run on them."""
    if not (pin_dir / "settings").exists():
        return
    kinds = shapes.Shapes(pin_dir)
    settings = kinds.leaf("settings")()
    fd = bpfsys.obj_get(pin_dir / "settings")
    try:
        bpfsys.lookup(fd, ct.c_uint32(0), settings)
    finally:
        os.close(fd)
    have = (settings.slots, settings.flows, settings.slot_bytes)
    want = (sizes.slots, sizes.flows, 16384 if sizes.jumbo else 2048)
    if have != want:
        raise ConfigError(f"{pin_dir}: attached with (slots, flows, slot bytes) {have}, asked for {want}; detach first")


def detach(pin_dir: Path) -> None:
    """Takes everything down in the caller's network namespace: filters, XDP, clsact that attach() made, pins. Repeatable."""
    if (pin_dir / "nics").exists():
        kinds = shapes.Shapes(pin_dir)
        fd = bpfsys.obj_get(pin_dir / "nics")
        with netdev.Devices() as devices:
            for key in bpfsys.keys(fd, ct.c_uint32):
                nic = kinds.leaf("nics")()
                if bpfsys.lookup(fd, key, nic):
                    devices.detach(nic.vif, bool(nic.flags & NIC_CLSACT_VIF), xdp=False)
                    devices.detach(nic.fwd, bool(nic.flags & NIC_CLSACT_FWD), xdp=True)
        os.close(fd)
    shutil.rmtree(pin_dir, ignore_errors=True)
    shapes.forget(pin_dir)
