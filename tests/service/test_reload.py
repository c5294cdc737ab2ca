"""A reload that fails in the middle: what is served then, and what the next one does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from coloebpf.errors import ServiceError
from coloebpf.model import State
from coloebpf.service.assemble import Service
from coloebpf.service.config import Config, PairConfig
from coloebpf.service.daemon import Daemon
from coloebpf.service.fdstore import Notifier
from coloebpf.service.hooks import LOADING
from coloebpf.service.reload import LEFT, apply
from tests.service.test_config import config


class Hooks:
    """`loaded`: as after a start; `broken`: attach() fails for the pair of that name; `stuck`: detach() does.

    `attached`: names of the pairs whose NICs have programs.
    """

    loaded, broken, stuck = True, "", ""

    def __init__(self) -> None:
        self.attached: set[str] = set()

    def check_loaded(self) -> None:
        if not self.loaded:
            raise ServiceError(LOADING)

    async def attach(self, pair: PairConfig) -> None:
        self.check_loaded()
        if pair.name == self.broken:
            raise ServiceError(f"no vif of {pair.name}")
        self.attached.add(pair.name)

    async def detach(self, pair: PairConfig) -> None:
        self.check_loaded()
        self._take_off(pair.name)

    async def detach_others(self, pairs: Iterable[PairConfig]) -> list[str]:
        for name in self.attached - {pair.name for pair in pairs}:
            self._take_off(name)
        return []

    def _take_off(self, name: str) -> None:
        if name == self.stuck:
            raise ServiceError(f"{name} is stuck")
        self.attached.discard(name)

    def set_timeouts(self, pairs: object) -> None: ...


class Running:
    """What a reload needs of a service; all of its pairs are unprotected."""

    def __init__(self, config: Config) -> None:
        self.config, self.hooks, self.link = config, Hooks(), None
        self.troubles: dict[str, str] = {}
        self.pairs: dict[int, SimpleNamespace] = {}
        self.watched: list[str] = []
        for pair in config.pairs:
            self._serve(pair)
            self.hooks.attached.add(pair.name)

    def _serve(self, pair: PairConfig) -> None:
        machine = SimpleNamespace(state=State.UNPROTECTED)
        self.pairs[pair.number] = SimpleNamespace(config=pair, machine=machine)

    def all(self) -> list[SimpleNamespace]:
        return [self.pairs[number] for number in sorted(self.pairs)]

    def renew_certificates(self) -> None: ...

    def watch(self) -> None:
        self.watched = self.names

    async def add(self, pair: PairConfig) -> None:
        self._serve(pair)

    async def drop(self, number: int) -> None:
        del self.pairs[number]

    @property
    def names(self) -> list[str]:
        return [pair.config.name for pair in self.all()]


@pytest.fixture
def service() -> Running:
    return Running(config())


def reload(service: Running, new: Config) -> None:
    asyncio.run(apply(cast(Service, service), new))


NEWS = ('name = "mail"', 'name = "news"')


def test_a_reload_that_fails_in_the_middle_is_done_again_by_the_next(service: Running) -> None:
    service.hooks.broken = "news"
    for _ in range(2):
        with pytest.raises(ServiceError, match="no vif of news"):
            reload(service, config(NEWS))
        assert service.names == ["web"]
        assert [pair.name for pair in service.config.pairs] == ["web"], "what is served, and no more"
        assert service.watched == ["web"]
    service.hooks.broken = ""
    reload(service, config(NEWS))
    assert service.names == service.watched == ["web", "news"]
    assert service.config.pairs == config(NEWS).pairs


def test_a_pair_that_can_not_be_detached_is_served_no_more_and_detached_by_the_next_reload(service: Running) -> None:
    service.hooks.stuck = "mail"
    for _ in range(2):
        reload(service, config(NEWS))
        assert service.names == service.watched == ["web", "news"]
        assert [pair.name for pair in service.config.pairs] == ["web", "news"]
        assert service.hooks.attached == {"web", "news", "mail"}
        assert "mail is stuck" in service.troubles[LEFT]
    service.hooks.stuck = ""
    reload(service, config(NEWS))
    assert service.hooks.attached == {"web", "news"}
    assert service.troubles == {}


def test_a_pair_that_comes_back_is_not_taken_off_as_a_left_one(service: Running) -> None:
    service.hooks.stuck = "mail"
    reload(service, config(NEWS))
    service.hooks.stuck = ""
    reload(service, config())
    assert service.names == ["web", "mail"]
    assert service.hooks.attached == {"web", "mail"}
    assert service.troubles == {}


def test_nothing_is_ended_before_the_dataplane_is_loaded(service: Running) -> None:
    service.hooks.loaded = False
    with pytest.raises(ServiceError, match="being loaded"):
        reload(service, config(NEWS))
    assert service.names == ["web", "mail"]


def test_an_arbiter_that_is_new_wants_a_restart(service: Running) -> None:
    """Nothing is taken off for it."""
    service.config = replace(service.config, arbiter=replace(service.config.arbiter, command=None))
    web, news = config(NEWS).pairs
    with pytest.raises(ServiceError, match=r"pair news names \[arbiter\.command\], which is new.*restart coloebpf"):
        reload(service, replace(config(NEWS), pairs=(web, replace(news, arbiter="command"))))
    assert service.names == ["web", "mail"]
    assert service.hooks.attached == {"web", "mail"}


@pytest.mark.parametrize(
    ("broken", "error", "says"),
    [
        ("news", ServiceError("no vif"), "was not applied as a whole; served are: web; no vif"),
        ("", ServiceError("no vif"), "was refused, what was before stays: no vif"),
        ("", ZeroDivisionError("a fault"), "was refused, what was before stays: a fault"),
    ],
)
def test_whatever_went_wrong_is_told(
    service: Running, broken: str, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(of: Running, new: Config) -> None:
        if broken:
            of.config = replace(new, pairs=new.pairs[:1])
        raise error

    monkeypatch.setattr("coloebpf.service.daemon.apply", fails)
    monkeypatch.setattr("coloebpf.service.daemon.configuration.load", lambda path: config(NEWS))

    async def run() -> None:
        await Daemon(cast(Service, service), Notifier())._reload()

    asyncio.run(run())
    assert service.troubles == {"reload": f"the changed {Path('/etc/coloebpf/coloebpf.toml')} {says}"}
