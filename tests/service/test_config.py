"""The configuration's file: what it reads as, each mistake with its key and what would be right, what a reload changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from coloebpf.model import NicSpec, Policy, Role
from coloebpf.service.config import Address, Config, ConfigErrors, Exemption, ModelConfig, load, parse
from coloebpf.service.config_example import example
from coloebpf.service.config_reload import Reload, diff

FILE = Path("/etc/coloebpf/coloebpf.toml")
TEXT = """\
[host]
name = "a"
[peer]
name = "b"
listen = "192.0.2.1:7788"
connect = "192.0.2.2:7788"
[arbiter.command]
fence = ["/usr/sbin/fence", "b"]
[arbiter.etcd]
endpoints = ["http://127.0.0.1:2379/", "http://127.0.0.2:2379"]
[[pair]]
name = "web"
number = 0
role = "primary"
engine = "libxl-colo"
arbiter = "command"
  [[pair.nic]]
  number = 0
  vif = "vif1.0"
  fwd = "fwd0"
  vlan = 7
  mac = "02:C0:10:00:00:01"
  [[pair.nic]]
  number = 1
  vif = "vif1.1"
  fwd = "fwd0"
  vlan = 8
  [[pair.exempt]]
  protocol = "udp"
  guest_port = 123
  nic = 1
  [pair.libxl_colo]
  listen = "127.0.0.1:9000"
  domain = "web"
[[pair]]
name = "mail"
number = 1
role = "secondary"
engine = "model"
  [[pair.nic]]
  number = 2
  vif = "vif2.0"
  fwd = "fwd1"
