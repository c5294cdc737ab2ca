"""/metrics: names, values, labels, and a server that no scraper can stall."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from coloebpf.errors import BpfError, ServiceError
from coloebpf.model import DROPS, REASONS, State
from coloebpf.service import metrics, metrics_dataplane, metrics_server
from coloebpf.service.disks import Usage
from coloebpf.service.metrics_server import MetricsServer, Page
from coloebpf.service.status import Status
from tests.service import samples

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Families:
    def __init__(self, status: Status, snapshot: dict[str, Any] | None) -> None:
        self._made = list(metrics.families(status, snapshot))

    def collect(self) -> Iterator[Any]:
        return iter(self._made)


def scraped(status: Status, snapshot: dict[str, Any] | None) -> Samples:
    """What a scraper reads out of the text."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Families(status, snapshot))
    found: Samples = {}
    for family in parse(generate_latest(registry).decode()):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


@pytest.fixture(scope="module")
def page() -> Samples:
    return scraped(samples.status(), samples.snapshot())


def value(found: Samples, name: str, **labels: str) -> float:
    return found["coloebpf_" + name, frozenset(labels.items())]


WEB = {"pair": "web", "nic": "5"}
NIC = samples.snapshot()["nics"][0]


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("dataplane_up", {}, 1),
        ("warnings", {}, 1),
        ("pair_state", {"pair": "web", "role": "primary", "state": "lockstep"}, 1),
        ("pair_state", {"pair": "web", "role": "primary", "state": "halted"}, 0),
        ("pair_state", {"pair": "db", "role": "secondary", "state": "unprotected"}, 1),
        ("pair_mode", {"pair": "web", "mode": "periodic"}, 1),
        ("pair_mode", {"pair": "web", "mode": "lockstep"}, 0),
        ("pair_epoch", {"pair": "web"}, 41),
        ("pair_engine_ready", {"pair": "web"}, 1),
        ("pair_engine_ready", {"pair": "db"}, 0),
        ("pair_undecided", {"pair": "web"}, 0),
        ("pair_state_change_timestamp_seconds", {"pair": "web"}, samples.NOW - 65),
        ("pair_mode_change_timestamp_seconds", {"pair": "web"}, samples.NOW - 5),
        ("pair_right_ends_timestamp_seconds", {"pair": "web"}, samples.NOW + 1.5),
        ("pair_uncompared_rules", {"pair": "web", "why": "exemption"}, 1),
        ("pair_uncompared_rules", {"pair": "web", "why": "policy"}, 1),
        ("pair_uncompared_rules", {"pair": "db", "why": "policy"}, 0),
        ("checkpoint_pending", {"pair": "web"}, 1),
        ("checkpoint_pending", {"pair": "db"}, 0),
        ("checkpoints_total", {"pair": "web", "trigger": "divergence"}, 30),
        ("checkpoints_total", {"pair": "web", "trigger": "operator"}, 0),
        ("checkpoint_failures_total", {"pair": "web"}, 2),
        ("checkpoint_duration_seconds_bucket", {"pair": "web", "le": "0.0025"}, 0),
        ("checkpoint_duration_seconds_bucket", {"pair": "web", "le": "0.005"}, 2),
        ("checkpoint_duration_seconds_bucket", {"pair": "web", "le": "0.25"}, 3),
        ("checkpoint_duration_seconds_bucket", {"pair": "web", "le": "30.0"}, 3),
        ("checkpoint_duration_seconds_bucket", {"pair": "web", "le": "+Inf"}, 4),
        ("checkpoint_duration_seconds_count", {"pair": "web"}, 4),
        ("checkpoint_duration_seconds_sum", {"pair": "web"}, 40.208),
        ("findings_total", {"pair": "web", "finding": "payload"}, 29),
        ("findings_total", {"pair": "web", "finding": "length"}, 0),
        ("peer_connected", {}, 1),
        ("peer_last_seen_timestamp_seconds", {}, samples.NOW - 0.02),
        ("peer_round_trip_seconds", {}, 0.0004),
        ("link_refusals_total", {"reason": "certificate"}, 2),
        ("link_refusals_total", {"reason": "oversized"}, 0),
        ("heartbeat_alive", {"path": "management"}, 1),
        ("heartbeat_alive", {"path": "fwd0"}, 0),
        ("heartbeat_last_seen_timestamp_seconds", {"path": "fwd0"}, samples.NOW - 5),
        ("heartbeats_total", {"path": "fwd0"}, 900),
        ("heartbeat_strangers_total", {"path": "fwd0"}, 3),
        ("certificate_expiry_timestamp_seconds", {"certificate": "own"}, samples.NOW + 8_640_000),
        ("verdicts_total", {**WEB, "verdict": "passed_proven"}, NIC["released_unchanged"]),
        ("verdicts_total", {**WEB, "verdict": "held"}, NIC["held_packets"]),
        ("verdicts_total", {**WEB, "verdict": "repeated"}, NIC["retransmissions"]),
        ("verdicts_total", {**WEB, "verdict": "policy"}, NIC["policy_passed"]),
        ("verdicts_total", {**WEB, "verdict": "exempt"}, NIC["exempt"]),
        ("verdicts_total", {**WEB, "verdict": "unprotected"}, NIC["unprotected"]),
        ("released_packets_total", {**WEB, "by": "commit"}, NIC["committed_packets"]),
        ("released_packets_total", {**WEB, "by": "proof"}, NIC["released_packets"] - NIC["committed_packets"]),
        ("events_total", {**WEB, "kind": "timeout"}, NIC["timeouts"]),
        ("events_total", {**WEB, "kind": "high_water"}, NIC["high_waters"]),
        ("events_total", {**WEB, "kind": "kick"}, NIC["kicks"]),
        ("held_packets", WEB, 12),
        ("parked_packets", WEB, 5),
        ("slab_slots_used", {}, 536),
        ("slab_slots_limit", {}, 65536),
        ("flows_used", {}, 96),
        ("flows_limit", {}, 4096),
        ("unknown_link_frames_total", {}, 17),
        *(("divergences_total", {**WEB, "reason": name}, 100 + i) for i, name in enumerate(REASONS)),
        *(("dropped_packets_total", {**WEB, "reason": name}, 200 + i) for i, name in enumerate(DROPS)),
        *((f"{name}_total", WEB, NIC[key]) for name, _, key in metrics_dataplane.PLAIN),
    ],
)  # fmt: skip
def test_a_value(page: Samples, name: str, labels: dict[str, str], expected: float) -> None:
    assert value(page, name, **labels) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("edge_s", "count"),
    [
        (1.024e-06, 4),  # 2^10 ns: the four below
        (2.048e-06, 7),
        (0.001048576, 7),  # 2^20 ns
        (0.002097152, 9),
        (17.179869184, 9),  # 2^34 ns
        ("+Inf", 10),
    ],
)
def test_holding_times_are_the_kernels_buckets(page: Samples, edge_s: float | str, count: int) -> None:
    assert value(page, "holding_time_seconds_bucket", **WEB, le=str(edge_s)) == count


