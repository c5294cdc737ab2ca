"""The command line of `coloebpf lab`: its arguments, and what each command calls."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from coloebpf.errors import LabError
from coloebpf.lab import plan


def add(areas: Any) -> None:
    """Adds `lab` and its commands to the command line's areas."""
    lab = areas.add_parser("lab", help="both hosts, a client and two replica guests on this machine")
    _commands(lab.add_subparsers(metavar="COMMAND", required=True))


def _commands(lab: Any) -> None:
    def add(
        name: str, run: Any, text: str, takes_command: str = "", usage: str | None = None
    ) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = lab.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", usage=usage, allow_abbrev=False
        )
        parser.add_argument(
            "--name", type=_lab_name, default="lab", help="which lab, if there are several (default: %(default)s)"
        )
        parser.set_defaults(run=run, title=f"lab {name}", takes_command=takes_command)
        return parser

    def add_json(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one JSON object")

    up = add(
        "up",
        _up,
        "make a lab, with the dataplane in lock-step",
        "sometimes",
        usage="coloebpf lab up [--guests none|process|qemu] [--nics N] [--vlan] [--mtu 1500|9000] "
        "[--bare | --unprotected] [--arbiter command|etcd|none] [--peer-timeout MS] [--name NAME] [--json] [-- CMD...]",
    )
    up.add_argument(
        "--guests",
        choices=plan.MODES,
        help="none: bare ports without a stack (the default without CMD); "
        "process: guests with the same address and MAC, each running CMD if one is given; "
        "qemu: virtual machines with a redis-server, one a live copy of the other",
    )
    up.add_argument("--nics", type=_nic_count, default=1, metavar="N", help="NICs of the guest (default: 1)")
    up.add_argument(
        "--vlan", action="store_true", help="one forward link with a VLAN id per NIC, instead of a link per NIC"
    )
    up.add_argument(
        "--mtu", type=int, choices=plan.MTUS, default=plan.MTUS[0], help="the guest's MTU (default: %(default)s)"
    )
    protection = up.add_mutually_exclusive_group()
    protection.add_argument(
        "--bare", action="store_true", help="no services: the pair stays in lock-step, whatever happens to it"
    )
    protection.add_argument(
        "--unprotected", action="store_true", help="services run, but the guest is not protected yet"
    )
    up.add_argument(
        "--arbiter", choices=plan.ARBITERS, default=plan.ARBITERS[0],
        help="who says which host goes on alone; command: a switch turns the other one off; etcd: a server on the "
        "management network; none: an operator (default: %(default)s)",
    )  # fmt: skip
    up.add_argument(
        "--peer-timeout", type=_milliseconds, default=200, metavar="MS",
        help="without a heartbeat for so long the other host is lost (default: %(default)s)",
    )  # fmt: skip
    add_json(up)

    execute = add(
        "exec", _execute, "run a command on a node", "always", usage="coloebpf lab exec [--name NAME] NODE -- CMD..."
    )
    execute.add_argument("node", choices=plan.EXEC_NODES, help="%(choices)s")

    add_json(add("status", _status, "show state, epoch and counters"))
    add_json(add("checkpoint", _checkpoint, "begin a new epoch and send what is held"))
    add("down", _down, "remove a lab and all of its processes, whole or not")
    show = add(
        "show", _show, "drive a protected redis, let its replicas differ, end the primary host, check the clients"
    )
    show.add_argument(
        "--guests",
        choices=plan.MODES[1:],
        default="qemu",
        help="qemu: virtual machines (default); process: two processes, which nothing copies; faster",
    )
    show.set_defaults(name="show")

    agent = lab.add_parser("agent", allow_abbrev=False)  # started by `up`; no help text, so that it isn't listed
    agent.add_argument("--name", type=_lab_name, required=True)
    agent.set_defaults(run=_agent, title="lab agent", takes_command="")


def _lab_name(text: str) -> str:
    try:
        return plan.check_name(text)
    except LabError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _nic_count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= plan.MAX_NICS:
        raise argparse.ArgumentTypeError(f"a lab's guest has 1 to {plan.MAX_NICS} NICs, not {text}")
    return int(text)


def _milliseconds(text: str) -> int:
    if not text.isdecimal() or not 20 <= int(text) <= 60_000:
        raise argparse.ArgumentTypeError(f"{text} is no time between 20 and 60000 ms")
    return int(text)


# bcc takes most of a second to import, pyroute2 a quarter: only the commands that use them do so.


def _up(args: argparse.Namespace) -> None:
    mode = args.guests or ("process" if args.command else "none")
    if mode != "process" and args.command:
        args.usage_error(f"guests of {mode!r} run no command; use --guests process")
    if mode == "qemu" and args.bare:
        args.usage_error("virtual machines are protected by services; --bare is for other guests")
    wanted = plan.LabPlan(
        args.name, mode, args.nics, args.vlan, args.mtu, tuple(args.command),
        service=not args.bare, arbiter=args.arbiter, peer_timeout_ms=args.peer_timeout,
    )  # fmt: skip
    from coloebpf.lab import needs

    needs.check((needs.VIRTUAL if wanted.virtual else {}) | (needs.ETCD if args.arbiter == "etcd" else {}))
    from coloebpf.lab import commands, hosts, report, services

    bring_up = partial(services.bring_up, protected=not args.unprotected)
    record = commands.up(wanted, hosts.bring_up if args.bare else bring_up)
    print(json.dumps(record, indent=1) if args.json else report.up_text(record, not args.unprotected))


def _execute(args: argparse.Namespace) -> None:
    from coloebpf.lab import commands

    commands.execute(plan.LabPlan(args.name), args.node, args.command)


def _status(args: argparse.Namespace) -> None:
    from coloebpf.lab import commands, hosts, report, services, state

    lab = state.load(plan.LabPlan(args.name))
    if lab.service:
        status = commands.status(lab, services.snapshot, services.service_status)
    else:
        status = commands.status(lab, hosts.snapshot)
    print(json.dumps(status, indent=1) if args.json else report.status_text(status))


def _checkpoint(args: argparse.Namespace) -> None:
    from coloebpf.lab import hosts, services, state

    lab = state.load(plan.LabPlan(args.name))
    done = services.checkpoint(lab) if lab.service else hosts.checkpoint(lab)
    print(json.dumps(done) if args.json else f"epoch {done['epoch']}, {done['flushed']} packets sent")


def _down(args: argparse.Namespace) -> None:
    from coloebpf.lab import commands

    found = commands.down(plan.LabPlan(args.name))
    print(f"lab {args.name!r} is gone" if found else f"there was no lab {args.name!r}")


def _show(args: argparse.Namespace) -> int:
    if args.guests == "qemu":
        from coloebpf.lab import virtual_show

        return virtual_show.run(args.name)
    from coloebpf.lab import show

    return show.run(args.name)


def _agent(args: argparse.Namespace) -> None:
    from coloebpf.control import Control
    from coloebpf.lab import agent, state

    agent.run(state.load(plan.LabPlan(args.name)), Control.open)
