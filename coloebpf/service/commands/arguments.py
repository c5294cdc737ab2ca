"""The command line of the service's commands: their arguments, and what each of them calls."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

CONFIG = Path("/etc/coloebpf/coloebpf.toml")
SOCKET = Path("/run/coloebpf/control.sock")
PKI = Path("/etc/coloebpf/pki")

# What the commands need is imported when one of them runs: the command line is there in 0.1 s, the service takes 1 s.

ORDERS = (
    ("checkpoint", "take a checkpoint of a pair now, and wait for its commit"),
    ("failover", "hand the guest over to the secondary; or, if the other host is lost: your word that it is off"),
    ("handover", "on the primary, in lock-step: hand the guest over to the secondary; never anything else"),
    ("protect", "begin the protection of a pair, and wait for the first checkpoint"),
    ("unprotect", "end the protection of a pair; its guest goes on, uncompared"),
)

DISKS = (
    ("prepare", "make fresh overlays on the secondary; the service does it too, before each protection"),
    ("sum", "print the SHA-256 of this host's image"),
    ("compare", "compare this host's image with the other's, by its sum"),
    ("which", "name the one good image, after a failover; exit code 2: nobody can tell from here"),
)


def add(areas: Any) -> None:
    """Adds the commands to the command line's areas."""
    run = _add(areas, "run", _run, "run the service")
    _add_config(run)

    status = _add(
        areas, "status", _status, "show what the service knows: peer, pairs, what is held, what is uncompared"
    )
    _add_socket(status)
    _add_json(status)

    top = _add(areas, "top", _top, "show the pairs live; Ctrl-C ends it")
    _add_socket(top)
    top.add_argument(
        "--interval", type=_seconds, default=1.0, metavar="S", help="seconds between two looks (default: 1)"
    )
    top.add_argument("--looks", type=_looks, metavar="N", help="end after N looks (default: never)")

    for name, text in ORDERS:
        order = _add(areas, name, _order, text)
        order.add_argument("pair", metavar="PAIR", help="its name in the configuration")
        if name == "protect":
            order.add_argument("--to", metavar="HOST", help="refuse to if this is not the other host's name")
        _add_socket(order)

    detach = _add(
        areas,
        "detach",
        _detach,
        "take programs and maps off this host, when no service runs and no pair is protected",
    )
    detach.add_argument("--check", action="store_true", help="only say whether a pair is protected; a service may run")
    _add_config(detach)

    doctor = _add(
        areas, "doctor", _doctor, "check this host and say what to do about each finding; exit code 1: something fails"
    )
    _add_config(doctor)
    _add_json(doctor)

    disks = areas.add_parser("disks", help="a guest's replicated disk (engine libxl-colo): its files on this host")
    _disks_commands(disks.add_subparsers(metavar="COMMAND", required=True))

    config = areas.add_parser("config", help="check a configuration, print an example, make certificates")
    _config_commands(config.add_subparsers(metavar="COMMAND", required=True))


def _disks_commands(disks: Any) -> None:
    for name, text in DISKS:
        command = _add(disks, name, _disks, text, area="disks ")
        command.add_argument("pair", metavar="PAIR", help="its name in the configuration")
        if name == "compare":
            command.add_argument("--with", dest="other", metavar="SUM", help="what `sum` says on the other host")
        if name == "which":
            _add_socket(command)
        _add_config(command)
        _add_json(command)


def _config_commands(config: Any) -> None:
    check = _add(config, "check", _config_check, "check a configuration file; each mistake is a line", area="config ")
    check.add_argument("file", nargs="?", type=Path, default=CONFIG, help="(default: %(default)s)")
    _add_json(check)
    _add(config, "example", _config_example, "print a configuration file with every key", area="config ")
    xl = _add(config, "xl", _config_xl, "say what has to change in a Xen guest's own configuration", area="config ")
    xl.add_argument("guest", type=Path, metavar="GUEST.cfg", help="as xl.cfg(5) has it")
    _add_config(xl)
    pki = _add(
        config,
        "init-pki",
        _config_init_pki,
        "make a CA, or take the one that is there, and a certificate and key for each host",
        area="config ",
    )
    pki.add_argument("hosts", nargs="+", metavar="HOST", help="[host] name of each host")
    pki.add_argument("--directory", type=Path, default=PKI, help="where they go (default: %(default)s)")


