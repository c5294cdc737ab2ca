"""An etcd that wants TLS, a certificate, and a user: a real one."""

from __future__ import annotations

import asyncio
import base64
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import requests

from coloebpf.errors import ArbiterError
from coloebpf.model import Role
from coloebpf.service.arbiters.base import Grant, Refusal
from coloebpf.service.arbiters.etcd import EtcdArbiter
from coloebpf.service.arbiters.etcd_access import TokenAuth
from coloebpf.service.config import EtcdConfig
from coloebpf.service.peer.pki import init_pki
from tests.service import etcds

PASSWORD = "correct horse"


@dataclass(frozen=True)
class Pair:
    name: str
    role: Role = Role.PRIMARY


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdConfig]:
    """Of an etcd in which user `lock` may read and write below /guarded/, and nobody else anything."""
    home = tmp_path_factory.mktemp("etcd")
    pki = home / "pki"
    init_pki(pki, ("localhost",))
    _nameless(pki)
    tls = ("--cert-file", f"{pki}/localhost.pem", "--key-file", f"{pki}/localhost.key", "--client-cert-auth")
    members = etcds.cluster(home, 1, tls=(*tls, "--trusted-ca-file", f"{pki}/ca.pem", "--auth-token-ttl", "1"))
    (home / "password").write_text(f"{PASSWORD}\n")
    try:
        _guard(members[0].url, pki)
        yield EtcdConfig(
            endpoints=(members[0].url,), lease_s=2, request_timeout_ms=2000, prefix="guarded", ca=pki / "ca.pem",
            certificate=pki / "client.pem", key=pki / "client.key", user="lock", password_file=home / "password",
        )  # fmt: skip
    finally:
        etcds.end(members)


def _nameless(pki: Path) -> None:
    """A certificate without a CommonName: others etcd's gateway does not let in, once there are users."""
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{pki}/client.key")
    asks = ("openssl", "req", "-new", *key, "-subj", "/O=coloebpf")
    signs = ("openssl", "x509", "-req", "-CA", f"{pki}/ca.pem", "-CAkey", f"{pki}/ca.key", "-set_serial", "7")
    request = subprocess.run(asks, check=True, capture_output=True)
    certificate = subprocess.run(signs, check=True, capture_output=True, input=request.stdout)
    (pki / "client.pem").write_bytes(certificate.stdout)


def _guard(url: str, pki: Path) -> None:
    def post(path: str, **what: object) -> None:
        files = {"verify": f"{pki}/ca.pem", "cert": (f"{pki}/client.pem", f"{pki}/client.key")}
        answer = requests.post(f"{url}/v3/auth/{path}", json=what, timeout=10, **files)  # type: ignore[arg-type]
        assert answer.ok, f"{path}: {answer.text}"

    def b64(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    for user, password in (("root", "root's"), ("lock", PASSWORD)):
        post("user/add", name=user, password=password)
        post("role/add", name=user)
        post("user/grant", user=user, role=user)
    post(
        "role/grant",
        name="lock",
        perm={"permType": "READWRITE", "key": b64("/guarded/"), "range_end": b64("/guarded0")},
    )
    post("enable")


def ask(config: EtcdConfig, host: str = "a", pair: str = "web") -> Grant | Refusal:
    async def work() -> Grant | Refusal:
        arbiter = EtcdArbiter(config, host, time.monotonic_ns)
        try:
            await arbiter.check()
            if host == "a":
                await arbiter.begin(Pair(pair))
            return await arbiter.acquire(Pair(pair))
        finally:
            await arbiter.close()

    return asyncio.run(work())


def test_with_certificate_and_user_the_decision_is_as_ever(config: EtcdConfig) -> None:
    assert isinstance(ask(config), Grant)
    assert isinstance(ask(config, "b"), Refusal)


def test_a_token_that_has_ended_is_replaced(config: EtcdConfig) -> None:
    async def work() -> None:
        arbiter = EtcdArbiter(config, "a", time.monotonic_ns)
        await arbiter.begin(Pair("later"))
        (auth,) = (member.session.auth for member in arbiter._members)
        assert isinstance(auth, TokenAuth)
        before = auth._token
        await asyncio.sleep(3)  # etcd forgets it after a second
        begin = time.monotonic()
        assert isinstance(await arbiter.acquire(Pair("later")), Grant)
        print(f"with a new token: {time.monotonic() - begin:.3f} s")
        assert auth._token != before
        await arbiter.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"user": "", "password_file": None}, "user name is empty"),
        ({"password_file": Path("/nonexistent")}, "No such file"),
        ({"user": "nobody"}, "authentication failed"),
        ({"certificate": None, "key": None}, "ertificate"),
        ({"ca": Path("/etc/ssl/certs/ca-certificates.crt")}, "local issuer certificate"),
        ({"prefix": "others"}, "permission denied"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_who_is_not_let_in_says_why(config: EtcdConfig, changes: dict[str, object], why: str) -> None:
    with pytest.raises(ArbiterError, match=why):
        ask(replace(config, **changes))  # type: ignore[arg-type]