"""


LIVE = (
    "  [pair.libxl_colo]",
    '  [pair.libxl_live]\n  domain = "web"\n  listen = "192.0.2.1:7790"\n  [pair.libxl_colo]',
)


def edited(*edits: tuple[str, str]) -> str:
    """TEXT with the first of each replaced."""
    text = TEXT
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


def test_what_a_file_reads_as() -> None:
    config = parse(TEXT, FILE)
    web, mail = config.pairs
    assert config.path == FILE
    assert config.host.metrics_listen == Address("127.0.0.1", 9877)
    assert config.peer is not None
    assert (config.peer.listen, config.peer.heartbeat_timeout_ms) == (("192.0.2.1", 7788), 200)
    assert config.arbiter.etcd is not None
    assert config.arbiter.etcd.endpoints == ("http://127.0.0.1:2379", "http://127.0.0.2:2379")
    assert config.arbiter.command is not None
    assert config.arbiter.command.fence == ("/usr/sbin/fence", "b")
    assert (web.role, web.engine, web.arbiter, web.interval_max_ms) == (Role.PRIMARY, "libxl-colo", "command", 4000)
    assert web.exempts == (Exemption(protocol=17, guest_port=123, nic=1),)
    assert (mail.arbiter, mail.on_service_loss, mail.model, mail.libxl_colo) == ("none", "hold", ModelConfig(), None)
    assert web.nics[0].spec(web) == NicSpec(0, 0, Role.PRIMARY, "vif1.0", "fwd0", 7, "02:c0:10:00:00:01")
    assert mail.nics[0].spec(mail).other is Policy.COMPARE


@pytest.mark.parametrize(
    ("edits", "key", "wrong", "right"),
    [
        # a value by itself
        ([("number = 0", "number = 64")], "pair[0].number", "is 64", "from 0 to 63"),
        ([("number = 0", "number = true")], "pair[0].number", "is True", "from 0 to 63"),
        ([("number = 0", 'number = "0"')], "pair[0].number", "is '0'", "a whole number"),
        ([('name = "a"', 'name = "a b"')], "host.name", "is 'a b'", "letters, digits"),
        ([('name = "a"', "")], "host.name", "is missing", "letters, digits"),
        ([('[host]\nname = "a"', "")], "host.name", "is missing", "letters, digits"),
        ([('"primary"', '"master"')], "pair[0].role", "is 'master'", '"primary" or "secondary"'),
        ([('"libxl-colo"', '"kvm"')], "pair[0].engine", "is 'kvm'", '"libxl-colo" or "libxl-live" or "libxl-remus" or "qemu" or "model"'),
        ([('"libxl-colo"', '"qemu"')], "pair[0].qemu", "is missing", "needs it"),
        ([('"libxl-colo"', '"qemu"')], "pair[0].nic[1].standby_vif", "is missing", "a second tap"),
        ([('"libxl-colo"', '"libxl-live"')], "pair[0].libxl_live", "is missing", "needs it"),
        ([('"libxl-colo"', '"libxl-live"')], "pair[0].nic[1].standby_vif", "is missing", "a second port"),
        ([('"libxl-colo"', '"libxl-live"')], "pair[0].nic[1].bridge", "is missing", "where its ports belong"),
        ([('"libxl-colo"', '"libxl-live"'), ('"vif1.1"', '"a-name-of-14.1"')], "pair[0].nic[1].vif", "is a-name-of-14.1", "13 characters at most"),
        ([('"libxl-colo"', '"libxl-live"'), LIVE], "pair[0].commit_timeout_ms", "is 10000", "copy_timeout_s, which is 120 s"),
        ([('"libxl-colo"', '"libxl-live"'), (LIVE[0], LIVE[1].replace("7790", "7788"))], "pair[0].libxl_live.listen", "as peer.listen is", "port of its own"),
        ([("192.0.2.1:7788", "host-a:7788")], "peer.listen", "'host-a' is no IP address", "192.0.2.1:7788"),
        ([("192.0.2.1:7788", "192.0.2.1")], "peer.listen", "no port", "192.0.2.1:7788"),
        ([("192.0.2.1:7788", "192.0.2.1:0")], "peer.listen", "no port from 1", "192.0.2.1:7788"),
        ([("192.0.2.1:7788", "2001:db8::1:7788")], "peer.listen", "in brackets", "[2001:db8::1]:7788"),
        ([('vif = "vif1.1"', 'vif = "a-name-too-long.1"')], "pair[0].nic[1].vif", "too-long", "1 to 15 characters"),
        ([("02:C0:10:00:00:01", "01:00:5e:00:00:01")], "pair[0].nic[0].mac", "no NIC can have", "02:c0"),
        ([("02:C0:10:00:00:01", "00:00:00:00:00:00")], "pair[0].nic[0].mac", "no NIC can have", "02:c0"),
        ([("02:C0:10:00:00:01", "02:C0:10")], "pair[0].nic[0].mac", "is '02:C0:10'", "02:c0"),
        ([("guest_port = 123", 'remote = "10.0.0.1/8"')], "pair[0].exempt[0].remote", "host bits set", "10.0.0.0/8"),
        ([('protocol = "udp"', 'protocol = "ntp"')], "pair[0].exempt[0].protocol", "is 'ntp'", "udp"),
        ([('protocol = "udp"', "protocol = 256")], "pair[0].exempt[0].protocol", "is 256", "0 to 255"),
        ([("http://127.0.0.1", "etcd://127.0.0.1")], "arbiter.etcd.endpoints", "etcd://", "URLs"),
        ([('["http://127.0.0.1:2379/", "http://127.0.0.2:2379"]', "[]")], "arbiter.etcd.endpoints", "is empty", "URLs"),
        ([('name = "a"', 'name = "a"\ncontrol_socket = "run"')], "host.control_socket", "is 'run'", "absolute path"),
        ([('name = "a"', f'name = "a"\ncontrol_socket = "/{"x" * 107}"')], "host.control_socket", "108 bytes", "107"),
        # keys and tables
        ([("number = 0", "number = 0\ninterval_mim_ms = 5")], "pair[0].interval_mim_ms", "is no key", 'did you mean "interval_min_ms"?'),
        ([("[host]", "hosts = 1\n[host]")], "hosts", "is no key", 'did you mean "host"?'),
        ([("[host]", "zzz = 1\n[host]")], "zzz", "is no key", "known here: host, peer, arbiter, pair"),
        ([("  [pair.libxl_colo]", "  [[pair.libxl_colo]]")], "pair[0].libxl_colo", "is no table", "[pair.libxl_colo]"),
        ([("  [[pair.exempt]]", "  [pair.exempt]")], "pair[0].exempt", "is no row of tables", "[[pair.exempt]]"),
        ([("  [pair.libxl_colo]", "  [pair.model_]"), ("listen = \"127.0.0.1:9000\"\n  domain = \"web\"", "")], "pair[0].libxl_colo", "is missing", "needs it"),
        ([("  [[pair.nic]]\n  number = 2\n  vif = \"vif2.0\"\n  fwd = \"fwd1\"\n", "")], "pair[1].nic", "is missing", "[[pair.nic]]"),
        ([("[host]", "= 1\n[host]")], "", "is no TOML", "line 1"),
        # one with another
        ([("number = 1\nrole", "number = 0\nrole")], "pair[1].number", "is 0, as pair[0].number is", "its own"),
        ([('name = "mail"', 'name = "web"')], "pair[1].name", "is web, as pair[0].name is", "its own"),
        ([("  number = 2", "  number = 1")], "pair[1].nic[0].number", "is 1, as pair[0].nic[1].number is", "whole host"),
        ([("vif2.0", "vif1.0")], "pair[1].nic[0].vif", "as pair[0].nic[0].vif is", "one NIC's"),
        ([("vif2.0", "fwd0")], "pair[1].nic[0].vif", "is fwd0, as pair[0].nic[0].fwd is", "no other use"),
        ([("vlan = 8", "vlan = 7")], "pair[0].nic[1].vlan", "is 7, as pair[0].nic[0].vlan is", "different"),
        ([("  vlan = 8\n", "")], "pair[0].nic[1].vlan", "is 0 while pair[0].nic[0] is on fwd0 too", "VLAN ids"),
        ([("fwd1", "fwd0")], "pair[1].nic[0].vlan", "is 0 while pair[0].nic[0] is on fwd0 too", "VLAN ids"),
        ([("vlan = 8", 'vlan = 8\nmac = "02:c0:10:00:00:01"')], "pair[0].nic[1].mac", "as pair[0].nic[0].mac is", "its own"),
        ([("number = 0", "number = 0\ninterval_min_ms = 4000\nperiodic_interval_ms = 4000\nstorm_window_ms = 80000\ncalm_ms = 80000")], "pair[0].interval_min_ms", "is 4000", "below interval_max_ms, which is 4000"),
        ([("number = 0", "number = 0\ncompare_timeout_ms = 4000")], "pair[0].compare_timeout_ms", "is 4000", "below interval_max_ms"),
        ([("number = 0", "number = 0\nperiodic_interval_ms = 10")], "pair[0].interval_min_ms", "is 20", "at most periodic_interval_ms, which is 10"),
        ([("number = 0", "number = 0\nperiodic_interval_ms = 4001")], "pair[0].periodic_interval_ms", "is 4001", "at most interval_max_ms"),
        ([("number = 0", "number = 0\ncalm_ms = 1999")], "pair[0].storm_window_ms", "is 2000", "at most calm_ms, which is 1999"),
        ([("number = 0", "number = 0\ninterval_max_ms = 5000")], "pair[0].interval_max_ms", "is 5000", "libxl checkpoints by itself"),
        ([("number = 0", "number = 0\nstorm_count = 101")], "pair[0].storm_window_ms", "is 2000", "which is 2020"),
        ([("number = 0", 'number = 0\non_service_loss = "open"')], "pair[0].on_service_loss", "is open", '"hold" with an arbiter'),
        ([("127.0.0.1:9000", "192.0.2.1:9000")], "pair[0].libxl_colo.listen", "is 192.0.2.1:9000", "loopback"),
        ([("127.0.0.1:9000", "[::1]:9000")], "pair[0].libxl_colo.listen", "is [::1]:9000", "IPv4"),
        ([("127.0.0.1:9000", "127.0.0.1:9877")], "pair[0].libxl_colo.listen", "as host.metrics_listen is", "port of its own"),
        ([("  nic = 1", "  nic = 2")], "pair[0].exempt[0].nic", "is 2", "one of this pair's NICs: 0, 1"),
        ([('[arbiter.command]\nfence = ["/usr/sbin/fence", "b"]\n', "")], "arbiter.command", "is missing", 'pair[0].arbiter = "command" needs it'),
        ([('"command"', '"etcd"')], "pair[0].arbiter", "is etcd", "only an end of that host ends libxl there"),
        ([('[peer]\nname = "b"\nlisten = "192.0.2.1:7788"\nconnect = "192.0.2.2:7788"\n', "")], "peer", "is missing", "two hosts"),
        ([('name = "b"', 'name = "a"')], "peer.name", "is a, as host.name is", "different names"),
        ([("192.0.2.2:7788", "192.0.2.1:7788")], "peer.connect", "as peer.listen is", "other host's"),
        ([('name = "b"', 'name = "b"\nheartbeat_timeout_ms = 100')], "peer.heartbeat_timeout_ms", "is 100", "above 2 * heartbeat_interval_ms, which is 100"),
        ([("[arbiter.etcd]", "[arbiter.etcd]\nlease_s = 1")], "arbiter.etcd.lease_s", "is 1", "3 * arbiter.etcd.request_timeout_ms: 1500 ms"),
        ([("http://", "https://")], "arbiter.etcd.endpoints", "are of http and https", "one of them"),
        ([("http://", "https://"), (', "http://', ', "https://')], "arbiter.etcd.ca", "is missing", "name the authority"),
        ([("[arbiter.etcd]", '[arbiter.etcd]\nca = "/ca.pem"')], "arbiter.etcd.endpoints", "are of http", "must be of https"),
        ([("[arbiter.etcd]", '[arbiter.etcd]\nuser = "lock"')], "arbiter.etcd.password_file", "is missing", "goes with arbiter.etcd.user"),
        ([("[arbiter.etcd]", '[arbiter.etcd]\npassword_file = "/p"')], "arbiter.etcd.user", "is missing", "goes with"),
        ([('name = "b"', 'name = "b"\nheartbeat_timeout_ms = 2001')], "arbiter.etcd.lease_s", "is 2", "peer.heartbeat_timeout_ms: 2001 ms"),
    ],
)  # fmt: skip
def test_a_mistake(edits: list[tuple[str, str]], key: str, wrong: str, right: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse(edited(*edits), FILE)
    found = [mistake for mistake in caught.value.mistakes if mistake.key == key]
    assert len(found) == 1, caught.value
    assert wrong in found[0].wrong
    assert right in found[0].right or right in found[0].wrong
    assert found[0].file == FILE


def test_the_limits_themselves_are_no_mistakes() -> None:
    parse(
        edited(
            ("number = 0", "number = 63\ninterval_max_ms = 4999\nstorm_count = 100\ncalm_ms = 2000\ninterval_min_ms = 20\nperiodic_interval_ms = 20"),
            ('name = "b"', 'name = "b"\nheartbeat_timeout_ms = 101'),
            ("number = 1\nrole", "number = 1\ninterval_max_ms = 60000\nrole"),  # no libxl there
        ),
        FILE,
    )  # fmt: skip


def test_all_mistakes_are_told_at_once() -> None:
    text = edited(
        ("number = 0", "number = -1"), ("vlan = 8", "vlan = 4095"), ('name = "a"', "name = 5"), ("fwd1", "a b")
    )
    with pytest.raises(ConfigErrors) as caught:
        parse(text, FILE)
    keys = [mistake.key for mistake in caught.value.mistakes]
    assert keys == ["host.name", "pair[0].number", "pair[0].nic[1].vlan", "pair[1].nic[0].fwd"]
    assert str(caught.value).splitlines()[1].startswith(f"{FILE}: pair[0].number is -1: must be a whole number")


def test_what_depends_on_a_wrong_table_is_not_told_as_missing() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parse(edited(("192.0.2.1:7788", "nowhere"), ("127.0.0.1:9000", "nowhere"), ("http:", "ftp:")), FILE)
    assert [m.key for m in caught.value.mistakes] == [
        "peer.listen",
        "arbiter.etcd.endpoints",
        "pair[0].libxl_colo.listen",
    ]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match="No such file"):
        load(tmp_path / "none.toml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigErrors, match="UTF-8"):
        load(tmp_path / "x.toml")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(TEXT)
    assert load(tmp_path / "x.toml") == replace(parse(TEXT, FILE), path=tmp_path / "x.toml")


def test_the_example_validates_with_its_defaults_written_out_or_not() -> None:
    apart = re.sub(r"(?m)^#\[\[pair.libxl_colo.disk\]\]\n(.+\n)+", "", example())  # goes with a stream_listen alone
    assert "#image" in example()
    assert "#image" not in apart
    whole = re.sub(r"(?m)^#(?=\w+ = )", "", apart)
    assert whole != example()
    assert parse(whole, FILE) == parse(example(), FILE)


# ---- reload --------------------------------------------------------------------------------------------------------


def config(*edits: tuple[str, str]) -> Config:
    return parse(edited(*edits), FILE)


def test_the_same_file_changes_nothing() -> None:
    assert diff(config(), config()) == Reload(unchanged=config().pairs)


@pytest.mark.parametrize(
    ("edit", "keys", "restart"),
    [
        (("number = 0", "number = 0\ninterval_max_ms = 3000\nstorm_count = 9"), ("interval_max_ms", "storm_count"), False),
        (("  guest_port = 123", "  guest_port = 124"), ("exempt",), False),
        (("vlan = 8", 'vlan = 8\narp = "drop"'), ("nic[1].arp",), False),
        (("number = 0", "number = 5"), ("number",), True),
        (("vlan = 8", "vlan = 9\nnd = \"drop\""), ("nic[1].vlan", "nic[1].nd"), True),
        (("  [[pair.nic]]\n  number = 1\n  vif = \"vif1.1\"\n  fwd = \"fwd0\"\n  vlan = 8\n  [[pair.exempt]]\n  protocol = \"udp\"\n  guest_port = 123\n  nic = 1\n", ""), ("nic", "exempt"), True),
        (("127.0.0.1:9000", "127.0.0.1:9001"), ("libxl_colo.listen",), True),
    ],
)  # fmt: skip
def test_a_changed_pair(edit: tuple[str, str], keys: tuple[str, ...], restart: bool) -> None:
    got = diff(config(), config(edit))
    assert [(c.new.name, c.keys, c.restart) for c in got.changed] == [("web", keys, restart)]
    assert [pair.name for pair in got.unchanged] == ["mail"]


def test_pairs_that_come_and_go() -> None:
    got = diff(config(), config(('name = "mail"', 'name = "news"')))
    assert ([p.name for p in got.added], [p.name for p in got.removed]) == (["news"], ["mail"])


@pytest.mark.parametrize(
    ("edit", "service", "live"),
    [
        (('name = "a"', 'name = "a"\nlog_level = "debug"'), (), ("host.log_level",)),
        (('name = "a"', 'name = "a2"'), ("host.name",), ()),
        (("192.0.2.2:7788", "192.0.2.3:7788"), ("peer.connect",), ()),
        (('["/usr/sbin/fence", "b"]\n[arbiter.etcd]\nendpoints = ["http://127.0.0.1:2379/", "http://127.0.0.2:2379"]', '["x"]'), ("arbiter.etcd", "arbiter.command.fence"), ()),
        (("[arbiter.etcd]", "[arbiter.etcd]\nlease_s = 3"), ("arbiter.etcd.lease_s",), ()),
    ],
)  # fmt: skip
def test_changes_outside_the_pairs(edit: tuple[str, str], service: tuple[str, ...], live: tuple[str, ...]) -> None:
    got = diff(config(), config(edit))
    assert (got.service_keys, got.live_keys) == (service, live)
    assert len(got.unchanged) == 2
