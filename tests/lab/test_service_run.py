"""`coloebpf run` as a process: what systemd hears, and what a changed configuration does to a pair in lock-step."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from coloebpf.lab import services
from coloebpf.lab.plan import HOSTS
from coloebpf.service.peer import pki
from tests.lab.conftest import CLI, coloebpf
from tests.lab.service_lab import MANAGEMENT_LINK, ServiceLab, until
from tests.service.fake_systemd import FakeSystemd

pytestmark = [pytest.mark.lab, pytest.mark.real_time]
EXEMPT = '[[pair.exempt]]\nprotocol = "udp"\nguest_port = 123\nnic = 0\n'


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    manager = FakeSystemd(tmp_path)
    yield manager
    manager.close()


def heard(systemd: FakeSystemd, line: str) -> int:
    """How often systemd was told a line."""
    systemd.hear()
    return sum(line in lines for lines in systemd.told)


def reload(lab: ServiceLab, host: str, changes: str = "", pair_changes: str = "", tail: str = "") -> None:
    """Changes the host's file and sends SIGHUP."""
    path = services.configure(lab.plan, host, changes, pair_changes=pair_changes)
    path.write_text(path.read_text() + tail)
    lab.kill(host, signal.SIGHUP)


def test_systemd_hears_of_the_start_of_life_of_a_reload_and_of_the_end(lab: ServiceLab, systemd: FakeSystemd) -> None:
    client = lab.fresh()
    lab.kill("primary")
    lab.start("primary", environ={"NOTIFY_SOCKET": systemd.address, "WATCHDOG_USEC": "200000"})
    until(lambda: heard(systemd, "READY=1") == 1, "it is ready")
    lab.in_lockstep()
    until(lambda: heard(systemd, "WATCHDOG=1") > 3, "it lives")
    assert not heard(systemd, "RELOADING=1")
    lab.kill("primary", signal.SIGHUP)
    until(lambda: heard(systemd, "READY=1") == 2, "it has reloaded")
    assert heard(systemd, "RELOADING=1") == 1
    lab.kill("primary", signal.SIGTERM)
    assert heard(systemd, "STOPPING=1") == 1
    client.goes_on()


def test_a_reload_changes_what_it_can_and_leaves_lockstep_alone(lab: ServiceLab) -> None:
    client = lab.fresh()
    process, since = lab.running["primary"], lab.pair("primary")["state_for_ms"]
    assert not any(row["why"] == "exemption" for row in lab.pair("primary")["uncompared"])
    reload(lab, "primary", pair_changes="interval_max_ms = 60000", tail=EXEMPT)
    until(lambda: "udp of the guest's port 123 with 0.0.0.0/0" in str(lab.pair("primary")), "the exemption is named")
    assert lab.pair("primary")["state"] == "lockstep"
    client.goes_on()
    assert process.poll() is None
    assert lab.pair("primary")["state_for_ms"] > since or lab.pair("primary")["epoch"] > 1
    reload(lab, "primary")
    until(lambda: "udp" not in str(lab.pair("primary")["uncompared"]), "the exemption is gone")


def test_an_invalid_file_is_refused_and_the_old_one_stays(lab: ServiceLab) -> None:
    client = lab.fresh()
    before = len(lab.log("primary"))
    reload(lab, "primary", pair_changes="compare_timeout_ms = 0\nno_such_key = 1")
    until(partial(lab.warns, "primary", "was refused"), "the refusal is a warning")
    said = lab.log("primary")[before:]
    assert "pair[0].compare_timeout_ms is 0" in said
    assert "pair[0].no_such_key is no key" in said
    client.goes_on()
    reload(lab, "primary")
    until(lambda: not lab.warns("primary", "was refused"), "a good file ends the warning")
    lab.in_lockstep()


def test_a_reload_takes_new_certificates(lab: ServiceLab) -> None:
    client = lab.fresh()
    mine = lab.plan.run_dir / "pki" / "primary.pem"
    before, ends = mine.read_bytes(), [one["expires"] for one in lab.status("primary")["certificates"]]
    try:
        mine.write_text("no certificate")
        lab.kill("primary", signal.SIGHUP)
        until(partial(lab.warns, "primary", "was refused"), "a bad one is refused")
        client.goes_on()
        new = lab.plan.run_dir / "pki-new"
        pki.init_pki(new, HOSTS, days=100)
        whole = {path.name: path.read_bytes() for path in new.iterdir()}
        shutil.rmtree(new)
        old = {name: (lab.plan.run_dir / "pki" / name).read_bytes() for name in whole}
        try:
            for name, content in whole.items():
                (lab.plan.run_dir / "pki" / name).write_bytes(content)
            for host in HOSTS:
                lab.kill(host, signal.SIGHUP)
            until(lambda: min(ends) > min(one["expires"] for one in lab.status("primary")["certificates"]), "it is new")
            lab.links("primary", "down", MANAGEMENT_LINK)
            until(lambda: not lab.status("primary")["peer"]["connected"], "the link is down")
            lab.links("primary", "up", MANAGEMENT_LINK)
            lab.in_lockstep()  # by a connection that both new certificates are good for
        finally:
            for name, content in old.items():
                (lab.plan.run_dir / "pki" / name).write_bytes(content)
    finally:
        mine.write_bytes(before)
    client.goes_on()


