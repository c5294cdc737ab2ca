"""A changed configuration, applied to a running service: what it does not concern is not touched."""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from dataclasses import replace

from coloebpf.errors import ColoError, ServiceError
from coloebpf.model import State
from coloebpf.service import config_reload
from coloebpf.service.assemble import Service
from coloebpf.service.config import Config, PairConfig
from coloebpf.service.config_reload import PairChange, Reload
from coloebpf.service.engines import making
from coloebpf.service.log import say

log = logging.getLogger("coloebpf.reload")

LEFT = "left"  # of Service.troubles: programs are still on NICs that no pair has any more


async def apply(service: Service, new: Config) -> None:
    """Raises ServiceError, and has changed nothing, if a protected pair would have to go or to begin anew.

    Likewise PkiError if the link's certificates, which it takes anew, are no good. A ColoError of what fails later
    leaves `service.config` with what is served then.

    What only a restart of the service can change stays as it is, and is said. So are programs that can't be taken off a
    pair's NICs: the pair is served no more, and the next reload tries it again.
    """
    change = config_reload.diff(service.config, new)
    anew = [one for one in change.changed if one.restart]
    for pair in (*change.removed, *(one.old for one in anew)):
        _check_idle(service, pair, anew)
    begun = [*change.added, *(one.new for one in anew)]
    _check_arbiters(service.config, begun)
    if begun or change.removed:
        service.hooks.check_loaded()
    service.renew_certificates()
    new = _kept(service.config, new, change)
    if service.troubles.pop(LEFT, ""):
        await _take_off(service, service.hooks.detach_others((*service.config.pairs, *new.pairs)))
    try:
        for pair in change.removed:
            await _end(service, pair)
        for one in anew:
            await _end(service, one.old)
        for one in change.changed:
            if not one.restart:
                await _live(service, one)
        service.config = new
        for pair in begun:
            await service.hooks.attach(pair)
            await service.add(pair)
        service.hooks.set_timeouts(new.pairs)
    finally:
        # Only what is served now, so that the next reload does what this one could not.
        service.config = replace(new, pairs=tuple(pair.config for pair in service.all()))
        service.watch()
        if service.link is not None and (begun or change.removed):
            service.link.begin_anew("the pairs have changed")  # the other side hears of them in a hello
    say(
        log, logging.INFO, "configuration is reloaded", unchanged=len(change.unchanged), changed=len(change.changed),
        added=len(change.added), removed=len(change.removed),
    )  # fmt: skip


def _check_idle(service: Service, pair: PairConfig, anew: list[PairChange]) -> None:
    state = service.pairs[pair.number].machine.state
    if state is State.UNPROTECTED:
        return
    keys = next((", ".join(one.keys) for one in anew if one.old is pair), "")
    what = f"{keys} can't be changed" if keys else "it can't be removed"
    raise ServiceError(f"pair {pair.name} is {state.name.lower()}, so {what}: coloebpf unprotect {pair.name} first")


def _check_arbiters(old: Config, begun: list[PairConfig]) -> None:
    """A reload takes no arbiters: a pair that names one which was not there at the start could not begin."""
    for pair in begun:
        if getattr(old.arbiter, pair.arbiter, old) is None:
            raise ServiceError(
                f"pair {pair.name} names [arbiter.{pair.arbiter}], which is new, and a reload takes no arbiters: "
                "systemctl restart coloebpf"
            )


def _kept(old: Config, new: Config, change: Reload) -> Config:
    """The new file with the old one's sections that a running service can't change."""
    if change.service_keys:
        say(
            log, logging.WARNING, "a reload does not change this: systemctl restart coloebpf",
            keys=", ".join(change.service_keys),
        )  # fmt: skip
    host = replace(old.host, log_level=new.host.log_level)
    return replace(new, host=host, peer=old.peer, arbiter=old.arbiter)


async def _end(service: Service, pair: PairConfig) -> None:
    await service.drop(pair.number)
    service.watch()
    await _take_off(service, service.hooks.detach(pair))


async def _take_off(service: Service, detaching: Awaitable[object]) -> None:
    try:
        await detaching
    except ColoError as e:
        service.troubles[LEFT] = f"programs are left on a NIC that no pair has any more; reload to try it again: {e}"
        say(log, logging.ERROR, "programs could not be taken off a NIC", error=e)


async def _live(service: Service, change: PairChange) -> None:
    new = change.new
    if any(key.startswith("nic") for key in change.keys):
        await service.hooks.attach(new)  # over the running one: policies are in what it writes
    if "exempt" in change.keys:
        service.hooks.exempt(new)
    pair = service.pairs[new.number]
    pair.reconfigure(new)
    making.reconfigure(pair.engine, new)
    say(log, logging.INFO, "pair is changed", pair=new.name, keys=", ".join(change.keys))
