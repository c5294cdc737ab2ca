"""Certificates of the services' link: made here, read here, judged here.

One CA for the two hosts, one certificate a host: EC P-256, its only name the host's, good as server and as client. The
CA's key is needed for nothing but new certificates; it belongs on a machine that is neither host.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import os
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from coloebpf.errors import PkiError

CA_DAYS, HOST_DAYS = 3650, 825  # days; a host's are renewed long before the CA's end
CLOCK_SKEW = dt.timedelta(hours=1)  # a certificate made just now is good on a host whose clock is that much behind
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?"
NAME = re.compile(rf"(?=.{{1,63}}$)(?!_){_LABEL}(\.{_LABEL})*")  # a DNS name, so that TLS can check it
READABLE_BY_ALL = 0o004
NO_SECRET, SECRET = 0o644, 0o600  # file modes


# ---- making ----------------------------------------------------------------------------------------------------------


def init_pki(
    directory: Path, hosts: Sequence[str], days: int = HOST_DAYS, now: dt.datetime | None = None
) -> list[Path]:
    """Makes ca.pem, ca.key, and <host>.pem, <host>.key of each host in `directory`; returns the paths of what it made.

    A CA that is there already signs, and no other is made. All or nothing. Raises PkiError if a name can't be a
    certificate's, a host's file exists already, or the CA there is of no use.
    """
    for host in hosts:
        check_name(host)
    if len(set(hosts)) != len(hosts) or "ca" in hosts or not hosts:
        raise PkiError(f"hosts {', '.join(hosts) or '(none)'}: each needs a name of its own, and not 'ca'")
    if not 1 <= days <= CA_DAYS:
        raise PkiError(f"{days} days: a certificate lasts between 1 and {CA_DAYS} days")
    now = now or dt.datetime.utcnow()
    files: dict[Path, tuple[bytes, int]] = {}
    if (directory / "ca.pem").exists() and (directory / "ca.key").exists():
        ca, ca_key = _authority(directory, now, days)
    else:
        ca_key = ec.generate_private_key(ec.SECP256R1())
        ca = _certificate("coloebpf CA", None, ca_key, None, ca_key, now, CA_DAYS)
        files = {directory / "ca.pem": _pem(ca), directory / "ca.key": _key_pem(ca_key)}
    for host in hosts:
        key = ec.generate_private_key(ec.SECP256R1())
        files[directory / f"{host}.pem"] = _pem(_certificate(host, host, key, ca, ca_key, now, days))
        files[directory / f"{host}.key"] = _key_pem(key)
    there = [path.name for path in files if path.exists()]
    if there:
        raise PkiError(f"{directory} has {', '.join(there)} already: nothing was overwritten; choose another directory")
    _write(directory, files)
    return list(files)


def _authority(directory: Path, now: dt.datetime, days: int) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The CA that is there."""
    ca, key = _read_certificate(directory / "ca.pem"), _read_key(directory / "ca.key")
    if _public(key.public_key()) != _public(ca.public_key()):
        raise PkiError(
            f"{directory}/ca.key is not the key of ca.pem beside it: put back the pair that belongs together"
        )
    if ca.not_valid_after < now + dt.timedelta(days=days):
        raise PkiError(
            f"the CA in {directory} ends on {ca.not_valid_after:%Y-%m-%d}, before a new certificate would: "
            "make another one in another directory, with certificates for both hosts"
        )
    return ca, key


def check_name(host: str) -> None:
    """Raises PkiError if it can't be a certificate's: TLS would never find it there."""
    if not NAME.fullmatch(host) or _is_address(host):
        raise PkiError(f"{host!r} can't be a certificate's name: letters, digits, '-', '_' and '.', 63 at most")


def _is_address(host: str) -> bool:
    """TLS would look for it among the certificate's addresses, not its names."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _certificate(
    title: str,
    host: str | None,
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate | None,
    ca_key: ec.EllipticCurvePrivateKey,
    now: dt.datetime,
    days: int,
) -> x509.Certificate:
    """A host's certificate, or with `host` None the CA's own."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=0 if host is None else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(_key_usage(signs_certificates=host is None), critical=True)
    )
    if host is not None:
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        builder = builder.add_extension(both, critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates, key_cert_sign=signs_certificates, crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False, key_agreement=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _pem(certificate: x509.Certificate) -> tuple[bytes, int]:
    return certificate.public_bytes(serialization.Encoding.PEM), NO_SECRET


def _key_pem(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, int]:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain), SECRET


