"""A lab's records as text for people, below 80 columns."""

from __future__ import annotations

from typing import Any

from coloebpf.units import duration


def up_text(record: dict[str, Any], protected: bool) -> str:
    """What `lab up` made."""
    name = "" if record["name"] == "lab" else f" --name {record['name']}"
    state = "in lock-step" if protected else "unprotected"
    lines = [f"lab {record['name']!r} is up, {state}; take it down with: coloebpf lab down{name}", ""]
    for node, namespace in record["namespaces"].items():
        devices = [device for device in record["devices"] if device["node"] == node]
        lines.append(f"{node:10} {namespace}")
        for device in devices:
            lines.append(f"  {device['name']:10} {device['mac']}  {'  '.join(device['addresses'])}".rstrip())
    return "\n".join(lines)


def status_text(status: dict[str, Any]) -> str:
    """What `lab status` shows."""
    agent = "running" if status["agent"] else "not running"
    helpers = [f"{host}'s service {_state(service)}" for host, service in status["services"].items()]
    lines = [
        f"lab {status['name']!r}: {status['state']}, epoch {status['epoch']}, {'; '.join(helpers) or f'agent {agent}'}"
    ]
    if status["guests"] == "qemu":
        lines.append(
            "  machines    " + ", ".join(f"{len(pids)} on {host}" for host, pids in status["machines"].items())
        )
    for nic in status["nics"]:
        holding = nic["holding_ns"]
        lines += [
            "",
            f"{nic['vif']} (forward {_forward(nic)})",
            f"  mirrored    {_amount(nic, 'mirrored')}",
            f"  compared    {_amount(nic, 'compared')}",
            f"  released    {_amount(nic, 'released')}",
            f"  held now    {nic['held']:>12,} packets",
            f"  held for    p50 {duration(holding['p50'])}, p99 {duration(holding['p99'])} of {holding['count']:,}",
            f"  divergences {_counts(nic['divergences'])}",
            f"  dropped     {_counts(nic['dropped'])}",
        ]
    return "\n".join(lines)


def _state(service: dict[str, Any] | None) -> str:
    return "not running" if service is None else str(service["pairs"][0]["state"]) if service["pairs"] else "loading"


def _amount(nic: dict[str, Any], what: str) -> str:
    return f"{nic[what + '_packets']:>12,} packets {nic[what + '_bytes']:>18,} bytes"


def _counts(reasons: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items() if count) or "none"


def _forward(nic: dict[str, Any]) -> str:
    return f"{nic['fwd']} VLAN {nic['vlan']}" if nic["vlan"] else str(nic["fwd"])