def test_each_pair_is_in_one_state_and_one_mode(page: Samples) -> None:
    for name, kinds in (("coloebpf_pair_state", len(State)), ("coloebpf_pair_mode", 2)):
        for pair in ("web", "db"):
            values = [number for (n, labels), number in page.items() if n == name and ("pair", pair) in labels]
            assert (len(values), sum(values)) == (kinds, 1)


def test_names_follow_the_conventions(page: Samples) -> None:
    for name, _ in page:
        assert re.fullmatch(r"coloebpf_[a-z0-9]+(_[a-z0-9]+)*", name)
        assert not re.search(r"_(ms|ns|kb|milliseconds|count_total)(_|$)", name)
    for family in metrics.families(samples.status(), samples.snapshot()):
        assert family.documentation
        assert family.documentation[0].isupper() or family.documentation[0] == "1"


def test_no_label_has_a_value_of_the_traffics(page: Samples) -> None:
    free = {"coloebpf_build_info"}
    words = re.compile(r"[a-z0-9_+.-]{1,24}|\+Inf")
    for name, labels in page:
        assert name in free or all(words.fullmatch(text) for _, text in labels)
    names = {key for _, labels in page for key, _ in labels}
    assert not names & {"address", "port", "remote", "guest", "flow", "source"}


def test_unknown_names_share_one_series() -> None:
    status = samples.status()
    assert status.peer
    status.peer.refused = {"certificate": 1, "made up": 2, "made up too": 3}
    status.pairs[0].findings = {"new": 4}
    status.pairs[0].checkpoints = {"new": 5}
    found = scraped(status, None)
    assert value(found, "link_refusals_total", reason="other") == 5
    assert value(found, "findings_total", pair="web", finding="other") == 4
    assert value(found, "checkpoints_total", pair="web", trigger="other") == 5


