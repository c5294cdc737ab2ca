"""`python -m tests.xen COMMAND`: the Xen lab by hand. `make xen-lab` runs its tests."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from coloebpf.errors import ColoError
from tests.xen import guests
from tests.xen.cache import tell
from tests.xen.lab import Lab
from tests.xen.plan import CLIENT, HOSTS, XenPlan


def main() -> int:
    """One command; its exit code."""
    words = sys.argv[1:]
    command: list[str] = []
    if "--" in words:
        split = words.index("--")
        words, command = words[:split], words[split + 1 :]
    args = _parser().parse_args(words)
    lab = Lab(XenPlan(args.name))
    try:
        return int(args.run(lab, args, command) or 0)
    except ColoError as error:
        print(f"xen-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _up(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    lab.up(args.deb)


def _boot(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    lab.boot(args.host, args.deb)


def _down(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    lab.down()


def _kill(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    lab.kill(args.host)


def _exec(lab: Lab, args: argparse.Namespace, command: list[str]) -> int:
    return subprocess.run(lab.where(args.place, command), check=False).returncode


def _push(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    for host in lab.running():
        lab.push(host)


def _guest(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    guest = guests.Guest(args.guest or f"{args.kind}1", args.kind, args.number or guests.KINDS[args.kind], args.memory)
    begun = time.monotonic()
    domid = lab.create(args.host, guest)
    took = time.monotonic() - begun
    tell(f"{guest.name} (domain {domid}, {guest.vif(domid)}) answers at {guest.address} after {took:.0f} s")


def _status(lab: Lab, args: argparse.Namespace, _: list[str]) -> None:
    for host in HOSTS:
        tell(f"host {host} is {'on' if host in lab.running() else 'off'}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.xen", description="Two Xen hosts in QEMU.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, run: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.add_argument("--name", default=XenPlan().name, help="which lab, if there are several")
        command.set_defaults(run=run)
        return command

    def add_host(command: argparse.ArgumentParser) -> None:
        command.add_argument("host", type=int, choices=HOSTS)

    def add_debs(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--deb", type=Path, nargs="+", default=[], metavar="FILE", help="packages in place of Debian's own"
        )

    add_debs(add("up", _up, "make what is missing, and boot both hosts"))
    add("down", _down, "take everything down")
    add("status", _status, "which hosts are on")
    add("push", _push, "bring coloebpf on the hosts up to date with this tree")
    boot = add("boot", _boot, "switch a host on again, with a fresh disk")
    add_host(boot)
    add_debs(boot)
    add_host(add("kill", _kill, "a host loses its power"))
    execute = add("exec", _exec, "run a command on a host, or on the client: exec 1 -- xl list")
    execute.add_argument("place", choices=[*map(str, HOSTS), CLIENT])
    guest = add("guest", _guest, "make a guest and wait until it answers the client")
    add_host(guest)
    guest.add_argument("kind", choices=list(guests.KINDS))
    guest.add_argument("--guest", metavar="NAME", help="its name (default: its kind and 1)")
    guest.add_argument("--number", type=int, help="last byte of its address")
    guest.add_argument("--memory", type=int, default=guests.MEMORY_MIB, metavar="MIB")
    return parser


if __name__ == "__main__":
    sys.exit(main())
