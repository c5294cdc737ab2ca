"""Offloads by ethtool's words, and sets of CPUs as sysfs takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from coloebpf.errors import DeviceError
from coloebpf.tuning import OFFLOADS, cpu_mask, offloads_off, raise_backlog, stay_on

LISTING = """\
Features for eth0:
rx-checksumming: on
tx-checksumming: off
\ttx-checksum-ipv4: off [fixed]
tcp-segmentation-offload: on
generic-receive-offload: on [requested off]
rx-gro-hw: off [fixed]
tx-vlan-offload: on [fixed]
"""


def ethtool(directory: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`script` is the machine's ethtool."""
    program = directory / "ethtool"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_offloads_that_stay_on() -> None:
    assert stay_on(LISTING) == [
        ("tcp-segmentation-offload", "on"),
        ("generic-receive-offload", "on [requested off]"),
        ("tx-vlan-offload", "on [fixed]"),
    ]


def test_each_offload_is_turned_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ethtool(tmp_path, f'echo "$@" >>{tmp_path}/calls', monkeypatch)
    offloads_off("eth9")
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [*(f"-K eth9 {feature} off" for feature in OFFLOADS), "-k eth9"]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        (
            "echo 'netlink error: No such device' >&2; exit 1",
            "the offloads of eth9 can't be read: netlink error: No such",
        ),
        ("exit 1", "the offloads of eth9 can't be read: ethtool -k failed"),
        (
            "echo 'rx-gro-hw: on [fixed]'",
            r"eth9: offload rx-gro-hw stays on \(on \[fixed\]\); the forward link needs it",
        ),
        (
            '[ "$1" = -k ] && echo "rx-gro-hw: on" || { echo "not permitted" >&2; exit 1; }',
            r"eth9: offload rx-gro-hw stays on \(not permitted\); the forward link needs it off",
        ),
    ],
)
def test_offloads_that_can_not_be_turned_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, sentence: str
) -> None:
    ethtool(tmp_path, script, monkeypatch)
    with pytest.raises(DeviceError, match=sentence):
        offloads_off("eth9")


def test_ethtool_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        DeviceError, match=r"ethtool can't be run \(No such file or directory\): apt-get install ethtool"
    ):
        offloads_off("eth9")


@pytest.mark.parametrize(
    ("cpus", "mask"),
    [
        (1, "00000001"),
        (2, "00000003"),
        (32, "ffffffff"),
        (33, "00000001,ffffffff"),
        (64, "ffffffff,ffffffff"),
        (96, "ffffffff,ffffffff,ffffffff"),
    ],
)
def test_cpu_masks(cpus: int, mask: str) -> None:
    assert cpu_mask(cpus) == mask


@pytest.mark.parametrize(("before", "after"), [("1000\n", "16384\n"), ("16384\n", "16384\n"), ("50000\n", "50000\n")])
def test_the_backlog_is_never_lowered(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "netdev_max_backlog"
    path.write_text(before)
    raise_backlog(16384, path, first="/proc/self/ns/net")
    assert path.read_text() == after
