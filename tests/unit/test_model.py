"""Numbers and names that Python and the programs share, and what is refused before the kernel is asked."""

from __future__ import annotations

import re
from enum import IntEnum
from pathlib import Path

import pytest

from coloebpf import aliases, bpfsys, control, model, pins, programs, snapshot
from coloebpf.errors import ConfigError
from coloebpf.exemptions import exemption
from coloebpf.model import NicSpec, Policy, Role, Sizes, State
from coloebpf.nic_entries import check_spec
from coloebpf.programs import defines
from coloebpf.source import BPF_DIR

TYPES, CONSTANTS, MAPS = ((BPF_DIR / name).read_text() for name in ("types.h", "constants.h", "maps.h"))


def enumerators(name: str) -> dict[str, int]:
    """Of the C enum `name` in bpf/types.h."""
    found = re.search(rf"enum {name} \{{(.*?)\}}", TYPES, re.S)
    assert found, f"bpf/types.h has no enum {name}"
    values: dict[str, int] = {}
    following = 0
    for item in re.sub(r"/\*.*?\*/", "", found[1], flags=re.S).split(","):
        if item.strip():
            label, _, number = (part.strip() for part in item.partition("="))
            values[label] = int(number) if number else following
            following = values[label] + 1
    return values


def constant(name: str, text: str = CONSTANTS) -> int:
    """Of a #define."""
    found = re.search(rf"#define {name} (\d+)", text)
    assert found, f"there is no #define {name}"
    return int(found[1])


@pytest.mark.parametrize(
    ("ours", "name", "prefix"), [(State, "pair_state", ""), (Role, "role", "ROLE_"), (Policy, "policy", "POLICY_")]
)
def test_enums(ours: type[IntEnum], name: str, prefix: str) -> None:
    assert {prefix + member.name: member.value for member in ours} == enumerators(name)


@pytest.mark.parametrize(
    ("names", "name", "end"), [(model.REASONS, "reason", "REASONS"), (model.DROPS, "drop", "DROPS")]
)
def test_names_of_counters(names: tuple[str, ...], name: str, end: str) -> None:
    theirs = enumerators(name)
    assert theirs.pop(end) == len(names)
    # REASON_MISSING_SVM is `missing_on_svm`: an operator reads ours
    assert [f"{name}_{ours}".replace("_on_", "_").upper() for ours in names] == list(theirs)


def test_kinds_of_events() -> None:
    assert {f"EVENT_{name}".upper(): number for number, name in model.EVENTS.items()} == enumerators("event_kind")


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (model.MAX_NICS, "MAX_NICS"),
        (model.MAX_PAIRS, "MAX_PAIRS"),
        (programs.STREAM_WORDS, "STREAM_WORDS"),
        (programs.DGRAM_WORDS, "DGRAM_WORDS"),
        (programs.HASH_PAD, "HASH_PAD"),
        (Sizes().slots, "MAX_SLOTS"),
        (Sizes().flows, "MAX_FLOWS"),
    ],
)
def test_constants(ours: int, name: str) -> None:
    assert ours == constant(name)


