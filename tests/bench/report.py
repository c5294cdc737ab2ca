"""The measurements as tables in Markdown, which a terminal shows as well."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.bench import captions
from tests.bench.aims import aims
from tests.bench.results import Results
from tests.bench.rows import Throughput
from tests.bench.suite import BRIDGE, BRIDGE_BOTH, COMPARING, LAB, PEER

BEGIN = "<!-- measured by tests.bench: begin -->"
END = "<!-- measured by tests.bench: end -->"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first to the left, figures to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def row(cells: Sequence[str]) -> str:
        pairs = enumerate(zip(cells, widths, strict=True))
        return "| " + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in pairs) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ":" if i else "-" * (w + 2) for i, w in enumerate(widths)) + "|"
    return "\n".join([row(lines[0]), rule, *map(row, lines[1:])])


def markdown(results: Results) -> str:
    """The whole report."""
    machine = results.machine
    intro = (
        f"`{results.command}` at commit {machine['commit']} on {machine['cpu']}, kernel {machine['kernel']}, "
        f"against {machine['peer']}."
    )
    parts = [intro, *_aims(results), *_test_runs(results), *_cpu_and_rate(results), *_hooks(results)]
    return "\n\n".join([*parts, *_whole_machine(results), *_latency(results)]) + "\n"


def write_into(path: Path, report: str) -> None:
    """Puts the report between its two marks in `path`; what stands around them is somebody's text and stays."""
    section = f"{BEGIN}\n\n{report}\n{END}"
    old = path.read_text() if path.exists() else f"# Measurements\n\n{BEGIN}\n{END}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    path.write_text(before + section + after if begin and end else f"{old.rstrip()}\n\n{section}\n")


def _section(title: str, caption: str, head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Nothing if there are no rows. `head` is split at its bars."""
    return [f"## {title}", caption.strip(), table(head.split("|"), rows)] if rows else []


def _aims(results: Results) -> list[str]:
    rows = []
    for aim in aims(results):
        bound = f"{'at most' if aim.at_most else 'at least'} {aim.bound:g}"
        rows.append((aim.what, bound, f"{aim.measured:.3g}", aim.where, "yes" if aim.met else "**no**"))
    return _section("Aims", captions.AIMS, "aim|bound|worst|where|met", rows)


def _test_runs(results: Results) -> list[str]:
    kinds = list(dict.fromkeys(run.kind for run in results.test_runs))
    hooks = list(dict.fromkeys(run.hook for run in results.test_runs))
    ns = {(run.hook, run.kind): f"{run.ns:.0f}" for run in results.test_runs}
    rows = [(hook, *(ns.get((hook, kind), "-") for kind in kinds)) for hook in hooks]
    return _section("Hooks alone", captions.TEST_RUNS, "|".join(("hook", *kinds)), rows)


def _cpu_and_rate(results: Results) -> list[str]:
    rows = []
    for row in results.of(LAB):
        peer, bridge = results.rate(PEER, row.workload, row.order), results.rate(BRIDGE, row.workload)
        peer_us = peer.cpu_us if peer else None
        cpu = (_us(peer_us), _us(row.cpu_us), _ratio(row.cpu_us, peer_us))
        rates = (_kpps(peer), _kpps(row), _kpps(bridge), _ratio(row.pps, bridge.pps if bridge else None))
        rows.append((row.workload, row.order, *cpu, *rates, _reordered(peer), _reordered(row)))
    head = "workload|order|peer us|us|of peer|peer k/s|k/s|bridge k/s|of bridge|peer reordered|reordered"
    caption = captions.CPU_AND_RATE.format(floor=results.floor_ns)
    return _section("CPU per compared packet, and packets/s", caption, head, rows)


def _hooks(results: Results) -> list[str]:
    names = list(dict.fromkeys(name for row in results.of(LAB) for name in row.hooks))
    rows = []
    for row in (row for row in results.of(LAB) if row.hooks):
        cells = [f"{row.hooks[name].ns_per_packet:.0f} ({row.hooks[name].runs_per_packet:.2f})" for name in names]
        both = sum(row.hooks[name].ns_per_packet for name in COMPARING)
        rows.append((row.workload, row.order, *cells, f"{both:.0f}"))
    return _section("Hooks under traffic", captions.HOOKS, "|".join(("workload", "order", *names, "P2+P4")), rows)


def _whole_machine(results: Results) -> list[str]:
    rows = []
    for row in results.of(LAB):
        if bridge := results.rate(BRIDGE_BOTH, row.workload):
            added = row.busy_us - bridge.busy_us
            rows.append((row.workload, row.order, _us(bridge.busy_us), _us(row.busy_us), _us(added)))
    return _section(
        "CPU of the whole machine", captions.WHOLE_MACHINE, "workload|order|plain bridge|coloebpf|added", rows
    )


def _latency(results: Results) -> list[str]:
    rows = []
    for row in (row for row in results.latency if row.system == LAB):
        bridge, peer = (results.delay(system, row.workload, row.pace) for system in (BRIDGE, PEER))
        if bridge and peer:
            added = row.p50_us - bridge.p50_us
            cells = [f"{value:.1f}" for r in (peer, bridge, row) for value in (r.p50_us, r.p99_us)]
            ratios = [f"{added:.1f}", _ratio(added, peer.p50_us), _ratio(row.p50_us, peer.p50_us)]
            rows.append((row.workload, row.pace, *cells, *ratios, str(row.reordered + row.lost)))
    head = "workload|pace|peer p50|peer p99|bridge p50|bridge p99|p50|p99|added p50|added of peer|all of peer"
    return _section("Latency", captions.LATENCY, f"{head}|reordered or lost", rows)


def _us(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.3f}" if value is not None and base else "-"


def _kpps(row: Throughput | None) -> str:
    if row is None:
        return "-"
    return f"{row.pps / 1e3:.0f}" if row.stalled < row.runs else "stalls"


def _reordered(row: Throughput | None) -> str:
    return f"{row.reordered / max(1, row.released):.1%}" if row else "-"
