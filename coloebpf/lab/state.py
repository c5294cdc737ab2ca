"""A lab's record on disk: what `up` made, for the commands that come after it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from coloebpf import shapes
from coloebpf.errors import LabError
from coloebpf.lab.plan import GUESTS, HOSTS, NODES, LabPlan
from coloebpf.lab.topology import NETNS_DIR, describe_devices

STATE_FILE = "lab.json"
EVENT_FILE = "events.jsonl"


def claim(plan: LabPlan) -> None:
    """Take the lab's name, for this process alone; fails if a lab of that name, or a rest of one, is there."""
    plan.run_root.mkdir(parents=True, exist_ok=True)
    try:
        plan.run_dir.mkdir()
    except FileExistsError:
        raise LabError(f"there is a lab {plan.name!r} already; take it down first ({down_command(plan)})") from None
    rests = [plan.namespace(node) for node in NODES if (NETNS_DIR / plan.namespace(node)).exists()]
    if rests or plan.pin_base.exists():
        plan.run_dir.rmdir()
        raise LabError(f"there are remains of a lab {plan.name!r}; remove them first ({down_command(plan)})")


def down_command(plan: LabPlan) -> str:
    return f"coloebpf lab down --name {plan.name}"


def release(plan: LabPlan) -> None:
    """Remove the lab's files and pins, and the directories above them that this leaves empty."""
    for path in (plan.run_dir, plan.pin_base):
        shutil.rmtree(path, ignore_errors=True)
    for host in HOSTS:
        shapes.forget(plan.pin_dir(host))
    for root in (plan.run_root, plan.pin_root):
        for directory in (root, root.parent):
            with suppress(OSError):  # another lab's or the service's
                directory.rmdir()


def describe(plan: LabPlan) -> dict[str, Any]:
    """The object that `lab up --json` prints."""
    nics = plan.nic_list()
    return {
        "name": plan.name,
        "guests": plan.guests,
        "command": list(plan.command),
        "mtu": plan.mtu,
        "vlan": plan.vlan,
        "service": plan.service,
        "arbiter": plan.arbiter,
        "namespaces": {node: plan.namespace(node) for node in plan.nodes},
        "devices": describe_devices(plan),
        "addresses": {
            "client": {"v4": [nic.client_v4 for nic in nics], "v6": [nic.client_v6 for nic in nics]},
            "guest": {"v4": [nic.guest_v4 for nic in nics], "v6": [nic.guest_v6 for nic in nics]},
        },
        "client_mac": plan.client().mac,
        "guest_mac": nics[0].mac,
        "nics": [dataclasses.asdict(nic) for nic in nics],
        "pins": {host: str(plan.pin_dir(host)) for host in HOSTS},
        "run_dir": str(plan.run_dir),
        "guest_dirs": {guest: str(plan.run_dir / guest) for guest in GUESTS} if plan.guests == "process" else {},
        "events": str(plan.run_dir / EVENT_FILE),
    }


def save(plan: LabPlan) -> dict[str, Any]:
    """Write the record, whole or not at all; returns it."""
    record = describe(plan)
    draft = plan.run_dir / (STATE_FILE + ".new")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(draft, plan.run_dir / STATE_FILE)
    return record


def load(plan: LabPlan) -> LabPlan:
    """The running lab of that name as it was asked for."""
    path: Path = plan.run_dir / STATE_FILE
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        raise LabError(f"there is no lab {plan.name!r}; make one with coloebpf lab up --name {plan.name}") from None
    return dataclasses.replace(
        plan,
        guests=record["guests"],
        nics=len(record["nics"]),
        vlan=record["vlan"],
        service=record["service"],
        arbiter=record["arbiter"],
        mtu=record["mtu"],
        command=tuple(record["command"]),
    )