@pytest.mark.parametrize(
    ("ours", "name", "text"),
    [
        (model.NIC_CLSACT_VIF, "NIC_CLSACT_VIF", TYPES),
        (model.NIC_CLSACT_FWD, "NIC_CLSACT_FWD", TYPES),
        (snapshot.GAUGE_SLOTS_USED, "GAUGE_SLOTS_USED", MAPS),
        (snapshot.GAUGE_FLOWS_USED, "GAUGE_FLOWS_USED", MAPS),
        (control.GAUGE_FLOW_TOP, "GAUGE_FLOW_TOP", MAPS),
        (programs.TC_STAGES.index("drain"), "STAGE_DRAIN", MAPS),
        (programs.TC_STAGES.index("split"), "STAGE_SPLIT", MAPS),
        (programs.TC_STAGES.index("p4_prove"), "STAGE_P4", MAPS),
        (programs.TC_STAGES.index("p4_datagram"), "STAGE_P4_DATAGRAM", MAPS),
        (programs.TC_STAGES.index("s1_deliver"), "STAGE_S1", MAPS),
        (programs.TC_STAGES.index("pass_whole"), "STAGE_PASS", MAPS),
        (programs.TC_STAGES.index("hold"), "STAGE_HOLD", MAPS),
        (programs.TC_STAGES.index("split_udp"), "STAGE_SPLIT_UDP", MAPS),
        (programs.TC_STAGES.index("partial"), "STAGE_PARTIAL", MAPS),
        (programs.TC_STAGES.index("p1_alias"), "STAGE_P1_ALIAS", MAPS),
        (programs.TC_STAGES.index("p2_alias"), "STAGE_P2_ALIAS", MAPS),
        (programs.XDP_STAGES.index("p3_arrive"), "STAGE_P3", MAPS),
        (programs.XDP_STAGES.index("s1_arrive"), "STAGE_S1_XDP", MAPS),
    ],
)
def test_numbers_in_maps(ours: int, name: str, text: str) -> None:
    assert ours == constant(name, text)


def test_aliases_are_those_of_flows() -> None:
    assert enumerators("kind")["KIND_TCP"] == aliases.KIND_TCP
    for ours, name in ((aliases.IDLE_ALIAS_NS, "IDLE_ALIAS"), (aliases.IDLE_TCP_NS, "IDLE_TCP")):
        found = re.search(rf"#define {name} \((\d+) \* SEC\)", CONSTANTS)
        assert found
        assert ours == int(found[1]) * 10**9


