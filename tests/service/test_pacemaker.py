"""The OCF agent, with a `coloebpf` and a `crm_attribute` that say what the test has written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from coloebpf.model import Role, State
from coloebpf.service.commands.arguments import SOCKET

TREE = Path(__file__).resolve().parents[2]
AGENT = TREE / "deploy/pacemaker/ocf/coloebpf"
SUCCESS, GENERIC, ARGS, UNIMPLEMENTED, INSTALLED, CONFIGURED, NOT_RUNNING, PROMOTED, FAILED_PROMOTED = (
    0,
    1,
    2,
    3,
    5,
    6,
    7,
    8,
    9,
)
ENOUGH_S = 60.0  # bounds a hang alone
# What a pair is to Pacemaker: whether it speaks, and its score.
ROWS = [
    ("primary", "unprotected", True, 100),
    ("primary", "syncing", True, 100),
    ("primary", "lockstep", True, 1000),
    ("primary", "checkpointing", True, 1000),
    ("primary", "passthrough", True, 1000),
    ("primary", "halted", False, None),
    ("secondary", "unprotected", False, None),
    ("secondary", "syncing", False, None),
    ("secondary", "lockstep", False, 10),
    ("secondary", "checkpointing", False, 10),
    ("secondary", "promoted", True, 1000),
    ("secondary", "halted", False, None),
]
# The n-th `status` shows the n-th file, or the last there is; an order writes the next one.
COLOEBPF = """#!/bin/sh
cd {home}
echo "$@" >>orders
case $1 in
status)
    [ ! -e slow ] || exec sleep 60
    [ ! -e down ] || {{ echo "coloebpf: no service answers" >&2; exit 3; }}
    n=$(cat looks 2>/dev/null || echo 0); echo $((n + 1)) >looks
    while [ ! -e status.$n ]; do n=$((n - 1)); done
    cat status.$n ;;
handover)
    [ ! -e handed ] || cp handed status.0
    [ ! -e refuses ] || {{ echo "coloebpf: progress" >&2; echo "coloebpf: $(cat refuses)" >&2; exit 1; }} ;;
esac
"""
CRM_ATTRIBUTE = """#!/bin/sh
echo "$OCF_RESOURCE_INSTANCE $@" >>{home}/scores
[ ! -e {home}/no_cluster ] || {{ echo "not connected" >&2; exit 102; }}
"""


class Node:
    """One host, in `home`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        for name, text in (("coloebpf", COLOEBPF), ("crm_attribute", CRM_ATTRIBUTE)):
            (home / name).write_text(text.format(home=home))
            (home / name).chmod(0o755)
        self.environ = {
            "PATH": f"{home}:/usr/bin:/bin",
            "HA_RSCTMP": str(home / "rsctmp"),
            "OCF_RESOURCE_INSTANCE": "guest:0",
            "OCF_RESKEY_pair": "web",
            "OCF_RESKEY_binary": str(home / "coloebpf"),
            "OCF_RESKEY_CRM_meta_timeout": "20000",
            "OCF_RESKEY_CRM_meta_clone_max": "2",
            "OCF_RESKEY_CRM_meta_notify": "true",
            "OCF_RESKEY_CRM_meta_on_node": "a",
        }
        self.said = ""

    def says(self, *rows: dict[str, Any] | str) -> None:
        """What `coloebpf status` shows from now on, one look after the other."""
        (self.home / "looks").unlink(missing_ok=True)
        for old in self.home.glob("status.*"):
            old.unlink()
        for number, row in enumerate(rows):
            self.write(f"status.{number}", row)

    def write(self, name: str, row: dict[str, Any] | str) -> None:
        text = row if isinstance(row, str) else json.dumps({"service": {"pairs": [row]}, "dataplane": None})
        (self.home / name).write_text(text)

    def flag(self, name: str, text: str = "") -> None:
        (self.home / name).write_text(text)

    def told(self, role: str) -> None:
        """Pacemaker has ordered that before."""
        (self.home / "rsctmp").mkdir(exist_ok=True)
        (self.home / "rsctmp/coloebpf-guest.role").write_text(f"{role}\n")

    @property
    def role(self) -> str | None:
        path = self.home / "rsctmp/coloebpf-guest.role"
        return path.read_text().strip() if path.exists() else None

    def act(self, *words: str, **environ: str) -> int:
        """The agent's exit code; what it says is at most a line for each thing, never a traceback."""
        done = subprocess.run(
            [str(AGENT), *words],
            env=self.environ | environ,
            capture_output=True,
            text=True,
            check=False,
            timeout=ENOUGH_S,
        )
        self.said = done.stderr
        assert "Traceback" not in done.stderr
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ocf-exit-reason:")]
        assert len(reasons) == (done.returncode in (GENERIC, INSTALLED, CONFIGURED, FAILED_PROMOTED)), done.stderr
        return done.returncode

    def lines(self, name: str) -> list[str]:
        path = self.home / name
        return path.read_text().splitlines() if path.exists() else []

    @property
    def score(self) -> str:
        """The last that was told."""
        return (self.lines("scores") or [""])[-1]

    @property
    def orders(self) -> list[str]:
        """Other than status."""
        return [line for line in self.lines("orders") if not line.startswith("status")]


