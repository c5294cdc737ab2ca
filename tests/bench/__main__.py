"""`python -m tests.bench`: measures everything and prints the report."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from coloebpf.errors import ColoError
from tests.bench import machine, report
from tests.bench.feeder import Feeder
from tests.bench.lab import BenchLab, bring_up
from tests.bench.results import Results
from tests.bench.suite import FULL, QUICK, Suite
from tests.bench.testruns import TestRuns
from tests.bench.workloads import COMMON, LATENCY, LOCK_STEP, MANY, ORDERS, PACES

FRAMES, FRAMES_QUICK = 100_000, 5_000  # that a hook is shown for each figure


def measure(results: Results, quick: bool) -> None:
    """Fills `results`; says on standard error what it is at."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coloebpf-bench.")))
        feeder = Feeder(directory)
        plain = stack.enter_context(BenchLab("benchplain", None))
        lab = stack.enter_context(BenchLab("bench", bring_up))
        new_lab = partial(BenchLab, "benchmany", bring_up)
        suite = Suite(feeder, plain, lab, new_lab, QUICK if quick else FULL)
        results.floor_ns = suite.floor_ns
        _say("hooks alone")
        results.test_runs += TestRuns(new_lab, directory, FRAMES_QUICK if quick else FRAMES).all()
        for workload in COMMON:
            _say(workload.name)
            results.throughput += suite.bridge(workload)
            for order in ORDERS:
                results.throughput.append(suite.peer(workload, order))
                results.throughput.append(suite.lab(workload, order))
        for workload in MANY:
            _say(workload.name)
            results.throughput.append(suite.many(workload, LOCK_STEP))
        for workload in LATENCY:
            for pace in PACES:
                _say(f"latency: {workload.name}, {pace.name}")
                results.latency += suite.latencies(workload, pace)


def main(arguments: Sequence[str]) -> int:
    """Runs it; 0 only if nothing went wrong. Aims that are missed are results, not failures."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short single runs: shows that all works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    parser.add_argument("--md", type=Path, metavar="FILE", help="put the report between its marks in this file")
    options = parser.parse_args(arguments)
    try:
        results = Results(shlex.join(["python", "-m", "tests.bench", *arguments]), machine.describe())
        measure(results, options.quick)
    except ColoError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    text = report.markdown(results)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(results.as_dict(), indent=1) + "\n")
    if options.md:
        report.write_into(options.md, text)
    return 0


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
