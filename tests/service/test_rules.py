"""When a checkpoint is asked for: each rule by itself, then what is decided of all of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coloebpf.model import State
from coloebpf.service import rules, status
from coloebpf.service.config import PairConfig, parse
from coloebpf.service.config_example import example
from coloebpf.service.rules import MS, Decision, PairView, Timings, Wish, decide

S = 1000 * MS
NOW = 100 * S
TIMES = Timings()


def view(**known: Any) -> PairView:
    """A pair in lock-step whose last checkpoint was committed a second ago."""
    usual: dict[str, Any] = {
        "now_ns": NOW,
        "state": State.LOCKSTEP,
        "last_commit_ns": NOW - S,
        "last_request_ns": NOW - S,
    }
    return PairView(**usual | known)


STORM = tuple(NOW - i * 100 * MS for i in range(20))  # as many as it takes, in the last 2 s


@pytest.mark.parametrize(
    ("rule", "known", "trigger"),
    [
        (rules.rule_divergence, {}, None),
        (rules.rule_divergence, {"divergences": ("payload",)}, "divergence"),
        (rules.rule_divergence, {"divergences": ("payload",), "mode": "periodic"}, None),
        (rules.rule_timeout, {}, None),
        (rules.rule_timeout, {"late_packets": 1}, "timeout"),
        (rules.rule_timeout, {"late_packets": 1, "mode": "periodic"}, None),
        (rules.rule_high_water, {}, None),
        (rules.rule_high_water, {"high_water": True}, "high_water"),
        (rules.rule_high_water, {"high_water": True, "mode": "periodic"}, "high_water"),
        (rules.rule_operator, {}, None),
        (rules.rule_operator, {"operator": True}, "operator"),
        (rules.rule_interval, {"last_commit_ns": NOW - 4 * S + 1}, None),
        (rules.rule_interval, {"last_commit_ns": NOW - 4 * S}, "interval"),
        (rules.rule_periodic, {"last_commit_ns": NOW - S}, None),
        (rules.rule_periodic, {"last_commit_ns": NOW - 100 * MS + 1, "mode": "periodic"}, None),
        (rules.rule_periodic, {"last_commit_ns": NOW - 100 * MS, "mode": "periodic"}, "periodic"),
        (rules.rule_initial, {}, "initial"),
        (rules.rule_again, {"failed": "timeout"}, "timeout"),
        (rules.rule_again, {}, "initial"),
    ],
)
def test_a_rule(rule: Any, known: dict[str, Any], trigger: str | None) -> None:
    wish = rule(view(**known))
    assert (wish.trigger if wish else None) == trigger


def test_a_reason_says_what_differs() -> None:
    wish = rules.rule_divergence(view(divergences=("payload", "fin", "payload")))
    assert wish == Wish("divergence", "3 flows differ (fin, payload)")


@pytest.mark.parametrize(
    ("known", "mode", "why"),
    [
        ({"recent_requests_ns": STORM}, "periodic", "20 requests within 2000 ms"),
        ({"recent_requests_ns": STORM[:-1]}, "lockstep", ""),
        ({"recent_requests_ns": (*STORM[:-1], NOW - 2 * S - 1)}, "lockstep", ""),  # the twentieth was before the window
        ({"recent_requests_ns": STORM, "since_mode_ns": NOW - S}, "lockstep", ""),  # half of them before the calm
        ({"mode": "periodic", "last_cause_ns": NOW - 10 * S + 1}, "periodic", ""),
        ({"mode": "periodic", "last_cause_ns": NOW - 10 * S}, "lockstep", "no cause for a checkpoint in 10000 ms"),
        ({"mode": "periodic", "since_mode_ns": NOW - 10 * S + 1}, "periodic", ""),
        ({"mode": "periodic", "recent_requests_ns": STORM, "since_mode_ns": NOW - 20 * S}, "lockstep", "no cause for a checkpoint in 10000 ms"),
    ],
)  # fmt: skip
def test_storms_and_calm(known: dict[str, Any], mode: str, why: str) -> None:
    assert rules.mode_of(view(**known)) == (mode, why)


@pytest.mark.parametrize(
    ("known", "trigger", "not_before_ns"),
    [
        # nothing to do: look again when the longest interval ends
        ({}, None, NOW + 3 * S),
        ({"mode": "periodic", "last_commit_ns": NOW - 30 * MS, "last_cause_ns": NOW}, None, NOW + 70 * MS),
        # the least distance to the last commit, and to a request that failed
        ({"divergences": ("fin",), "last_commit_ns": NOW - 20 * MS}, "divergence", 0),
        ({"divergences": ("fin",), "last_commit_ns": NOW - 20 * MS + 1}, None, NOW + 1),
        ({"divergences": ("fin",), "last_request_ns": NOW - 15 * MS}, None, NOW + 5 * MS),
        ({"divergences": ("fin",), "last_request_ns": NOW - 20 * MS, "failed": "divergence"}, None, NOW + 80 * MS),
        ({"divergences": ("fin",), "last_request_ns": NOW - 100 * MS, "failed": "divergence"}, "divergence", 0),
        # one request until the commit
        ({"divergences": ("fin",), "pending_request_ns": NOW - S}, None, NOW + 9 * S),
        # which rule names it
        ({"divergences": ("fin",), "operator": True, "late_packets": 3, "high_water": True}, "operator", 0),
        ({"divergences": ("fin",), "late_packets": 3, "high_water": True}, "divergence", 0),
        ({"late_packets": 3, "high_water": True, "last_commit_ns": 1}, "high_water", 0),
        ({"late_packets": 3, "last_commit_ns": 1}, "timeout", 0),
        ({"last_commit_ns": 1}, "interval", 0),
        ({"last_commit_ns": 1, "mode": "periodic", "last_cause_ns": NOW}, "periodic", 0),
        # states
        ({"state": State.SYNCING, "last_commit_ns": 0, "last_request_ns": 0}, "initial", 0),
        ({"state": State.SYNCING, "now_ns": MS, "last_commit_ns": 0, "last_request_ns": 0}, "initial", 0),  # just booted
        ({"state": State.SYNCING, "pending_request_ns": NOW - 60 * S}, None, 0),  # the first copy of a large guest
        ({"state": State.CHECKPOINTING, "failed": "high_water"}, "high_water", 0),
        ({"state": State.CHECKPOINTING, "pending_request_ns": NOW}, None, NOW + 10 * S),
        *(({"state": state, "divergences": ("fin",), "last_commit_ns": 1}, None, 0) for state in (State.UNPROTECTED, State.PASSTHROUGH, State.PROMOTED, State.HALTED)),
    ],
)  # fmt: skip
def test_a_decision(known: dict[str, Any], trigger: str | None, not_before_ns: int) -> None:
    got = decide(view(**known))
    assert (got.request.trigger if got.request else None, got.not_before_ns) == (trigger, not_before_ns)
    assert not got.overdue


@pytest.mark.parametrize(("age_ns", "overdue"), [(10 * S - 1, False), (10 * S, True)])
def test_an_engine_that_never_commits(age_ns: int, overdue: bool) -> None:
    assert decide(view(pending_request_ns=NOW - age_ns)) == Decision(
        None, "lockstep", NOW - age_ns + 10 * S, overdue=overdue
    )


def test_the_storm_takes_effect_at_once() -> None:
    got = decide(view(recent_requests_ns=STORM, divergences=("payload",), last_commit_ns=NOW - 50 * MS))
    assert got == Decision(None, "periodic", NOW + 50 * MS, "20 requests within 2000 ms")


def test_a_mode_changes_while_a_request_is_under_way() -> None:
    got = decide(view(recent_requests_ns=STORM, pending_request_ns=NOW - MS))
    assert (got.mode, got.request) == ("periodic", None)


def test_times_of_a_configuration() -> None:
    pair = parse(example(), Path("x")).pairs[0]
    assert isinstance(pair, PairConfig)
    assert Timings.of(pair) == TIMES


def test_the_triggers_are_those_of_the_status() -> None:
    assert sorted(rules.TRIGGERS) == sorted(status.TRIGGERS)


# ---- a pair's day: every cause at any time, an engine that commits after any time ----------------------------------

CAUSES = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from(["divergence", "timeout", "high_water"])), max_size=400
)


@given(gaps=CAUSES, commit_ms=st.integers(0, 300))
def test_requests_over_time(gaps: list[tuple[int, str]], commit_ms: int) -> None:
    """Never two at once, never too close, never longer apart than the longest interval, and causes are not forgotten."""
    now = NOW
    causes = []
    for gap, kind in gaps:
        now += gap * MS
        causes.append((now, kind))
    now = NOW
    pair = view(last_commit_ns=NOW, last_request_ns=0, since_mode_ns=NOW)
    requests: list[int] = []
    commits = [NOW]
    while now < NOW + 30 * S:
        while causes and causes[0][0] <= now:
            at, kind = causes.pop(0)
            seen = {"divergence": {"divergences": (*pair.divergences, "payload")}, "timeout": {"late_packets": 1}}
            pair = replace(pair, last_cause_ns=at, **seen.get(kind, {"high_water": True}))  # type: ignore[arg-type]
        pair = replace(pair, now_ns=now)
        got = decide(pair)
        if got.mode != pair.mode:
            pair = replace(pair, mode=got.mode, since_mode_ns=now)
        if got.request:
            assert not pair.pending_request_ns
            requests.append(now)
            recent = pair.recent_requests_ns
            if got.request.trigger in ("divergence", "timeout", "high_water"):
                recent = (*recent, now)[-TIMES.storm_count :]
            pair = replace(pair, pending_request_ns=now, last_request_ns=now, recent_requests_ns=recent)
            if commit_ms:
                now += commit_ms * MS
            commits.append(now)
            pair = replace(
                pair, pending_request_ns=0, last_commit_ns=now, divergences=(), late_packets=0, high_water=False
            )
            continue
        upcoming = [at for at in (got.not_before_ns, causes[0][0] if causes else 0) if at > now]
        assert got.not_before_ns > now, "it would never be looked at again"
        now = min(upcoming)
    for commit, request in zip(commits, requests, strict=False):
        assert TIMES.interval_min_ns <= request - commit <= TIMES.interval_max_ns
    assert all(a < b for a, b in pairwise(requests))