def pair(role: str, state: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": "web",
        "role": role,
        "state": state,
        "alone_pending": False,
        "silent": False,
        "arbiter": "command",
    } | changes


def score_line(score: int | None) -> str:
    return "guest:0 --promotion --delete" if score is None else f"guest:0 --promotion --update {score}"


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_every_state_is_in_the_table() -> None:
    roles = {role.name.lower() for role in Role}
    states = {state.name.lower() for state in State}
    impossible = {("primary", "promoted"), ("secondary", "passthrough")}
    assert {(role, state) for role, state, *_ in ROWS} == {(r, s) for r in roles for s in states} - impossible


@pytest.mark.parametrize(("role", "state", "speaks", "score"), ROWS)
def test_monitor(node: Node, role: str, state: str, speaks: bool, score: int | None) -> None:
    node.says(pair(role, state))
    assert node.act("monitor") == NOT_RUNNING, "Pacemaker has not started it"
    assert not node.lines("orders")
    node.told("unpromoted")
    assert node.act("monitor") == SUCCESS
    assert node.score == score_line(score)
    node.told("promoted")
    assert node.act("monitor") == (PROMOTED if speaks else FAILED_PROMOTED)
    assert node.score == score_line(score)
    assert speaks or f"{role} in {state}" in node.said


@pytest.mark.parametrize("state", ["lockstep", "passthrough"])
def test_a_host_whose_right_has_ended_does_not_speak(node: Node, state: str) -> None:
    node.says(pair("primary", state, silent=True))
    node.told("promoted")
    assert node.act("monitor") == FAILED_PROMOTED
    assert node.score == score_line(None)


@pytest.mark.parametrize(("role", "state", "speaks", "score"), ROWS)
def test_start_and_stop(node: Node, role: str, state: str, speaks: bool, score: int | None) -> None:
    node.says(pair(role, state))
    assert node.act("start") == SUCCESS
    assert (node.role, node.score) == ("unpromoted", score_line(score))
    assert node.act("start") == SUCCESS
    assert node.act("stop") == SUCCESS
    assert (node.role, node.score) == (None, score_line(None))
    assert ("goes on without Pacemaker" in node.said) == speaks
    assert node.act("stop") == SUCCESS
    assert node.act("monitor") == NOT_RUNNING
    assert node.orders == []


def test_without_an_arbiter_nothing_is_started(node: Node) -> None:
    node.says(pair("primary", "unprotected", arbiter="none"))
    assert node.act("start") == CONFIGURED
    assert node.role is None


# ---- promote -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "state", "speaks", "score"), [row for row in ROWS if row[3] != 10])
def test_promote_of_what_will_not_change(node: Node, role: str, state: str, speaks: bool, score: int | None) -> None:
    node.says(pair(role, state))
    node.told("unpromoted")
    assert node.act("promote") == (SUCCESS if speaks else GENERIC)
    assert node.role == ("promoted" if speaks else "unpromoted")
    assert node.orders == [], "it never gives an operator's word"


@pytest.mark.parametrize("pending", [True, False])
@pytest.mark.parametrize("becomes", ["promoted", "halted"])
def test_promote_of_a_replica_waits_for_the_pair(node: Node, pending: bool, becomes: str) -> None:
    """For its arbiter, or for what the other host hands over."""
    node.says(
        pair("secondary", "lockstep", alone_pending=pending),
        pair("secondary", "checkpointing"),
        pair("secondary", becomes),
    )
    node.told("unpromoted")
    assert node.act("promote") == (SUCCESS if becomes == "promoted" else GENERIC)
    assert node.role == ("promoted" if becomes == "promoted" else "unpromoted")
    assert node.orders == []


def test_promote_gives_up_before_pacemaker_does(node: Node) -> None:
    node.says(pair("secondary", "lockstep", alone_pending=True))
    node.told("unpromoted")
    assert node.act("promote", OCF_RESKEY_CRM_meta_timeout="4000") == GENERIC
    assert "waits for its arbiter" in node.said
    assert (node.role, node.orders) == ("unpromoted", [])