def _add(areas: Any, name: str, run: Any, text: str, area: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = areas.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    parser.set_defaults(run=run, title=area + name, takes_command="")
    return parser


def _add_socket(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--socket", type=Path, default=SOCKET, help="[host] control_socket of the service (default: %(default)s)"
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help="(default: %(default)s)")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is no time between 0.1 and 3600 s")
    return seconds


def _looks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    from coloebpf.service import daemon

    return daemon.run(args.config)


def _status(args: argparse.Namespace) -> None:
    from coloebpf.service.commands import client, text

    with client.connected(args.socket) as service:
        reply = service.ask("status")
    print(json.dumps(reply, indent=1) if args.json else text.status_text(reply))


def _top(args: argparse.Namespace) -> None:
    from coloebpf.service.commands import top

    top.run(args.socket, sys.stdout, args.interval, args.looks)


def _order(args: argparse.Namespace) -> None:
    from coloebpf.service.commands import client, text

    said = ""

    def waiting() -> None:  # raises if the service does not answer at all
        nonlocal said
        with client.connected(args.socket) as service:
            now = text.progress_text(service.ask("status"), args.pair)
        if now != said:
            print(now, file=sys.stderr)
        said = now

    with client.connected(args.socket) as service:
        if (wanted := getattr(args, "to", None)) is not None:
            client.check_peer(service.ask("status"), wanted)
        print(service.order(args.title, args.pair, waiting))


def _detach(args: argparse.Namespace) -> None:
    from coloebpf.service import config, hooks

    if args.check:
        hooks.check_unneeded(config.load(args.config))
        return
    found = hooks.take_down(config.load(args.config))
    print("the dataplane is gone" if found else "there was no dataplane")


def _doctor(args: argparse.Namespace) -> int:
    from coloebpf.service import doctor

    findings = doctor.examine(args.config)
    print(json.dumps(doctor.as_dict(findings), indent=1) if args.json else doctor.text(findings))
    return doctor.exit_code(findings)


def _config_check(args: argparse.Namespace) -> int:
    from coloebpf.service import config
    from coloebpf.service.config_reader import ConfigErrors

    try:
        found = config.load(args.file)
    except ConfigErrors as error:
        if args.json:
            rows = [{"file": str(m.file), "key": m.key, "wrong": m.wrong, "right": m.right} for m in error.mistakes]
            print(json.dumps({"mistakes": rows}, indent=1))
        else:
            print(error, file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"mistakes": []}, indent=1))
    else:
        pairs = ", ".join(f"{pair.name} ({pair.role.name.lower()})" for pair in found.pairs) or "none"
        print(f"{args.file} is good: host {found.host.name}, pairs: {pairs}")
    return 0


def _config_example(_: argparse.Namespace) -> None:
    from coloebpf.service import config_example

    print(config_example.example(), end="")


def _config_xl(args: argparse.Namespace) -> int:
    from coloebpf.service import config
    from coloebpf.service.commands import xl_text

    found = xl_text.changes(args.guest, config.load(args.config))
    print(found.text)
    return found.code


def _disks(args: argparse.Namespace) -> int:
    from coloebpf.service import config
    from coloebpf.service.commands import disks

    disk = disks.disk_of(config.load(args.config), args.pair)
    match args.title.rpartition(" ")[2]:
        case "prepare":
            answer = disks.prepare(disk)
        case "sum":
            answer = disks.checksum(disk)
        case "compare":
            answer = disks.compare(disk, args.other)
        case _:
            answer = disks.which(disk, args.socket)
    print(json.dumps(answer.fields, indent=1) if args.json else answer.text)
    return answer.code


def _config_init_pki(args: argparse.Namespace) -> None:
    from coloebpf.service.peer import pki

    for path in pki.init_pki(args.directory, args.hosts):
        print(path)
    print(
        "Each host gets ca.pem and its own two files, as [peer] ca, certificate and key of its configuration say.\n"
        "ca.key is needed for new certificates alone: keep it on a machine that is neither host.",
        file=sys.stderr,
    )
