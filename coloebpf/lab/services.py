"""The lab's two services: `coloebpf run`, one in each host's network namespace, as on real hosts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from coloebpf import tuning
from coloebpf.detaching import detach
from coloebpf.errors import LabError, NoServiceError, ServiceError
from coloebpf.lab import etcd, hosts, machine
from coloebpf.lab.plan import HOSTS, MANAGEMENT, PAIR, LabPlan
from coloebpf.model import Sizes
from coloebpf.netns import inside
from coloebpf.service.commands import client
from coloebpf.service.peer import pki

PAIR_NAME = "guest"
PORT = 7788  # of the services' link
COPY_PORT = 7790  # where the guest's memory is taken
START_TIMEOUT = 120.0  # seconds; two compiles on a busy machine
NICENESS = -10  # as the systemd unit has it
LOG = "service.log"


Running = dict[str, subprocess.Popen[bytes]]  # the services, by host


def bring_up(plan: LabPlan, protected: bool = True) -> Running:
    """Start both services and, if it is to be `protected`, put the pair in lock-step."""
    # The number is the machine's, and a lab's namespace doesn't show it.
    tuning.raise_backlog(2 * Sizes.of_mtu(plan.mtu).slots, first="/proc/thread-self/ns/net")
    pki.init_pki(plan.run_dir / "pki", HOSTS)
    if plan.arbiter == "etcd":
        etcd.start(plan)
    running = {}
    booting = machine.start(plan) if plan.virtual else None
    for host in HOSTS:
        _make_switch(plan, host)
        configure(plan, host)
        running[host] = start(plan, host)
    if booting:
        machine.wait(plan, booting)
    ready(plan, running)
    if protected:
        protect(plan, running)
    return running


def ready(plan: LabPlan, running: Running) -> None:
    """Returns when both services have found each other."""
    for host, process in running.items():
        _wait(plan, host, process, _ready)


def protect(plan: LabPlan, running: Running, primary: str = HOSTS[0]) -> None:
    """Begin lock-step as soon as both services have found each other."""
    ready(plan, running)
    client_of(plan, primary, "protect", client.ORDER_S, pair=PAIR_NAME)
    secondary = other(primary)
    _wait(plan, secondary, running[secondary], lambda service: service["pairs"][0]["state"] == "lockstep")


def other(host: str) -> str:
    """The host that `host` is wired to."""
    return HOSTS[1 - HOSTS.index(host)]


def engine_socket(plan: LabPlan, host: str) -> Path:
    """Where a host's model engine takes commands."""
    return directory(plan, host) / "engine.sock"


