"""The names that Python gives to the programs' numbers are in the order of the C enums."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coloebpf import model

BPF = Path(__file__).parents[2] / "bpf"


def enum(name: str) -> dict[str, int]:
    """Members and values of a C enum of bpf/types.h."""
    text = re.sub(r"/\*.*?\*/", "", (BPF / "types.h").read_text(), flags=re.DOTALL)
    found = re.search(rf"enum {name}\s*{{(.*?)}}", text, re.DOTALL)
    assert found, f"no enum {name}"
    members, number = {}, 0
    for entry in found.group(1).split(","):
        word, _, value = (part.strip() for part in entry.partition("="))
        if word:
            number = int(value) if value else number
            members[word] = number
            number += 1
    return members


def constant(name: str) -> int:
    found = re.search(rf"#define {name} (\d+)", (BPF / "constants.h").read_text())
    assert found, f"no {name}"
    return int(found.group(1))


def in_c(names: tuple[str, ...], prefix: str) -> dict[str, int]:
    return {prefix + name.upper(): number for number, name in enumerate(names)}


def test_states() -> None:
    assert {state.name: int(state) for state in model.State} == enum("pair_state")


def test_roles() -> None:
    assert {f"ROLE_{role.name}": int(role) for role in model.Role} == enum("role")


def test_policies() -> None:
    assert {f"POLICY_{policy.name}": int(policy) for policy in model.Policy} == enum("policy")


def test_drops() -> None:
    c = enum("drop")
    assert c.pop("DROPS") == len(model.DROPS)
    assert in_c(model.DROPS, "DROP_") == c


def test_reasons() -> None:
    c = enum("reason")
    assert c.pop("REASONS") == len(model.REASONS)
    assert {name.replace("MISSING_", "MISSING_ON_"): n for name, n in c.items()} == in_c(model.REASONS, "REASON_")


def test_events() -> None:
    assert {f"EVENT_{name.upper()}": number for number, name in model.EVENTS.items()} == enum("event_kind")


@pytest.mark.parametrize("name", ["MAX_NICS", "MAX_PAIRS"])
def test_limits(name: str) -> None:
    assert getattr(model, name) == constant(name)
