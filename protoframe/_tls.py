"""TLS from endpoint strings: keys and authorities read, the server's certificate checked, and failures put into words.

Knows OpenSSL and PEM files; not what is spoken over TLS, nor who asks.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import idna
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from OpenSSL.crypto import X509, PKey, X509StoreContext, X509StoreContextError
from OpenSSL.crypto import Error as CryptoError
from OpenSSL.SSL import (
    VERIFY_FAIL_IF_NO_PEER_CERT,
    VERIFY_PEER,
    Connection,
    Context,
    Error,
    SysCallError,
    WantReadError,
    X509VerificationCodes,
    ZeroReturnError,
)
from service_identity import VerificationError
from service_identity.cryptography import verify_certificate_hostname, verify_certificate_ip_address
from twisted.internet.abstract import isIPAddress, isIPv6Address
from twisted.internet.endpoints import HostnameEndpoint, SSL4ServerEndpoint, clientFromString, wrapClientTLS
from twisted.internet.interfaces import IOpenSSLClientConnectionCreator, IStreamClientEndpoint, IStreamServerEndpoint
from twisted.internet.ssl import Certificate, CertificateOptions, TLSVersion, platformTrust, trustRootFromCertificates
from zope.interface import implementer

from protoframe._endpoint_strings import bind_parts, number_of, port_of, split_endpoint

__all__ = [
    "certificate_of",
    "client_endpoint_of",
    "describe_tls_failure",
    "is_tls_client",
    "is_tls_server",
    "server_endpoint_of",
]

_SERVER_NAMES = ("privateKey", "certKey", "extraCertChain", "trustRoots", "interface", "backlog")
#: Parts that only a server string of this package has.
_OURS = frozenset({"privateKey", "certKey", "extraCertChain", "trustRoots"})
#: In the order of Twisted, which takes each by position too.
_CLIENT_NAMES = ("host", "port", "timeout", "bindAddress", "certificate", "privateKey", "trustRoots", "endpoint")

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN ([A-Z ]*PRIVATE KEY)-----.+?-----END \1-----", re.DOTALL)

#: Names of a certificate that are told, and how long each may be.
_MOST_NAMES = 3
_LONGEST_NAME = 80

# Servers.


def is_tls_server(where: str) -> bool:
    """Whether a server string is for `server_endpoint_of`.

    Later releases of Twisted have a ``tls:`` of their own, with a directory where this one has a port; that one is
    left to them.
    """
    if not _is_tls(where):
        return False
    try:
        _, positional, named = split_endpoint(where)
    except ValueError:
        return True
    directory = named.get("path") or next(iter(positional), "")
    return directory.isdecimal() or not _OURS.isdisjoint(named) or not os.path.isdir(directory)


def server_endpoint_of(reactor: Any, where: str) -> IStreamServerEndpoint:
    """The endpoint of ``tls:PORT:privateKey=FILE`` and more: TLS 1.2 or later, over TCP.

    ``certKey=`` is by default the file with the key; ``extraCertChain=`` has certificates between it and its
    authority, which may also stand behind it in its own file.  With ``trustRoots=``, a file or a directory of
    ``.pem`` files, the handshake fails unless the client shows a certificate of one of these authorities.

    :raises ValueError: a part of the string, or a file that it names, is wrong.
    :raises OSError: a file cannot be read.
    """
    _, positional, named = split_endpoint(where)
    parts = bind_parts(positional, named, ("port",), ("port", *_SERVER_NAMES), ("port", "privateKey"))
    port = port_of(parts["port"])
    backlog = number_of("backlog", parts.get("backlog", "50"))
    key = parts["privateKey"]
    shown = _credentials(key, parts.get("certKey", key), parts.get("extraCertChain"))
    if "trustRoots" in parts:
        shown["trustRoot"] = _authorities(parts["trustRoots"])
    options = _options(shown)
    endpoint: IStreamServerEndpoint = SSL4ServerEndpoint(reactor, port, options, backlog, parts.get("interface", ""))
    return endpoint


# Clients.


def is_tls_client(where: str) -> bool:
    """Whether a client string is for `client_endpoint_of`."""
    return _is_tls(where)


def client_endpoint_of(reactor: Any, where: str) -> IStreamClientEndpoint:
    """The endpoint of ``tls:host:port`` and more, with the parts of Twisted's own.

    It differs from Twisted's in that ``trustRoots=`` may be a file as well as a directory, that what is wrong is found
    at once, and that a certificate that does not do is refused with the reason: see `describe_tls_failure`.

    :raises ValueError: a part of the string, or a file that it names, is wrong.
    :raises OSError: a file cannot be read.
    """
    _, positional, named = split_endpoint(where)
    parts = bind_parts(positional, named, _CLIENT_NAMES, _CLIENT_NAMES, ("host", "port"))
    host, port = parts["host"], port_of(parts["port"])
    if "privateKey" in parts and "certificate" not in parts:
        raise ValueError("privateKey= is given without certificate=")
    shown: dict[str, Any] = {}
    if "certificate" in parts:
        shown = _credentials(parts.get("privateKey", parts["certificate"]), parts["certificate"], None)
    shown["trustRoot"] = _authorities(parts["trustRoots"]) if "trustRoots" in parts else platformTrust()
    creator = _ClientConnections(host, _options(shown))
    if "endpoint" in parts:
        below = clientFromString(reactor, parts["endpoint"])
    else:
        address = (parts["bindAddress"], 0) if "bindAddress" in parts else None
        below = HostnameEndpoint(reactor, host, port, number_of("timeout", parts.get("timeout", "30")), address)
    endpoint: IStreamClientEndpoint = wrapClientTLS(creator, below)
    return endpoint


class CertificateRefused(Error):
    """The server's certificate does not do.

    It takes the place of the `OpenSSL.SSL.Error` that the handshake ends with, which does not tell why.

    :param text: why, in the middle of a line.
    """

    def __init__(self, text: str) -> None:
        # As OpenSSL's errors are laid out, for Twisted looks into them.
        super().__init__([("certificate", "", text)])
        self.text = text


@implementer(IOpenSSLClientConnectionCreator)
class _ClientConnections:
    """Makes what speaks TLS with a server whose host is known."""

    def __init__(self, host: str, options: CertificateOptions) -> None:
        self._host = host
        self._options = options
        # The scope of an IPv6 address is about this machine, and no certificate has it.
        address = host.partition("%")[0]
        self._address = address if isIPAddress(address) or isIPv6Address(address) else ""
        self._name = "" if self._address else _ascii(host)

    def clientConnectionForTLS(self, tlsProtocol: Any) -> Connection:  # noqa: N803 - Twisted's name
        """For a new connection."""
        return _ClientConnection(self._options.getContext(), _Check(self._host, self._name, self._address), self._name)


class _Check:
    """What becomes of the certificate of one server.

    :ivar fault: why it does not do; empty so far.
    :ivar passed: whether it is the host's.
    """

    def __init__(self, host: str, name: str, address: str) -> None:
        self._host = host
        self._name = name
        self._address = address
        self.fault = ""
        self.passed = False

    def verify(self, connection: Connection, certificate: X509, number: int, depth: int, ok: int) -> bool:
        """Called by OpenSSL for each certificate of the chain, the server's last, and for each fault."""
        if self.fault:
            return False
        try:
            if not ok:
                self.fault = _fault(number, depth)
            elif depth == 0:
                self._verify_host(certificate.to_cryptography())
        except Exception as error:
            # Whatever it is, the certificate is not known to be right.
            self.fault = f"the certificate cannot be checked ({type(error).__name__})"
        return not self.fault

    def _verify_host(self, certificate: x509.Certificate) -> None:
        try:
            if self._address:
                verify_certificate_ip_address(certificate, self._address)
            else:
                verify_certificate_hostname(certificate, self._name)
        except Exception as error:
            names = _names(certificate)
            if names and not isinstance(error, VerificationError):
                raise
            self.fault = f"the certificate is for {names or 'no host'}, not for {self._host}"
        else:
            self.passed = True