def test_promote_beside_a_primary_that_is_there(node: Node) -> None:
    """Not Pacemaker's to overrule: it does not see that one, or could not demote it."""
    node.says(pair("secondary", "lockstep"))
    node.told("unpromoted")
    assert node.act("promote") == GENERIC
    assert "has not handed over" in node.said
    assert node.orders == []


# ---- demote ------------------------------------------------------------------------------------------------------------

HANDED = f"handover web --socket {SOCKET}"


@pytest.mark.parametrize("state", ["lockstep", "checkpointing"])
def test_demote_hands_over_to_the_host_that_is_promoted_next(node: Node, state: str) -> None:
    node.says(pair("primary", state))
    node.write("handed", pair("primary", "halted"))
    node.told("promoted")
    assert node.act("demote", OCF_RESKEY_CRM_meta_notify_promote_uname="b") == SUCCESS
    assert (node.orders, node.role, node.score) == ([HANDED], "unpromoted", score_line(None))


@pytest.mark.parametrize(("role", "state", "speaks", "score"), ROWS)
@pytest.mark.parametrize("following", ["", " ", "a"])
def test_demote_without_a_successor_leaves_the_guest_alone(
    node: Node, role: str, state: str, speaks: bool, score: int | None, following: str
) -> None:
    node.says(pair(role, state))
    node.told("promoted")
    assert node.act("demote", OCF_RESKEY_CRM_meta_notify_promote_uname=following) == SUCCESS
    assert (node.orders, node.role, node.score) == ([], "unpromoted", score_line(score))
    assert ("goes on speaking here" in node.said) == speaks


def test_demote_of_who_does_not_speak_any_more(node: Node) -> None:
    node.says(pair("primary", "halted"))
    node.told("promoted")
    assert node.act("demote", OCF_RESKEY_CRM_meta_notify_promote_uname="b") == SUCCESS
    assert (node.orders, node.role) == ([], "unpromoted")


def test_a_hand_over_that_is_refused_fails_with_the_service_s_words(node: Node) -> None:
    node.says(pair("primary", "unprotected"))
    node.flag("refuses", "pair web is unprotected: there is no secondary")
    node.told("promoted")
    assert node.act("demote", OCF_RESKEY_CRM_meta_notify_promote_uname="b") == GENERIC
    assert node.said == "ocf-exit-reason:pair web is unprotected: there is no secondary\n"
    assert node.role == "promoted"


def test_a_hand_over_that_the_other_host_has_not_heard_of_yet_is_one(node: Node) -> None:
    """This host is silent, whatever the exit code was."""
    node.says(pair("primary", "lockstep"))
    node.write("handed", pair("primary", "halted"))
    node.flag("refuses", "this host is silent, but the secondary could not be told")
    node.told("promoted")
    assert node.act("demote", OCF_RESKEY_CRM_meta_notify_promote_uname="b") == SUCCESS
    assert node.role == "unpromoted"


# ---- notify, validate-all, meta-data -----------------------------------------------------------------------------------


def test_notify_tells_the_score(node: Node) -> None:
    node.says(pair("secondary", "promoted"))
    assert node.act("notify") == SUCCESS
    assert node.lines("scores") == [], "it was not started"
    node.told("unpromoted")
    assert node.act("notify") == SUCCESS
    assert node.score == score_line(1000)
    node.flag("down")
    assert node.act("notify") == SUCCESS


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({}, SUCCESS),
        ({"OCF_RESKEY_pair": ""}, CONFIGURED),
        ({"OCF_RESKEY_binary": "/nonexistent/coloebpf"}, INSTALLED),
        ({"OCF_RESKEY_CRM_meta_notify": "false"}, CONFIGURED),
        ({"OCF_RESKEY_CRM_meta_notify": ""}, CONFIGURED),
        ({"OCF_RESKEY_CRM_meta_promoted_max": "2"}, CONFIGURED),
        ({"OCF_RESKEY_CRM_meta_clone_max": "", "OCF_RESKEY_CRM_meta_notify": ""}, SUCCESS),
    ],
)
def test_validate(node: Node, environ: dict[str, str], code: int) -> None:
    node.says(pair("primary", "lockstep"))
    assert node.act("validate-all", **environ) == code
    assert node.act("start", **environ) == code


def test_meta_data_has_every_action_and_the_real_defaults() -> None:
    done = subprocess.run([str(AGENT), "meta-data"], env={}, capture_output=True, text=True, check=True)
    tree = ET.fromstring(done.stdout)
    assert {action.get("name") for action in tree.iter("action")} == {
        *("start", "stop", "monitor", "promote", "demote", "notify", "meta-data", "validate-all")
    }
    assert {action.get("role") for action in tree.iter("action") if action.get("name") == "monitor"} == {
        "Promoted",
        "Unpromoted",
    }
    defaults = {p.get("name"): p.find("content") for p in tree.iter("parameter")}
    socket = defaults["socket"]
    assert socket is not None
    assert socket.get("default") == str(SOCKET)


