"""Certificates: what init-pki makes, and what is said of files that won't do."""

from __future__ import annotations

import datetime as dt
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf.errors import PkiError
from coloebpf.service.peer.pki import HOST_DAYS, Identity, init_pki
from tests.service.peers import expired, identity


def openssl(*arguments: object) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(files: Identity, name: str = "a", now: float | None = None) -> None:
    files.check(name, time.time() if now is None else now)


def test_two_hosts_get_certificates_that_openssl_accepts(tmp_path: Path) -> None:
    made = init_pki(tmp_path / "new", ("a", "b"))
    assert {path.name for path in made} == {"ca.pem", "ca.key", "a.pem", "a.key", "b.pem", "b.key"}
    for host in "ab":
        own = tmp_path / "new" / f"{host}.pem"
        for purpose in ("sslserver", "sslclient"):
            arguments = ("-x509_strict", "-purpose", purpose, "-CAfile", tmp_path / "new" / "ca.pem")
            assert openssl("verify", *arguments, "-verify_hostname", host, own).strip().endswith("OK")
        text = openssl("x509", "-in", own, "-noout", "-text")
        assert "prime256v1" in text
        assert f"DNS:{host}\n" in text
        check(identity(tmp_path / "new", host), host)


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in init_pki(tmp_path, ("a", "b"))}
    assert {modes[name] for name in ("ca.key", "a.key", "b.key")} == {0o600}
    assert {modes[name] for name in ("ca.pem", "a.pem", "b.pem")} == {0o644}


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    there = tmp_path / "b.key"
    there.write_text("precious")
    with pytest.raises(PkiError, match=r"has b\.key already"):
        init_pki(tmp_path, ("a", "b"))
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "precious"