def tell_engine(plan: LabPlan, **command: Any) -> dict[str, Any]:
    """A command for the primary's model engine (engines/model.py); returns its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(client.ANSWER_S)
        connection.connect(str(engine_socket(plan, "primary")))
        connection.sendall(json.dumps(command).encode() + b"\n")
        answer: dict[str, Any] = json.loads(connection.makefile().readline())
    if not answer["ok"]:
        raise LabError(f"the model engine refuses {command}: {answer['error']}")
    return answer


def directory(plan: LabPlan, host: str) -> Path:
    """Where a service has its files: configuration, log, sockets."""
    return plan.run_dir / host


def configure(
    plan: LabPlan,
    host: str,
    changes: str = "",
    peer_changes: str = "",
    pair_changes: str = "",
    primary: str = HOSTS[0],
    copy_ms: int = 0,
) -> Path:
    """Write a host's configuration; returns its path. Keys added by the caller must be none of those here.

    `primary`: the host that has the guest.
    `copy_ms`: what a checkpoint of guests that are processes takes. Nothing is copied, so the SVM has to say by itself
    what a commit releases, and that is the time it has for it. What it says of later requests meanwhile is lost, where
    a copied VM would say it again, and costs a retransmission.
    """
    home, peer = directory(plan, host), other(host)
    home.mkdir(exist_ok=True)
    pki_dir = plan.run_dir / "pki"
    lines = [
        *("[host]", f'name = "{host}"', f'control_socket = "{home}/control.sock"', f'pins = "{plan.pin_dir(host)}"'),
        *(f"mtu = {plan.mtu}", changes),
        *("[peer]", f'name = "{peer}"', f'listen = "{MANAGEMENT[host]}:{PORT}"'),
        *(f'connect = "{MANAGEMENT[peer]}:{PORT}"', f'ca = "{pki_dir}/ca.pem"'),
        *(f'certificate = "{pki_dir}/{host}.pem"', f'key = "{pki_dir}/{host}.key"'),
        *(
            f"heartbeat_interval_ms = {min(50, plan.peer_timeout_ms // 4)}",
            f"heartbeat_timeout_ms = {plan.peer_timeout_ms}",
        ),
        peer_changes,
    ]
    if plan.arbiter == "command":
        lines += ["[arbiter.command]", f'fence = ["{switch_of(plan, peer)}"]']
    elif plan.arbiter == "etcd":
        lines += ["[arbiter.etcd]", f'endpoints = ["{etcd.URL}"]']
    lines += [
        *("[[pair]]", f'name = "{PAIR_NAME}"', f"number = {PAIR}"),
        *(f'role = "{"primary" if host == primary else "secondary"}"', f'arbiter = "{plan.arbiter}"', pair_changes),
        *(_qemu(plan, host) if plan.virtual else _model(plan, host, copy_ms)),
    ]
    for nic in plan.nic_list():
        lines += [
            *("[[pair.nic]]", f"number = {nic.nic}", f'vif = "{nic.vif}"', f'fwd = "{nic.fwd}"', f"vlan = {nic.vlan}"),
            *(f'mac = "{nic.mac}"', 'bridge = "br0"'),
            *([f'standby_vif = "{nic.standby_vif}"'] if nic.standby_vif else []),
        ]
    path = home / "coloebpf.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _model(plan: LabPlan, host: str, copy_ms: int) -> list[str]:
    lines = ['engine = "model"', "[pair.model]", f'socket = "{engine_socket(plan, host)}"']
    if plan.guests == "process":
        # A process can't be copied: it keeps its connections' numbers, and what it knows.
        lines += ["copies = false", f"commit_delay_ms = {copy_ms}"]
    return lines


def _qemu(plan: LabPlan, host: str) -> list[str]:
    taps = [f"{{tap{number}}}" for number in range(plan.nics)]
    # A machine that the service starts would have its niceness, and take the CPU from the other machine.
    as_others = ["nice", "-n", str(-NICENESS)]
    command = [*as_others, *machine.command(plan, "{qmp}", taps, "{qmp}.console")]
    return [
        'engine = "qemu"',
        "[pair.qemu]",
        f'qmp = "{machine.qmp_socket(plan)}"',
        # A list of strings is the same in JSON and TOML.
        f"command = {json.dumps(command)}",
        f'listen = "{MANAGEMENT[host]}:{COPY_PORT}"',
        f'run_dir = "{directory(plan, host) / "vms"}"',
    ]


def switch_of(plan: LabPlan, host: str) -> Path:
    """The host's power switch, which the other one's arbiter may use."""
    return plan.run_dir / f"switch-off-{host}"


def switch_lock(plan: LabPlan) -> Path:
    """Held by the power switch that is at work: there is one power supply, and it does one thing at a time."""
    return plan.run_dir / "switch.lock"


def _make_switch(plan: LabPlan, host: str) -> None:
    path, namespace = switch_of(plan, host), plan.namespace(host)
    down = "".join(f"link set {device} down\n" for device in plan.devices(host))
    path.write_text(
        "#!/bin/sh\n"
        "# As power loss: the host's processes are gone, its devices down. A shell, for a takeover waits for it.\n"
        "# Its processes first: one that saw its links go would switch off the other host, before its own end.\n"
        f"set -e\nexec 9>{switch_lock(plan)}\nflock 9\n"
        f"pids=$(ip netns pids {namespace})\n"
        'while [ -n "$pids" ]; do\n    kill -9 $pids 2>&- || :\n'
        f"    pids=$(ip netns pids {namespace})\ndone\n"
        f"ip -n {namespace} -batch - <<END\n{down}END\n"
    )
    path.chmod(0o700)


def switch_off(plan: LabPlan, host: str) -> None:
    """What a power failure does to a host."""
    subprocess.run([switch_of(plan, host)], check=True)


def power_on(plan: LabPlan, host: str) -> None:
    """A boot after switch_off(): the devices are there again, and nothing is loaded."""
    with inside(plan.namespace(host)):
        detach(plan.pin_dir(host))
    lines = "".join(f"link set {device} up\n" for device in plan.devices(host))
    subprocess.run(["ip", "-n", plan.namespace(host), "-batch", "-"], input=lines, text=True, check=True)


def protect_again(plan: LabPlan, running: Running, survivor: str) -> None:
    """After a failover: the roles are exchanged, the host that was lost takes part again."""
    running[survivor].terminate()
    running[survivor].wait()
    for host in (survivor, other(survivor)):
        configure(plan, host, primary=survivor)
        running[host] = start(plan, host)
    protect(plan, running, survivor)


def start(plan: LabPlan, host: str, environ: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Run a host's service with the configuration that is there. `environ`: more variables for it."""
    home = directory(plan, host)
    with inside(plan.namespace(host)), open(home / LOG, "ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "coloebpf", "run", "--config", str(home / "coloebpf.toml")],
            # It may not be installed.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    with suppress(OSError):  # where that is not allowed it is slower to answer, no more
        os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
    return process


def client_of(plan: LabPlan, host: str, command: str, timeout_s: float = client.ANSWER_S, **arguments: str) -> Any:
    """One request to a host's service. Raises NoServiceError if there is none, ServiceError with its own words."""
    with client.connected(directory(plan, host) / "control.sock") as service:
        return service.ask(command, timeout_s, **arguments)


def service_status(plan: LabPlan, host: str) -> dict[str, Any] | None:
    """What a service says of itself; None if there is none."""
    with suppress(NoServiceError):
        found: dict[str, Any] = client_of(plan, host, "status")["service"]
        return found
    return None


def snapshot(plan: LabPlan, host: str) -> dict[str, Any]:
    """Counters and states of one host, by its service, or out of the maps if there is none."""
    with suppress(NoServiceError):
        found: dict[str, Any] | None = client_of(plan, host, "status")["dataplane"]
        if found is not None:
            return found
    return hosts.snapshot(plan, host)


def checkpoint(plan: LabPlan, primary: str = HOSTS[0]) -> dict[str, int]:
    """A checkpoint by the primary's service; returns the new epoch and how many packets were sent."""
    client_of(plan, primary, "checkpoint", client.ORDER_S, pair=PAIR_NAME)
    pair = client_of(plan, primary, "status")["service"]["pairs"][0]
    return {"epoch": pair["epoch"], "flushed": pair["last"]["released"]}


def _ready(service: dict[str, Any]) -> bool:
    return bool(service["pairs"] and service["pairs"][0]["engine_ready"] and service["peer"]["connected"])


def _wait(
    plan: LabPlan, host: str, process: subprocess.Popen[bytes], condition: Callable[[dict[str, Any]], bool]
) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        with suppress(ServiceError):
            if condition(client_of(plan, host, "status")["service"]):
                return
        if process.poll() is not None or time.monotonic() > deadline:
            words = (directory(plan, host) / LOG).read_text(errors="replace").strip().splitlines()
            what = "does not get ready" if process.returncode is None else f"ended with code {process.returncode}"
            raise LabError(f"the {host}'s service {what}: {words[-1] if words else 'it said nothing'}")
        time.sleep(0.05)
