"""Loading and attaching: pins the programs and maps of a host, and hangs programs on a guest NIC's devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from coloebpf import bpfsys, fresh_maps, netdev, pins, programs, shapes, tuning
from coloebpf.detaching import detach, remove_pins
from coloebpf.errors import ConfigError
from coloebpf.model import NIC_CLSACT_FWD, NIC_CLSACT_VIF, NicSpec, Role, Sizes
from coloebpf.nic_entries import NicEntries, check_spec
from coloebpf.pins import TC_PROGRAMS, XDP_PROGRAMS, Maps
from coloebpf.preflight import Headers, Preflight

__all__ = ["Dataplane", "NicSpec", "Role", "Sizes", "detach"]


class Dataplane:
    """The programs and maps of one host, pinned under `pin_dir`."""

    def __init__(self, maps: Maps, fds: dict[str, int], sizes: Sizes) -> None:
        self.pin_dir, self.sizes = maps.pin_dir, sizes
        self._nics, self._programs = NicEntries(maps), fds
        self._module: Any = None  # keeps the descriptors of what it has loaded

    @classmethod
    def load(cls, pin_dir: Path, sizes: Sizes | None = None, check: Callable[[], Headers] | None = None) -> Dataplane:
        """Compiles (some 3 s), loads and pins; what is pinned already: maps are kept, programs replaced.

        Raises a child of ColoError; a first load that fails leaves no pins.
        """
        sizes = sizes or Sizes()
        headers = (check or Preflight().check)()
        flags = programs.defines(sizes, pin_dir)
        with ExitStack() as undo:
            kept = fresh_maps.kept(pin_dir, sizes) if pins.any_there(pin_dir) else None
            if kept is None:
                undo.callback(remove_pins, pin_dir)
                pin_dir.mkdir(parents=True, exist_ok=True)
            module = programs.compiled(flags, headers)
            said = programs.described(module)
            if kept is None:
                shapes.save(pin_dir, said)
            elif said != kept.said:
                raise ConfigError(f"{pin_dir} has maps of another version of coloebpf: detach, then load again")
            maps, fds = Maps(pin_dir, kept or shapes.Shapes(pin_dir)), programs.loaded(module)
            plane = cls(maps, fds, sizes)
            plane._module = module
            if kept is None:
                fresh_maps.fill(maps, sizes)
            shapes.note_source(pin_dir, "")  # until settled()
            programs.publish(maps, fds)
            undo.pop_all()
        tuning.raise_backlog(2 * sizes.slots)
        return plane

    @classmethod
    def reuse(cls, pin_dir: Path, sizes: Sizes) -> Dataplane | None:
        """What is pinned and settled, if load() would make the same; else None. Raises as load() does for its maps."""
        if not pins.any_there(pin_dir) or shapes.noted_source(pin_dir) != programs.digest(sizes, pin_dir):
            return None
        kinds = fresh_maps.kept(pin_dir, sizes)
        pins.complete(pin_dir, (*TC_PROGRAMS, *XDP_PROGRAMS))
        fds = {name: bpfsys.obj_get(pin_dir / name) for name in (*TC_PROGRAMS, *XDP_PROGRAMS)}
        return cls(Maps(pin_dir, kinds), fds, sizes)

    def prog_fd(self, name: str) -> int:
        """File descriptor of a loaded program."""
        return self._programs[name]

    def attach(self, spec: NicSpec, xdp_mode: str = "auto", rps: bool = True) -> None:
        """Hangs the programs on the NIC's devices, in the caller's network namespace.

        Again over a running one: replaces them without a gap, and keeps the NIC's exemptions. When it fails, what this
        call has added to hooks and maps is taken away again; `fwd` stays promiscuous, its offloads off.

        With a `standby_vif` the guest is behind whichever of the two it was, and a secondary's hooks are on both.
        """
        mac = check_spec(spec)
        with netdev.Devices() as devices, ExitStack() as undo:
            fwd = devices.find(spec.fwd)
            vifs = self._nics.vifs(spec, devices)
            for vif in vifs:
                devices.check_forward(fwd, vif, self.sizes.mtu)
            hooks = _hooks(spec, vifs, fwd)
            ours = [devices.check_free(device, side) for device, side, _ in hooks]
            xdp_ours = devices.check_xdp_free(fwd)
            tuning.offloads_off(spec.fwd)
            devices.hear_all(fwd)
            made = dict.fromkeys((vif.index for vif in vifs), 0)
            for device in (*vifs, fwd):
                if devices.ensure_clsact(device):
                    undo.callback(devices.remove_clsact, device.index)
                    of_vif = device.index != fwd.index
                    made[device.index if of_vif else vifs[0].index] |= NIC_CLSACT_VIF if of_vif else NIC_CLSACT_FWD
            self._nics.register(undo, spec, mac, fwd.index, made)
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
        of_vif = self._nics.flags_of_vifs(nic)
        with netdev.Devices() as devices:
            for vif, flags in of_vif.items():
                devices.detach(vif, bool(flags & NIC_CLSACT_VIF))
            fwd, last = self._nics.remove_link(nic)
            if last:
                devices.detach(fwd, any(flags & NIC_CLSACT_FWD for flags in of_vif.values()))
        self._nics.remove(nic)

    def settled(self) -> None:
        """Every NIC has these programs: a start after this one may go on with them (reuse)."""
        shapes.note_source(self.pin_dir, programs.digest(self.sizes, self.pin_dir))

    def is_attached(self, spec: NicSpec) -> bool:
        """For programs that were reused: attach() would change nothing, but for offloads that somebody turned on."""
        mac = check_spec(spec)
        with netdev.Devices() as devices:
            fwd = devices.find(spec.fwd)
            vifs = self._nics.vifs(spec, devices)
            if not all(self._nics.same(spec, mac, vif.index, fwd.index) for vif in vifs):
                return False
            hooks = _hooks(spec, vifs, fwd)
            return (
                fwd.hears_all
                and all(devices.check_free(device, side) for device, side, _ in hooks)
                and devices.check_xdp_free(fwd)
            )


def _hooks(
    spec: NicSpec, of_guest: Iterable[netdev.Device], fwd: netdev.Device
) -> list[tuple[netdev.Device, str, str]]:
    """Devices, sides and programs of all tc hooks."""
    out, into = ("p1_mirror", "p2_output") if spec.role == Role.PRIMARY else ("s3_isolate", "s2_output")
    found = [hook for vif in of_guest for hook in ((vif, "egress", out), (vif, "ingress", into))]
    return [*found, (fwd, "ingress", "link_deliver")]