def _write(directory: Path, files: Mapping[Path, tuple[bytes, int]]) -> None:
    """A failure takes away what was written, for a key without its certificate would be in the way of the next try."""
    made: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path, (data, mode) in files.items():
            # O_EXCL: no file, and no link to one, is ever written through; the mode is there before the secret is.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            made.append(path)
            with os.fdopen(fd, "wb") as file:
                file.write(data)
    except OSError as e:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
        raise PkiError(f"can't write to {directory}: {e.strerror}") from e


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expiry:
    """When a certificate file ends. `name`: "own" or "ca"; `at`: Unix seconds."""

    name: str
    file: Path
    at: float

    def days_left(self, now: float) -> float:
        """Negative: it ended that many days ago."""
        return (self.at - now) / 86_400


@dataclass(frozen=True)
class Identity:
    """The three files that a host proves itself with, and knows the other one by."""

    ca: Path
    certificate: Path
    key: Path

    def check(self, name: str, now: float) -> list[Expiry]:
        """Everything that can be known to be wrong before a connection is tried; `now` in Unix seconds.

        Returns when the files end. Raises PkiError with the file and what to do.
        """
        ca, own = _read_certificate(self.ca), _read_certificate(self.certificate)
        key = _read_key(self.key)
        if _public(key.public_key()) != _public(own.public_key()):
            raise PkiError(
                f"{self.key} is not the key of {self.certificate}: they are of two different hosts or makings"
            )
        try:
            _verify(ca, own)
        except (InvalidSignature, TypeError, ValueError) as e:
            raise PkiError(
                f"{self.certificate} was not signed by {self.ca}: both hosts need files of one init-pki"
            ) from e
        if name not in _names(own):
            raise PkiError(f"{self.certificate} is for {', '.join(_names(own)) or 'nobody'}, but this host is {name}")
        expiries = [
            Expiry("ca", self.ca, _unix(ca.not_valid_after)),
            Expiry("own", self.certificate, _unix(own.not_valid_after)),
        ]
        for expiry, certificate in zip(expiries, (ca, own), strict=True):
            if expiry.at <= now:
                raise PkiError(
                    f"{expiry.file} expired on {certificate.not_valid_after:%Y-%m-%d}: make new certificates"
                )
            if _unix(certificate.not_valid_before) > now:
                raise PkiError(
                    f"{expiry.file} is not valid before {certificate.not_valid_before:%Y-%m-%d %H:%M} UTC: "
                    "is this host's clock right?"
                )
        return expiries

    def server_context(self) -> ssl.SSLContext:
        """For the side that listens: TLS 1.3, and nobody gets in without a certificate of the CA."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.num_tickets = 0  # a resumed session would skip the certificate, which may have ended since
        return self._armed(context)

    def client_context(self) -> ssl.SSLContext:
        """For the side that connects; checks the other one's name against `server_hostname`."""
        return self._armed(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))

    def _armed(self, context: ssl.SSLContext) -> ssl.SSLContext:
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(self.ca)
            context.load_cert_chain(self.certificate, self.key, password=_no_password)
        except (OSError, ValueError) as e:  # ssl.SSLError is an OSError
            raise PkiError(f"TLS can't use {self.ca}, {self.certificate} and {self.key}: {e}") from e
        return context


def names_of(peer_certificate: Mapping[str, Any] | None) -> list[str]:
    """The DNS names of what ssl's getpeercert() returned; none for no certificate."""
    return [value for kind, value in (peer_certificate or {}).get("subjectAltName", ()) if kind == "DNS"]


def _no_password() -> str:
    raise ValueError("the key is locked with a password; a service can't type it")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise PkiError(f"can't read {path}: {e.strerror}; `coloebpf config init-pki` makes such files") from e


def _read_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as e:
        raise PkiError(f"{path} is no certificate in PEM form") from e


def _read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = _read(path)
    mode = path.stat().st_mode
    if mode & READABLE_BY_ALL:
        raise PkiError(f"{path} can be read by every user (mode {mode & 0o777:o}): chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError) as e:  # TypeError: it has a password
        raise PkiError(f"{path} is no unlocked private key in PEM form") from e
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(f"{path} is no key on an elliptic curve, as `coloebpf config init-pki` makes them")
    return key


def _verify(ca: x509.Certificate, own: x509.Certificate) -> None:
    signer = ca.public_key()
    if own.signature_hash_algorithm is None:
        raise ValueError("no hash")
    if not isinstance(signer, ec.EllipticCurvePublicKey):
        raise TypeError("not an elliptic curve")
    signer.verify(own.signature, own.tbs_certificate_bytes, ec.ECDSA(own.signature_hash_algorithm))


def _public(key: Any) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return bytes(key.public_bytes(serialization.Encoding.DER, form))


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return []
    return found.value.get_values_for_type(x509.DNSName)


def _unix(moment: dt.datetime) -> float:
    return moment.replace(tzinfo=dt.UTC).timestamp()
