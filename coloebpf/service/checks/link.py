"""The way to the other host, to the arbiter, and to the service on this one."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator

from coloebpf.errors import ArbiterError, NoServiceError
from coloebpf.service import arbiters
from coloebpf.service.checks.finding import OK, WARN, Finding, Host
from coloebpf.service.commands import client
from coloebpf.service.concerns import RENEW_DAYS
from coloebpf.service.config import Config
from coloebpf.service.peer import pki
from coloebpf.service.peer.link import opens

CONNECT_S = 1.0  # hosts of a pair stand side by side


def certificates(host: Host) -> Iterator[Finding]:
    """All that can be wrong with them before a connection is tried."""
    peer = host.known.peer
    if peer is None:
        yield Finding(OK, "no peer is configured")
        return
    identity = pki.Identity(peer.ca, peer.certificate, peer.key)
    for end in identity.check(host.known.host.name, host.now):
        days = end.days_left(host.now)
        if days < RENEW_DAYS:
            yield Finding(
                WARN,
                f"{end.file} ends in {days:.0f} days",
                "coloebpf config init-pki makes new ones; put them on both hosts, then systemctl reload coloebpf",
            )
        else:
            yield Finding(OK, f"{end.file} is good for {days:,.0f} days")


def peer(host: Host) -> Iterator[Finding]:
    """Somebody listens where the other host should. One that only connects refuses, and so has been reached."""
    config = host.known.peer
    if config is None:
        yield Finding(OK, "no peer is configured")
        return
    where = f"{config.name} at {config.connect}"
    listens = opens(host.known.host.name, config.name)
    try:
        socket.create_connection((config.connect.host, config.connect.port), CONNECT_S).close()
    except OSError as error:
        if isinstance(error, ConnectionRefusedError) and not listens:
            yield Finding(OK, f"the host of {where} answers; its service connects to this one, as the names are")
            return
        why = error.strerror or f"no answer in {CONNECT_S:g} s"
        yield Finding(
            WARN,
            f"{where} can't be reached: {why}",
            "start its service; if it runs, look at [peer] listen there, at routes and at packet filters",
        )
    else:
        yield Finding(OK, f"{where} answers")


def arbiter(host: Host) -> Iterator[Finding]:
    """Would answer, if it were asked now. The fencing command is looked for, and not run."""
    kinds = sorted({pair.arbiter for pair in host.known.pairs})
    for kind in kinds:
        if kind == "none":
            yield Finding(OK, "pairs without one: nobody is promoted but by `coloebpf failover`")
            continue
        try:
            asyncio.run(_asked(kind, host.known))
        except ArbiterError as error:
            yield Finding(WARN, f"{kind}: {error}", f"without it a lost host is not survived: look at [arbiter.{kind}]")
        else:
            yield Finding(OK, f"{kind}: {'it answers' if kind == 'etcd' else 'its command is there'}")


async def _asked(kind: str, config: Config) -> None:
    asked = arbiters.make(kind, config.arbiter, config.host.name, time.monotonic_ns)
    try:
        await asked.check()
    finally:
        await asked.close()


def service(host: Host) -> Iterator[Finding]:
    """The service of this host answers."""
    path = host.known.host.control_socket
    try:
        with client.connected(path) as running:
            status = running.ask("status")["service"]
    except NoServiceError as error:
        yield Finding(WARN, "it does not answer", str(error))
        return
    yield Finding(OK, f"{status['version']} answers at {path}")
    for warning in status["warnings"]:
        yield Finding(WARN, f"it warns: {warning}", "coloebpf status has the details")