def test_what_was_never_seen_has_no_time() -> None:
    status = samples.status()
    assert status.peer
    status.peer.seen_ago_ms = status.peer.rtt_ms = status.paths[0].seen_ago_ms = None
    status.pairs[0].arbiter_deadline_in_ms = None
    names = {name for name, _ in scraped(status, None)}
    assert "coloebpf_peer_connected" in names
    assert not names & {
        "coloebpf_peer_last_seen_timestamp_seconds",
        "coloebpf_peer_round_trip_seconds",
        "coloebpf_pair_right_ends_timestamp_seconds",
    }


def test_a_dataplane_that_cannot_be_read_leaves_what_the_service_knows() -> None:
    found = scraped(samples.status(), None)
    assert value(found, "dataplane_up") == 0
    assert value(found, "pair_epoch", pair="web") == 41
    assert not any(name.startswith("coloebpf_held") for name, _ in found)


def test_a_host_without_peer_and_pairs_has_a_page() -> None:
    found = scraped(Status(host="a", version="1", time=1.0), samples.snapshot())
    assert value(found, "mirrored_packets_total", pair="3", nic="5") == NIC["mirrored_packets"]


def test_a_replicated_disk() -> None:
    status = samples.status()
    assert not any("disk" in name for name, _ in scraped(status, None))
    status.pairs[0].disk = Usage(image="/i/web.img", active=5, hidden=6, free=7, size=8, errors=2, follows=True, uncommitted=True,
                                  good=True)  # fmt: skip
    found = scraped(status, None)
    assert value(found, "disk_overlay_bytes", pair="web", overlay="active") == 5
    assert value(found, "disk_overlay_bytes", pair="web", overlay="hidden") == 6
    assert value(found, "disk_free_bytes", pair="web") == 7
    assert value(found, "disk_errors_total", pair="web") == 2
    assert value(found, "disk_uncommitted", pair="web") == 1


# ---- the server --------------------------------------------------------------------------------------------------------


class Source:
    """Counts how often it was read."""

    def __init__(self, error: Exception | None = None) -> None:
        self.reads = 0
        self.error = error

    def snapshot(self) -> dict[str, Any]:
        self.reads += 1
        if self.error:
            raise self.error
        return samples.snapshot()


@asynccontextmanager
async def serving(
    source: Source | None = None, timeout_s: float = 5.0, clock: Callable[[], float] = lambda: 0.0
) -> AsyncIterator[MetricsServer]:
    page = Page(samples.status, (source or Source()).snapshot, clock)
    server = MetricsServer(page, "127.0.0.1", 0, timeout_s)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def get(
    server: MetricsServer, request: bytes = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"
) -> tuple[int, bytes, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]) if head else 0, head, body


def test_a_scrape() -> None:
    async def run() -> None:
        async with serving() as server:
            code, head, body = await get(server)
            assert code == 200
            assert b"Content-Type: text/plain; version=0.0.4" in head
            assert f"Content-Length: {len(body)}\r\n".encode() in head
            names = {family.name for family in parse(body.decode())}
            assert {"coloebpf_build_info", "process_resident_memory_bytes"} <= names

    asyncio.run(run())