def test_every_map_and_program_is_known() -> None:
    pinned = re.findall(
        r"(?<!define )(?:_TABLE_PINNED\(.*?|PINNED\(\"stack\", |maps/ringbuf:).*?PIN_DIR \"/(\w+)\"", MAPS
    )
    big = re.findall(r"^BIG_TABLE_PINNED\(struct \w+, (\w+),", MAPS, re.M)
    assert sorted(pinned + big) == sorted(pins.MAPS)
    source = "".join(path.read_text() for path in BPF_DIR.glob("*.c"))
    functions = re.findall(r"^int (\w+)\(struct (__sk_buff|xdp_md) \*", source, re.M)
    assert sorted(name for name, kind in functions if kind == "__sk_buff") == sorted(pins.TC_PROGRAMS)
    assert sorted(name for name, kind in functions if kind == "xdp_md") == sorted(pins.XDP_PROGRAMS)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (Sizes(slots=0), "slots = 0: must be a power of two between 2 and 65536"),
        (Sizes(slots=1), "slots = 1: must be a power of two between 2 and 65536"),
        (Sizes(slots=1000), "slots = 1000: must be a power of two between 2 and 65536"),
        (Sizes(slots=131072), "slots = 131072: must be a power of two between 2 and 65536"),
        (Sizes(flows=-2), "flows = -2: must be a power of two between 2 and 1048576"),
        (Sizes(flows=1 << 21), "flows = 2097152: must be a power of two between 2 and 1048576"),
        (Sizes(mtu=575), "mtu = 575: must be between 576 and 9000"),
        (Sizes(mtu=9001), "mtu = 9001: must be between 576 and 9000"),
    ],
)
def test_sizes_that_are_refused(sizes: Sizes, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        defines(sizes, Path("/pins"))
    assert str(refused.value) == sentence


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        (Sizes(), {"MAX_SLOTS": "65536u", "MAX_FLOWS": "65536u", "HELD_BYTES": "4194304", "PIN_DIR": '"/pins"'}),
        (Sizes(slots=8192, flows=1 << 20), {"MAX_SLOTS": "8192u", "MAX_FLOWS": "1048576u", "HELD_BYTES": "524288"}),
        (Sizes(mtu=1501, slots=2, flows=2), {"MAX_SLOTS": "2u", "SLOT_SHIFT": "14", "HASH_ROUNDS": "71"}),
    ],
)
def test_sizes_for_the_compiler(sizes: Sizes, wanted: dict[str, str]) -> None:
    flags = dict(flag.removeprefix("-D").split("=") for flag in defines(sizes, Path("/pins")))
    assert wanted.items() <= flags.items()
    assert ("SLOT_SHIFT" in flags) == sizes.jumbo


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (NicSpec(64, 0, Role.PRIMARY, "v", "f"), "nic 64, pair 0: both must be between 0 and 63"),
        (NicSpec(0, -1, Role.PRIMARY, "v", "f"), "nic 0, pair -1: both must be between 0 and 63"),
        (NicSpec(0, 0, Role.PRIMARY, "v", "f", vlan=4095), "vlan 4095 of v: must be between 0 (none) and 4094"),
        (
            NicSpec(0, 0, Role.PRIMARY, "v", "f", mac="02:c0"),
            "mac '02:c0' of v is not a MAC address such as 02:c0:10:00:00:01",
        ),
        (
            NicSpec(0, 0, Role.PRIMARY, "v", "f", mac="02:c0:10:00:00:xy"),
            "mac '02:c0:10:00:00:xy' of v is not a MAC address such as 02:c0:10:00:00:01",
        ),
    ],
)
def test_nics_that_are_refused(spec: NicSpec, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_spec(spec)
    assert str(refused.value) == sentence


def test_mac_of_a_nic() -> None:
    assert check_spec(NicSpec(63, 63, Role.SECONDARY, "v", "f", 4094, "02:C0:10:00:00:01")) == b"\x02\xc0\x10\0\0\1"
    assert check_spec(NicSpec(0, 0, Role.SECONDARY, "v", "f")) == bytes(6)


@pytest.mark.parametrize(
    ("remote", "bits", "address"),
    [
        ("10.0.0.0/8", 32 + 96 + 8, "00000000000000000000ffff0a000000"),
        ("10.1.2.3/8", 32 + 96 + 8, "00000000000000000000ffff0a000000"),
        ("192.0.2.7", 32 + 128, "00000000000000000000ffffc0000207"),
        ("0.0.0.0/0", 32 + 96, "00000000000000000000ffff00000000"),
        ("fd00::/8", 32 + 8, "fd000000000000000000000000000000"),
        ("fd77::10", 32 + 128, "fd770000000000000000000000000010"),
        ("::/0", 32, "00000000000000000000000000000000"),
    ],
)
def test_prefixes_of_exemptions(remote: str, bits: int, address: str) -> None:
    assert exemption(6, 22, remote, 0) == (bits, bytes.fromhex(address))


@pytest.mark.parametrize(
    ("proto", "port", "remote", "nic", "sentence"),
    [
        (256, 22, "10.0.0.0/8", 0, "exemption of protocol 256: must be between 0 and 255"),
        (-1, 22, "10.0.0.0/8", 0, "exemption of protocol -1: must be between 0 and 255"),
        (6, 65536, "10.0.0.0/8", 0, "exemption of port 65536: must be between 0 and 65535"),
        (6, 22, "10.0.0.0/8", 64, "exemption of NIC 64: must be between 0 and 63"),
        (6, 22, "10.0.0.0/33", 0, "remote '10.0.0.0/33' is no address prefix such as 10.0.0.0/8 or fd00::/8"),
        (6, 22, "example.org", 0, "remote 'example.org' is no address prefix such as 10.0.0.0/8 or fd00::/8"),
    ],
)
def test_exemptions_that_are_refused(proto: int, port: int, remote: str, nic: int, sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        exemption(proto, port, remote, nic)
    assert str(refused.value) == sentence


def test_context_of_a_test_run() -> None:
    context = bpfsys.sk_buff(1, -1, 3, priority=7)
    words = [int.from_bytes(context[at : at + 4], "little") for at in range(0, len(context), 4)]
    # struct __sk_buff, linux/bpf.h: word 8 is `priority`, cb[] begins at word 12
    assert {at: word for at, word in enumerate(words) if word} == {8: 7, 12: 1, 13: 0xFFFFFFFF, 14: 3}