class _ClientConnection(Connection):
    """A connection to a server whose certificate is checked, and that fails with what was found."""

    def __init__(self, context: Context, check: _Check, name: str) -> None:
        super().__init__(context, None)
        self._check = check
        self.set_verify(VERIFY_PEER | VERIFY_FAIL_IF_NO_PEER_CERT, check.verify)
        if name:
            self.set_tlsext_host_name(name.encode())

    def do_handshake(self) -> None:
        """
        :raises CertificateRefused: the certificate does not do.
        """
        try:
            super().do_handshake()
        except WantReadError:
            raise
        except Error:
            if self._check.fault:
                raise CertificateRefused(self._check.fault) from None
            raise
        if self._check.fault or not self._check.passed:
            raise CertificateRefused(self._check.fault or "the certificate was not checked")


def _fault(number: int, depth: int) -> str:
    """What OpenSSL finds wrong with a certificate of the chain."""
    codes = X509VerificationCodes
    what = "the certificate" if depth == 0 else "the certificate of an authority of the server"
    if number == codes.ERR_CERT_HAS_EXPIRED:
        return f"{what} has expired"
    if number == codes.ERR_CERT_NOT_YET_VALID:
        return f"{what} is not valid yet"
    if number == codes.ERR_CERT_REVOKED:
        return f"{what} has been revoked"
    if number == codes.ERR_INVALID_PURPOSE:
        return f"{what} is not for servers" if depth == 0 else f"{what} is none of an authority"
    if number in _UNTRUSTED:
        return "the certificate is signed by an authority that is not trusted here"
    return f"{what} is not valid (OpenSSL's error {number})"