def test_a_ca_that_is_there_signs(tmp_path: Path) -> None:
    """A third host, or a certificate that was moved away because it ends: the others' stay good beside it."""
    init_pki(tmp_path, ("a", "b"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = init_pki(tmp_path, ("c",))
    assert [path.name for path in made] == ["c.pem", "c.key"]
    (tmp_path / "b.pem").unlink()
    (tmp_path / "b.key").unlink()
    init_pki(tmp_path, ("b",))
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name for name in before if after[name] != before[name]} == {"b.pem", "b.key"}
    for host in ("b", "c"):
        Identity(tmp_path / "ca.pem", tmp_path / f"{host}.pem", tmp_path / f"{host}.key").check(host, time.time())


def test_a_ca_that_can_not_sign(tmp_path: Path) -> None:
    init_pki(tmp_path / "old", ("a",), now=dt.datetime.utcnow() - dt.timedelta(days=3000))
    with pytest.raises(PkiError, match="before a new certificate would"):
        init_pki(tmp_path / "old", ("b",))
    init_pki(tmp_path / "one", ("a",))
    init_pki(tmp_path / "two", ("a",))
    (tmp_path / "one/ca.key").write_bytes((tmp_path / "two/ca.key").read_bytes())
    with pytest.raises(PkiError, match=r"is not the key of ca\.pem"):
        init_pki(tmp_path / "one", ("b",))
    assert not list(tmp_path.glob("*/b.*"))
    (tmp_path / "two/ca.key").unlink()
    with pytest.raises(PkiError, match=r"has ca\.pem already"):
        init_pki(tmp_path / "two", ("b",))


def test_a_link_in_the_way_is_not_followed_and_what_was_begun_is_taken_back(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    directory = tmp_path / "pki"
    directory.mkdir()
    (directory / "b.key").symlink_to(elsewhere)  # dangling: exists() does not see it
    with pytest.raises(PkiError, match="can't write"):
        init_pki(directory, ("a", "b"))
    assert not elsewhere.exists()
    assert [path.name for path in directory.iterdir()] == ["b.key"]


@pytest.mark.parametrize(
    ("hosts", "days", "said"),
    [
        ((), 10, "needs a name of its own"),
        (("a", "a"), 10, "needs a name of its own"),
        (("ca", "b"), 10, "not 'ca'"),
        (("a/../b", "c"), 10, "can't be a certificate's name"),
        (("*", "c"), 10, "can't be a certificate's name"),
        (("a..b", "c"), 10, "can't be a certificate's name"),
        (("a\n", "c"), 10, "can't be a certificate's name"),
        (("192.0.2.1", "c"), 10, "can't be a certificate's name"),
        (("a" * 64, "c"), 10, "can't be a certificate's name"),
        (("a", "b"), 0, "between 1 and"),
        (("a", "b"), 100_000, "between 1 and"),
    ],
)
def test_names_and_days_that_cannot_be(tmp_path: Path, hosts: tuple[str, ...], days: int, said: str) -> None:
    with pytest.raises(PkiError, match=said):
        init_pki(tmp_path / "pki", hosts, days)
    assert not (tmp_path / "pki").exists()


def test_it_says_when_the_files_end(tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"))
    now = time.time()
    left = {expiry.name: expiry.days_left(now) for expiry in identity(tmp_path, "a").check("a", now)}
    assert left["own"] == pytest.approx(HOST_DAYS, abs=0.1)
    assert left["ca"] == pytest.approx(3650, abs=0.1)


def _other_key(directory: Path) -> None:
    (directory / "a.key").write_bytes((directory / "b.key").read_bytes())


def _other_ca(directory: Path) -> None:
    init_pki(directory / "other", ("a", "b"))
    (directory / "ca.pem").write_bytes((directory / "other" / "ca.pem").read_bytes())


def _expired(directory: Path) -> None:
    for file in directory.iterdir():
        file.unlink()
    expired(directory, "a", "b")


def _locked(directory: Path) -> None:
    plain = directory / "a.key"
    openssl("pkcs8", "-topk8", "-in", plain, "-out", directory / "locked", "-passout", "pass:x")
    (directory / "locked").replace(plain)


def _rsa(directory: Path) -> None:
    openssl("genrsa", "-out", directory / "a.key", "2048")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda d: (d / "a.pem").unlink(), r"can't read .*a\.pem: No such file.*init-pki"),
        (lambda d: (d / "ca.pem").unlink(), r"can't read .*ca\.pem"),
        (lambda d: (d / "a.key").unlink(), r"can't read .*a\.key"),
        (lambda d: (d / "a.pem").write_text("-----BEGIN"), r"a\.pem is no certificate"),
        (lambda d: (d / "a.key").write_text("x"), r"a\.key is no unlocked private key"),
        (lambda d: (d / "a.key").chmod(0o644), r"every user \(mode 644\): chmod 600"),
        (_locked, r"no unlocked private key"),
        (_rsa, r"no key on an elliptic curve"),
        (_other_key, r"is not the key of"),
        (_other_ca, r"was not signed by"),
        (_expired, r"a\.pem expired on"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, spoil: Callable[[Path], object], said: str) -> None:
    init_pki(tmp_path, ("a", "b"))
    check(identity(tmp_path, "a"))
    spoil(tmp_path)
    with pytest.raises(PkiError, match=said):
        check(identity(tmp_path, "a"))


def test_a_certificate_of_another_host(tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"))
    with pytest.raises(PkiError, match="is for b, but this host is a"):
        check(identity(tmp_path, "b"))


def test_a_certificate_of_tomorrow(tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"), now=dt.datetime.utcnow() + dt.timedelta(days=1))
    with pytest.raises(PkiError, match="is this host's clock right"):
        check(identity(tmp_path, "a"))


def test_the_ca_ends_too(tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"), days=3650)
    with pytest.raises(PkiError, match=r"ca\.pem expired"):
        check(identity(tmp_path, "a"), now=time.time() + 3651 * 86_400)


def test_tls_says_what_it_cannot_use(tmp_path: Path) -> None:
    init_pki(tmp_path, ("a", "b"))
    _locked(tmp_path)
    with pytest.raises(PkiError, match="locked with a password"):
        identity(tmp_path, "a").server_context()