def test_the_cluster_of_the_documentation_has_the_agent_s_parameters_and_times() -> None:
    done = subprocess.run([str(AGENT), "meta-data"], env={}, capture_output=True, text=True, check=True)
    tree = ET.fromstring(done.stdout)
    page = (TREE / "docs/pacemaker.md").read_text()
    (words,) = [
        line.split() for line in page.splitlines() if line.startswith("    ") and " ocf:coloebpf:coloebpf " in line
    ]
    given = words[words.index("params") + 1 : words.index("op")]
    assert {one.partition("=")[0] for one in given} <= {p.get("name") for p in tree.iter("parameter")}
    shown = []
    for one in re.split(r"\bop ", " ".join(words[words.index("op") :]))[1:]:
        name, *settings = one.split()
        shown.append((name, dict(setting.split("=") for setting in settings)))
    for action in tree.iter("action"):
        name, role = action.get("name"), action.get("role")
        if name in ("start", "stop", "promote", "demote", "monitor"):
            (settings,) = [each for title, each in shown if title == name and each.get("role") == role]
            assert settings["timeout"] == action.get("timeout")
            assert role is None or settings["interval"] == action.get("interval")


@pytest.mark.parametrize(("words", "code"), [((), ARGS), (("dance",), UNIMPLEMENTED), (("start", "stop"), ARGS)])
def test_usage(node: Node, words: tuple[str, ...], code: int) -> None:
    assert node.act(*words) == code


# ---- what goes wrong ---------------------------------------------------------------------------------------------------

ALL = ("start", "monitor", "promote", "demote")


@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize("answer", ["", "null", "{}", "[]", '{"service": {"pairs": [{"name": "web"}]}}', "{" * 99999])
def test_an_answer_that_can_not_be_read(node: Node, action: str, answer: str) -> None:
    node.says(answer)
    node.told("unpromoted")
    assert node.act(action) == GENERIC
    assert node.act("stop") == SUCCESS


@pytest.mark.parametrize("action", ALL)
def test_a_role_that_nobody_knows(node: Node, action: str) -> None:
    node.says(pair("tertiary", "lockstep"))
    node.told("unpromoted")
    assert node.act(action) == GENERIC


@pytest.mark.parametrize("action", ALL)
def test_a_pair_that_is_not_there(node: Node, action: str) -> None:
    node.says(pair("primary", "lockstep"))
    node.told("unpromoted")
    assert node.act(action, OCF_RESKEY_pair="mail") == INSTALLED


@pytest.mark.parametrize("action", ALL)
@pytest.mark.parametrize("trouble", ["down", "slow"])
def test_a_service_that_does_not_answer(node: Node, action: str, trouble: str) -> None:
    """In the time that Pacemaker gives. Not 'not running': the programs may still let the guest speak."""
    node.flag(trouble)
    node.told("promoted")
    assert node.act(action, OCF_RESKEY_CRM_meta_timeout="3000") == GENERIC
    assert node.role == "promoted"
    assert node.act("stop", OCF_RESKEY_CRM_meta_timeout="3000") == SUCCESS


def test_a_service_that_restarts_is_waited_for(node: Node) -> None:
    node.says(pair("primary", "lockstep"))
    node.flag("down")
    node.told("promoted")
    environ = {**node.environ, "PATH": os.environ["PATH"]}
    with subprocess.Popen([str(AGENT), "monitor"], env=environ, stderr=subprocess.PIPE) as process:
        while len(node.lines("orders")) < 2:
            assert process.poll() is None
        (node.home / "down").unlink()
        assert process.wait(ENOUGH_S) == PROMOTED


def test_scores_that_can_not_be_told_are_a_line(node: Node) -> None:
    node.says(pair("primary", "lockstep"))
    node.told("promoted")
    node.flag("no_cluster")
    assert node.act("monitor") == PROMOTED
    assert node.said == "WARNING: the promotion score could not be told: not connected\n"
    (node.home / "crm_attribute").unlink()
    assert node.act("monitor") == PROMOTED
    assert "crm_attribute can't be run" in node.said


@pytest.mark.parametrize("action", ["start", "promote", "demote"])
def test_a_place_for_notes_that_can_not_be_written(node: Node, action: str) -> None:
    node.says(pair("primary", "lockstep"))
    (node.home / "rsctmp").write_text("a file")
    assert node.act(action) == GENERIC