_UNTRUSTED = frozenset(
    {
        X509VerificationCodes.ERR_UNABLE_TO_GET_ISSUER_CERT,
        X509VerificationCodes.ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY,
        X509VerificationCodes.ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE,
        X509VerificationCodes.ERR_DEPTH_ZERO_SELF_SIGNED_CERT,
        X509VerificationCodes.ERR_SELF_SIGNED_CERT_IN_CHAIN,
        X509VerificationCodes.ERR_CERT_UNTRUSTED,
        X509VerificationCodes.ERR_CERT_SIGNATURE_FAILURE,
    }
)


def _names(certificate: x509.Certificate) -> str:
    """Whom a certificate is for; whoever made it wrote what it likes, so that is kept short and printable."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ""
    names = [
        *extension.get_values_for_type(x509.DNSName),
        *map(str, extension.get_values_for_type(x509.IPAddress)),
    ]
    shown = [
        "".join(character if character.isprintable() else "?" for character in name[:_LONGEST_NAME])
        for name in names[:_MOST_NAMES]
    ]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _ascii(host: str) -> str:
    """A host name as it stands in certificates."""
    if host.isascii():
        return host
    try:
        return idna.encode(host, uts46=True).decode()
    except idna.IDNAError as error:
        raise ValueError(f"{host!r} is no host name: {error}") from None


# Files.


def _is_tls(where: str) -> bool:
    return where.partition(":")[0].lower() == "tls"


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _certificates(path: str) -> list[X509]:
    """
    :raises ValueError: there is none in the file, or one that cannot be read.
    """
    try:
        found = [Certificate.loadPEM(block).original for block in _CERTIFICATE.findall(_read(path))]
    except (Error, CryptoError):
        raise ValueError(f"a certificate in {path} cannot be read") from None
    if not found:
        raise ValueError(f"there is no certificate in {path}")
    return found


def _credentials(key_path: str, certificate_path: str, chain_path: str | None) -> dict[str, Any]:
    """What an end shows of itself, as `CertificateOptions` takes it.

    :raises ValueError: a file does not hold what it should, or the key is another certificate's.
    """
    block = _KEY.search(_read(key_path))
    if block is None:
        raise ValueError(f"there is no private key in {key_path}")
    try:
        # Not OpenSSL's own reader: that would ask whoever is at the terminal for a passphrase.
        key: Any = load_pem_private_key(block[0], None)
        private = PKey.from_cryptography_key(key)
    except TypeError:
        encrypted = block[1].startswith(b"ENCRYPTED") or b"ENCRYPTED" in block[0].partition(b"\n\n")[0]
        fault = "is encrypted, and must not be" if encrypted else "is of a kind that cannot be used"
        raise ValueError(f"the private key in {key_path} {fault}") from None
    except (ValueError, UnsupportedAlgorithm, Error, CryptoError):
        raise ValueError(f"the private key in {key_path} cannot be read") from None
    certificate, *chain = _certificates(certificate_path)
    if chain_path is not None:
        chain += _certificates(chain_path)
    public = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    certified = certificate.to_cryptography().public_key()
    if public != certified.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo):
        raise ValueError(f"the private key in {key_path} is not that of the certificate in {certificate_path}")
    return {"privateKey": private, "certificate": certificate, "extraCertChain": chain}


def _authorities(path: str) -> Any:
    """Whom to trust: the certificates in a file, or in the ``.pem`` files of a directory.

    :raises ValueError: there are none.
    """
    if not os.path.isdir(path):
        found = _certificates(path)
    else:
        files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if name.endswith(".pem")]
        # A key may stand beside them.
        found = [one for file in files if _CERTIFICATE.search(_read(file)) for one in _certificates(file)]
        if not found:
            raise ValueError(f"there is no .pem file with a certificate in {path}")
    return trustRootFromCertificates([Certificate(one) for one in found])


def _options(shown: dict[str, Any]) -> CertificateOptions:
    """
    :raises ValueError: OpenSSL does not take the certificate.
    """
    options = CertificateOptions(raiseMinimumTo=TLSVersion.TLSv1_2, **shown)
    try:
        with warnings.catch_warnings():
            # pyOpenSSL would have other objects than Twisted gives it.
            warnings.simplefilter("ignore", DeprecationWarning)
            options.getContext()
    except (Error, CryptoError) as error:
        raise ValueError(f"OpenSSL does not take the certificate: {_last_reason(error)}") from None
    return options


# Looking at what was established, and at what failed.


def certificate_of(transport: Any) -> x509.Certificate | None:
    """The certificate of the peer of a TLS transport, if this end has checked it; for use once data has come.

    It is ``None`` for transports without TLS, and where the peer showed none, this end asked for none, or what it
    showed does not lead to an authority that is trusted: whoever has the context accept that accepts no identity.
    """
    handle = transport.getHandle() if hasattr(transport, "getHandle") else None
    if not isinstance(handle, Connection) or not handle.get_verify_mode() & VERIFY_PEER:
        return None
    certificate = handle.get_peer_certificate()
    store = handle.get_context().get_cert_store()
    if certificate is None or store is None or handle.get_peer_finished() is None:
        return None
    try:
        # Anew: a callback of the context may have let anything pass.
        X509StoreContext(store, certificate, handle.get_peer_cert_chain()).verify_certificate()
    except X509StoreContextError:
        return None
    return certificate.to_cryptography()


def describe_tls_failure(exception: BaseException | None) -> str | None:
    """Why there is no TLS connection, or no longer, in the middle of a line; ``None`` for what is no failure of TLS."""
    if isinstance(exception, CertificateRefused):
        return exception.text
    if isinstance(exception, VerificationError):
        wanted = ", ".join(filter(None, map(_wanted, exception.errors)))
        return f"the certificate is not for {wanted or 'the host'}"
    if not isinstance(exception, Error) or isinstance(exception, SysCallError | WantReadError | ZeroReturnError):
        return None
    reason = _last_reason(exception)
    for fragment, text in _REASONS.items():
        if fragment in reason:
            return text
    return f"TLS failed: {reason}"


def _wanted(mismatch: Any) -> str:
    wanted = getattr(mismatch, "mismatched_id", None)
    name = getattr(wanted, "hostname", None) or getattr(wanted, "ip", None) or ""
    return name.decode() if isinstance(name, bytes) else str(name)


def _last_reason(error: Exception) -> str:
    errors = error.args[0] if error.args else None
    return str(errors[-1][-1]) if isinstance(errors, list) and errors else "no reason given"


_NOT_TLS = "the other end does not speak TLS"
_REFUSED = "the other end refuses the certificate of this end"

#: Parts of OpenSSL's reasons, whose first words vary with its version; "alert" is what the other end says.
_REASONS = {
    "alert certificate required": "the other end asks for a certificate, and this end has none",
    "alert unknown ca": "the other end does not trust the authority that signed the certificate of this end",
    "alert certificate expired": "the other end takes the certificate of this end for expired",
    "alert bad certificate": _REFUSED,
    "alert unsupported certificate": _REFUSED,
    "alert certificate revoked": _REFUSED,
    "alert certificate unknown": _REFUSED,
    "alert access denied": _REFUSED,
    "alert handshake failure": "the other end refuses the TLS handshake: it may ask for a certificate",
    "alert protocol version": "there is no version of TLS that both ends speak",
    "unsupported protocol": "there is no version of TLS that both ends speak",
    "certificate verify failed": "the certificate is not valid, or of an authority that is not trusted here",
    "did not return a certificate": "the other end showed no certificate",
    "wrong version number": _NOT_TLS,
    "http request": _NOT_TLS,
    "packet length too long": _NOT_TLS,
    "record layer failure": _NOT_TLS,
    "unknown protocol": _NOT_TLS,
}