def test_openmetrics_is_spoken_to_those_who_ask_for_it() -> None:
    async def run() -> None:
        async with serving() as server:
            ask = b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text;version=1.0.0\r\n\r\n"
            code, head, body = await get(server, ask)
            assert code == 200
            assert b"application/openmetrics-text; version=1.0.0" in head
            assert any(family.name == "coloebpf_checkpoints" for family in parse_openmetrics(body.decode()))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_line", "code"),
    [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?name=x HTTP/1.0", 200),
        ("HEAD /metrics HTTP/1.1", 200),
        ("GET / HTTP/1.1", 404),
        ("GET /metrics/../../etc/passwd HTTP/1.1", 404),
        ("POST /metrics HTTP/1.1", 405),
        ("GET /metrics", 400),
        ("GET /metrics SPDY/3", 400),
        ("", 400),
        ("\xff\xfe", 400),
        ("GET /" + "x" * 9000 + " HTTP/1.1", 431),
    ],
)
def test_requests(request_line: str, code: int) -> None:
    async def run() -> None:
        async with serving() as server:
            got, _, body = await get(server, request_line.encode("latin-1") + b"\r\n\r\n")
            assert got == code
            assert (body == b"") == request_line.startswith("HEAD")

    asyncio.run(run())


def test_a_page_is_made_once_for_all_who_ask_at_the_same_time() -> None:
    now = 0.0
    source = Source()

    async def run() -> None:
        nonlocal now
        async with serving(source, clock=lambda: now) as server:
            assert {code for code, *_ in await asyncio.gather(*(get(server) for _ in range(10)))} == {200}
            assert source.reads == 1
            now = metrics_server.FRESH_S
            await get(server)
            assert source.reads == 2

    asyncio.run(run())


@pytest.mark.parametrize("error", [BpfError("no pins"), OSError(9, "Bad file descriptor")])
def test_a_dataplane_that_is_gone_is_a_page_all_the_same(error: Exception) -> None:
    async def run() -> None:
        async with serving(Source(error)) as server:
            code, _, body = await get(server)
            assert code == 200
            assert b"\ncoloebpf_dataplane_up 0.0\n" in body

    asyncio.run(run())


@pytest.mark.parametrize("beginning", [b"", b"GET /metrics HTTP/1.1\r\nX: "])
def test_a_request_that_never_ends_is_cut_off(beginning: bytes) -> None:
    async def run() -> None:
        async with serving(timeout_s=0.2) as server:
            code, _, _ = await get(server, beginning)
            assert code == 0

    asyncio.run(run())


def test_a_reader_that_takes_nothing_is_cut_off_and_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    # More than the kernel takes for one that does not read: 4 MiB to be sent, and a receive buffer grows by reading only.
    size = 16 << 20

    async def big(_: Page, accept: str) -> tuple[str, bytes]:
        return "text/plain", bytes(size)

    monkeypatch.setattr(Page, "text", big)

    async def run() -> None:
        async with serving(timeout_s=4.0) as server:
            lazy = [await asyncio.open_connection("127.0.0.1", server.port, limit=1024) for _ in range(8)]
            for _, writer in lazy:
                writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            while len(server._connections) < len(lazy):
                await asyncio.sleep(0.01)
            code, _, body = await get(server)
            assert (code, len(body)) == (200, size)
            assert server._connections
            while server._connections:
                await asyncio.sleep(0.01)
            for reader, _ in lazy:  # nothing of the answer is kept for those who come back
                assert len(await reader.read()) < size

    asyncio.run(run())


def test_too_many_scrapers_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with serving() as server:
            idle = [
                await asyncio.open_connection("127.0.0.1", server.port) for _ in range(metrics_server.MAX_CONNECTIONS)
            ]
            while len(server._connections) < len(idle):
                await asyncio.sleep(0.01)
            with pytest.raises(ConnectionError):
                assert (await get(server))[0] == 200
            for _, writer in idle:
                writer.close()
            while server._connections:
                await asyncio.sleep(0.01)
            assert (await get(server))[0] == 200

    asyncio.run(run())


def test_an_address_that_is_taken_is_a_sentence() -> None:
    async def run() -> None:
        async with serving() as server:
            second = MetricsServer(Page(samples.status, samples.snapshot, lambda: 0.0), "127.0.0.1", server.port)
            with pytest.raises(ServiceError, match=r"can't serve metrics at 127.0.0.1:\d+ \(.*metrics_listen"):
                await second.start()

    asyncio.run(run())