def test_a_pair_goes_and_comes_by_reloads_but_not_while_it_is_protected(lab: ServiceLab) -> None:
    client = lab.fresh()
    path = services.configure(lab.plan, "primary")
    whole = path.read_text()
    path.write_text(whole.partition("[[pair]]")[0])
    lab.kill("primary", signal.SIGHUP)
    until(partial(lab.warns, "primary", "coloebpf unprotect guest first"), "it is refused")
    client.goes_on()
    services.client_of(lab.plan, "primary", "unprotect", pair=services.PAIR_NAME)
    lab.kill("primary", signal.SIGHUP)
    until(lambda: not lab.status("primary")["pairs"], "the pair is gone")
    client.goes_on()
    assert "coloebpf" not in filters(lab)
    path.write_text(whole)
    lab.kill("primary", signal.SIGHUP)
    until(lambda: lab.pair("primary").get("engine_ready"), "the pair is back")
    until(lambda: lab.status("primary")["peer"]["connected"], "the hosts talk again")
    assert "coloebpf" in filters(lab)
    services.protect(lab.plan, lab.running)
    client.goes_on()


def test_a_pair_that_is_missing_after_a_restart_is_detached_but_not_while_it_is_protected(lab: ServiceLab) -> None:
    client = lab.fresh()
    path = services.configure(lab.plan, "primary")
    whole = path.read_text()
    path.write_text(whole.partition("[[pair]]")[0])
    lab.terminate("primary")
    lab.start("primary")
    until(partial(lab.warns, "primary", "which is lockstep, is not in the file any more"), "it says so")
    assert "coloebpf" in filters(lab)
    client.goes_on()
    lab.terminate("primary")
    path.write_text(whole)
    lab.start("primary")
    lab.in_lockstep()
    assert not lab.warns("primary", "is not in the file")
    services.client_of(lab.plan, "primary", "unprotect", pair=services.PAIR_NAME)
    lab.terminate("primary")
    path.write_text(whole.partition("[[pair]]")[0])
    lab.start("primary")
    until(lambda: "coloebpf" not in filters(lab), "the programs are gone from it")
    client.goes_on()
    assert not lab.warns("primary", "is not in the file")


def test_detach_takes_the_dataplane_away_when_nobody_needs_it(lab: ServiceLab) -> None:
    client = lab.fresh()
    detach = ["lab", "exec", "--name", lab.plan.name, "primary", "--", *CLI, "detach", "--config"]
    detach.append(str(services.directory(lab.plan, "primary") / "coloebpf.toml"))
    assert "the service runs" in coloebpf(*detach).stderr
    lab.kill("primary", signal.SIGTERM)
    assert "guest is lockstep: coloebpf unprotect guest first" in coloebpf(*detach).stderr
    lab.start("primary")
    lab.in_lockstep()
    services.client_of(lab.plan, "primary", "unprotect", pair=services.PAIR_NAME)
    lab.kill("primary", signal.SIGTERM)
    assert coloebpf(*detach).stdout == "the dataplane is gone\n"
    assert "coloebpf" not in filters(lab)
    assert coloebpf(*detach).stdout == "there was no dataplane\n"
    client.goes_on()
    lab.start("primary")
    services.protect(lab.plan, lab.running)
    client.goes_on()


def filters(lab: ServiceLab) -> str:
    """Of the primary's vif."""
    command = ["tc", "-n", lab.plan.namespace("primary"), "filter", "show", "dev", "vif1.0", "ingress"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_second_service_of_a_host_does_not_start(lab: ServiceLab) -> None:
    client = lab.fresh()
    path = services.directory(lab.plan, "primary") / "coloebpf.toml"
    done = subprocess.run(
        [*CLI, "lab", "exec", "--name", lab.plan.name, "primary", "--", *CLI, "run", "--config", str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "another coloebpf service answers" in done.stderr
    client.goes_on()
    lab.in_lockstep()


def test_a_file_that_is_wrong_is_said_whole_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "coloebpf.toml"
    path.write_text('[host]\nname = "a"\nmtu = 5\ncolour = "red"\n')
    done = coloebpf("run", "--config", str(path))
    assert done.returncode == 1
    assert "host.mtu is 5" in done.stderr
    assert "host.colour is no key" in done.stderr


def test_the_lab_and_the_commands_show_what_the_services_say(lab: ServiceLab) -> None:
    lab.fresh()
    status = coloebpf("lab", "status", "--name", lab.plan.name)
    assert "primary's service lockstep; secondary's service lockstep" in status.stdout
    socket = str(services.directory(lab.plan, "primary") / "control.sock")
    text = coloebpf("status", "--socket", socket).stdout
    assert "guest" in text
    assert "lockstep" in text
    epoch = lab.pair("primary")["epoch"]
    assert coloebpf("checkpoint", "guest", "--socket", socket).returncode == 0
    assert lab.pair("primary")["epoch"] > epoch
    refused = coloebpf("checkpoint", "nobody", "--socket", socket)
    assert (refused.returncode, refused.stderr) == (1, "coloebpf: there is no pair 'nobody'; there are: guest\n")
