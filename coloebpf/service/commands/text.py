"""`coloebpf status` as text for people, below 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

from coloebpf.units import age, duration

WIDTH = 79
LABEL = 12  # columns of a line's name
TOGETHER = "\u00a0"  # a space at which no line is broken


def status_text(reply: dict[str, Any]) -> str:
    """What the service says of itself and of its dataplane (control_socket's answer to "status")."""
    service, dataplane = reply["service"], reply["dataplane"]
    lines = [f"host {service['host']}: coloebpf {service['version']}, up {age(service['uptime_ms'])}"]
    lines += _peer(service)
    for pair in service["pairs"]:
        nics = [] if dataplane is None else [n for n in dataplane["nics"] if n["pair"] == pair["number"]]
        lines += ["", *_pair(pair, nics)]
    if not service["pairs"]:
        lines += ["", "no pair is configured"]
    lines.append("")
    if dataplane is None:
        lines += _wrapped("dataplane", f"can't be read: {reply['dataplane_error']}")
    else:
        slots, flows = dataplane["slots"], dataplane["flows"]
        lines += _wrapped("dataplane", f"{_used(slots)} slots and {_used(flows)} flows used")
    for warning in service["warnings"]:
        lines += _wrapped("WARNING", warning)
    return "\n".join(lines)


def _peer(service: dict[str, Any]) -> Iterator[str]:
    peer = service["peer"]
    if peer is None:
        yield from _wrapped("peer", "none is configured")
        return
    link = "connected" if peer["connected"] else "NOT CONNECTED"
    trip = "" if peer["rtt_ms"] is None else f", round trip {duration(peer['rtt_ms'] * 1e6)}"
    yield from _wrapped("peer", f"{peer['name']}, {link}, heard {_ago(peer['seen_ago_ms'])}{trip}")
    for path in service["paths"]:
        alive = "alive" if path["alive"] else "LOST"
        yield from _wrapped("heartbeat", f"{path['name']}: {alive}, last {_ago(path['seen_ago_ms'])}")
    if any(peer["refused"].values()):
        yield from _wrapped("refused", _counts(peer["refused"]))


def _pair(pair: dict[str, Any], nics: list[dict[str, Any]]) -> Iterator[str]:
    state = pair["state"].upper() if pair["state"] in ("halted", "passthrough", "promoted") else pair["state"]
    yield (
        f"{pair['name']} (pair {pair['number']}, {pair['role']}): {state} for {age(pair['state_for_ms'])}, "
        f"epoch {pair['epoch']}"
    )
    if pair["state_reason"]:
        yield from _wrapped("because", pair["state_reason"])
    if pair["silent"]:
        yield from _wrapped("SILENT", "the right to speak has ended: what the guest sends is dropped")
    if pair["alone_pending"]:
        yield from _wrapped("UNDECIDED", f"the other host is lost; waiting for arbiter {pair['arbiter']}")
    reason = f": {pair['mode_reason']}" if pair["mode_reason"] else ""
    yield from _wrapped("mode", f"{pair['mode']} for {age(pair['mode_for_ms'])}{reason}")
    ready = "ready" if pair["engine_ready"] else "NOT READY"
    progress = f": {pair['engine_progress']}" if pair["engine_progress"] else ""
    yield from _wrapped("engine", f"{pair['engine'] or 'none'}, {ready}{progress}")
    yield from _wrapped("arbiter", f"{pair['arbiter']}{_right(pair)}; without the service: {pair['on_service_loss']}")
    yield from _checkpoints(pair)
    for entry in pair["uncompared"]:
        yield from _wrapped("UNCOMPARED", f"NIC {entry['nic']}: {entry['what']} ({entry['why']})")
    devices = {nic["number"]: nic for nic in pair["nics"]}
    for nic in nics:
        yield from _nic(nic, devices.get(nic["nic"], {}))


def progress_text(reply: dict[str, Any], name: str) -> str:
    """How far a pair is, for somebody who waits for it; of a status. "" if there is no such pair."""
    for pair in reply["service"]["pairs"]:
        if pair["name"] == name:
            parts = [pair["state"], f"{sum(pair['checkpoints'].values()):,} checkpoints", pair["engine_progress"]]
            return f"{name}: {', '.join(filter(None, parts))}"
    return ""


def _right(pair: dict[str, Any]) -> str:
    left = pair["arbiter_deadline_in_ms"]
    if left is None:
        return ""
    return f", right to speak for {duration(left * 1e6)} more" if left > 0 else ", right to speak HAS ENDED"


def _checkpoints(pair: dict[str, Any]) -> Iterator[str]:
    done, last, pending = sum(pair["checkpoints"].values()), pair["last"], pair["pending"]
    failed = f", {pair['checkpoints_failed']:,} FAILED" if pair["checkpoints_failed"] else ""
    kinds = f" ({_counts(pair['checkpoints'])})" if done else ""
    yield from _wrapped("checkpoints", f"{done:,}{kinds}{failed}")
    if last:
        took = duration(last["duration_ms"] * 1e6)
        yield from _wrapped("last", f"{_ago(last['ago_ms'])}, took {took}; {last['trigger']}: {last['reason']}")
    if pending:
        since = duration(pending["for_ms"] * 1e6)
        yield from _wrapped("pending", f"for {since}; {pending['trigger']}: {pending['reason']}")
    if any(pair["findings"].values()):
        yield from _wrapped("findings", _counts(pair["findings"]))


def _nic(nic: dict[str, Any], device: dict[str, Any]) -> Iterator[str]:
    vlan = f" VLAN {nic['vlan']}" if nic["vlan"] else ""
    bridge = f", bridge {device['bridge']}" if device.get("bridge") else ""
    yield from _wrapped(f"NIC {nic['nic']}", f"{nic['vif']}, forward {nic['fwd']}{vlan}{bridge}")
    if nic["role"] == "secondary":
        yield from _wrapped("", f"{nic['delivered']:,} client frames in, {nic['svm_output']:,} packets out")
    else:
        holding = nic["holding_ns"]
        yield from _wrapped("", f"{nic['compared_packets']:,} packets proven, {nic['compared_bytes']:,} bytes")
        yield from _wrapped(
            "", f"{nic['held']:,} held now; held for p50 {duration(holding['p50'])}, p99 {duration(holding['p99'])}"
        )
        yield from _wrapped("", f"diverged: {_counts(nic['divergences'])}")
    yield from _wrapped("", f"dropped: {_counts(nic['dropped'])}")


def _ago(milliseconds: float | None) -> str:
    return "never" if milliseconds is None else f"{age(milliseconds)} ago"


def _used(table: dict[str, int]) -> str:
    return f"{table['total'] - table['free']:,} of {table['total']:,}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,}{TOGETHER}{name}" for name, count in counts.items() if count) or "none"


def _wrapped(name: str, text: str) -> list[str]:
    first = f"  {name:{LABEL}}"
    lines = textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (LABEL + 2))
    return [line.replace(TOGETHER, " ") for line in lines]
