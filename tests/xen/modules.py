"""Kernel modules by name, with what they need."""

from __future__ import annotations

from collections.abc import Iterable

from coloebpf.errors import LabError
from coloebpf.lab.image import Kernel


def load_order(kernel: Kernel, names: Iterable[str]) -> tuple[str, ...]:
    """Paths below the kernel's modules, each behind all that it needs; what is built in has none."""
    needs = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[_name(path)] = [*reversed(others.split()), path]
    built_in = {_name(path) for path in (kernel.modules / "modules.builtin").read_text().split()}
    order: dict[str, None] = {}
    for name in map(_name, names):
        if name not in needs and name not in built_in:
            raise LabError(f"kernel {kernel.release} has no module {name}")
        order |= dict.fromkeys(needs.get(name, []))
    return tuple(path.removeprefix("kernel/") for path in order)


def _name(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".ko").replace("-", "_")
