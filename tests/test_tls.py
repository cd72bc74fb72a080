"""TLS: endpoint strings, whose certificates are taken, and what each failure is called; over real sockets."""

from __future__ import annotations

import datetime
import ssl as python_ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_twisted
import trustme
from OpenSSL import SSL
from service_identity import VerificationError
from service_identity.hazmat import DNS_ID, DNSMismatch, IPAddress_ID, IPAddressMismatch
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import (
    HostnameEndpoint,
    SSL4ServerEndpoint,
    TCP4ServerEndpoint,
    connectProtocol,
    quoteStringArgument,
    wrapClientTLS,
)
from twisted.internet.error import ConnectionLost as TwistedConnectionLost
from twisted.internet.protocol import Factory as TwistedFactory
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.ssl import CertificateOptions
from twisted.internet.testing import MemoryReactor, StringTransport
from twisted.trial.unittest import SynchronousTestCase

from protoframe import ConnectFailed, Factory, Limits, connect, listen
from protoframe._endpoint_strings import bind_parts, split_endpoint
from protoframe._endpoints import client_endpoint, server_endpoint
from protoframe._tls import (
    CertificateRefused,
    _authorities,
    _credentials,
    _options,
    certificate_of,
    describe_tls_failure,
)
from protoframe.servers.upper import Speech
from tests.processes import free_port, pf, server

UNTRUSTED = "the certificate is signed by an authority that is not trusted here"
PAST = datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
#: So long, in seconds, that whoever waits for it has failed.
LONG = Limits(handshake_timeout=20.0)


class Files:
    """A directory with keys and certificates: NAME.key and NAME.pem."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.authority = trustme.CA()
        self.stranger = trustme.CA()
        self.write("ca.pem", self.authority.cert_pem)
        self.write("stranger.pem", self.stranger.cert_pem)
        self.write("roots/ca.pem", self.authority.cert_pem)
        self.issue("server", self.authority, "localhost", "127.0.0.1", "::1")
        self.issue("other", self.authority, "other.example", "10.1.2.3")
        self.issue("many", self.authority, *(f"h{number}.example" for number in range(9)))
        self.issue("expired", self.authority, "localhost", not_before=PAST - datetime.timedelta(1), not_after=PAST)
        self.issue("early", self.authority, "localhost", not_before=datetime.datetime(2037, 1, 1, tzinfo=datetime.UTC))
        self.issue("client", self.authority, "ann", common_name="ann")
        self.issue("old-client", self.authority, "ann", not_before=PAST - datetime.timedelta(1), not_after=PAST)
        self.issue("strange-client", self.stranger, "ann", common_name="ann")
        child = self.authority.create_child_ca()
        self.issue("chained", child, "localhost")
        # The way to the authority apart from the certificate.
        pems = (directory / "chained.pem").read_text().partition("-----END CERTIFICATE-----\n")
        (directory / "alone.pem").write_text(pems[0] + pems[1])
        (directory / "between.pem").write_text(pems[2])
        (directory / "both.pem").write_bytes(
            (directory / "server.pem").read_bytes() + (directory / "server.key").read_bytes()
        )

    def write(self, name: str, blob: Any) -> None:
        path = self.directory / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(blob.bytes())

    def issue(self, name: str, authority: trustme.CA, *identities: str, **more: Any) -> None:
        leaf = authority.issue_cert(*identities, **more)
        self.write(f"{name}.key", leaf.private_key_pem)
        (self.directory / f"{name}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))

    def __call__(self, text: str) -> str:
        """An endpoint string, in which @ stands for the directory."""
        return text.replace("@", f"{quoteStringArgument(str(self.directory))}/")

    def server(self, name: str = "server", more: str = "") -> str:
        return self(f"tls:0:interface=127.0.0.1:privateKey=@{name}.key:certKey=@{name}.pem{more}")

    def client(self, port: Any, more: str = ":trustRoots=@ca.pem", host: str = "localhost") -> str:
        return self(f"tls:{host}:{port.getHost().port}{more}")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


class Recorder(TwistedProtocol):
    """Keeps what comes, and greets, so that the other end would have something to receive as well.

    :ivar lost: fires with why the connection ended.
    """

    def __init__(self) -> None:
        self.received = b""
        self.lost: Deferred[Any] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(b"a secret")

    def dataReceived(self, data: bytes) -> None:
        self.received += data

    def connectionLost(self, reason: Any = None) -> None:
        self.lost.callback(reason.value)


class Recorders(TwistedFactory):
    noisy = False

    def __init__(self) -> None:
        self.made: list[Recorder] = []
        self.first: Deferred[Recorder] = Deferred()

    def buildProtocol(self, addr: Any) -> Recorder:
        recorder = Recorder()
        self.made.append(recorder)
        if not self.first.called:
            self.first.callback(recorder)
        return recorder


@asynccontextmanager
async def listening(where: str, factory: Any) -> AsyncIterator[Any]:
    port = await listen(reactor, where, factory)
    try:
        yield port
    finally:
        await port.stopListening()


async def use(where: str) -> None:
    async with connect(reactor, where, Speech, limits=LONG) as speech:
        assert await speech.upper("hello") == "HELLO"


async def refusal(where: str) -> str:
    """How a connection that must fail does so, without its place."""
    with pytest.raises(ConnectFailed) as caught:
        await connect(reactor, where, Speech, limits=LONG)
    assert not caught.value.may_have_run
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{where}: ")
    return caught.value.message.removeprefix(f"{where}: ")


# Whom is talked to.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "LocalHost"])
@pytest.mark.parametrize("roots", ["@ca.pem", "@roots"])
@pytest_twisted.ensureDeferred
async def test_a_server_whose_certificate_is_right_is_talked_to(files: Files, host: str, roots: str) -> None:
    async with listening(files.server(), Factory(Speech)) as port:
        await use(files.client(port, f":trustRoots={roots}", host))


@pytest_twisted.ensureDeferred
async def test_ipv6_addresses_are_checked_too(files: Files) -> None:
    for name, fails in (("server", False), ("other", True)):
        where = files(f"tls:0:interface=\\:\\:1:privateKey=@{name}.key:certKey=@{name}.pem")
        async with listening(where, Factory(Speech)) as port:
            where = files.client(port, host="[::1]")
            if fails:
                assert await refusal(where) == "the certificate is for other.example, 10.1.2.3, not for ::1"
            else:
                await use(where)


@pytest.mark.parametrize(
    "parts",
    [
        "privateKey=@chained.key:certKey=@chained.pem",
        "privateKey=@chained.key:certKey=@alone.pem:extraCertChain=@between.pem",
        "privateKey=@both.pem",
        "backlog=5:certKey=@server.pem:privateKey=@both.pem",
    ],
)
@pytest_twisted.ensureDeferred
async def test_keys_and_chains_may_be_in_one_file_or_several(files: Files, parts: str) -> None:
    async with listening(files(f"tls:0:{parts}"), Factory(Speech)) as port:
        await use(files.client(port))


@pytest_twisted.ensureDeferred
async def test_a_chain_that_has_a_gap_is_not_trusted(files: Files) -> None:
    async with listening(files("tls:0:privateKey=@chained.key:certKey=@alone.pem"), Recorders()) as port:
        assert await refusal(files.client(port)) == UNTRUSTED


@pytest.mark.parametrize(
    ("name", "more", "host", "text"),
    [
        ("expired", ":trustRoots=@ca.pem", "localhost", "the certificate has expired"),
        ("early", ":trustRoots=@ca.pem", "localhost", "the certificate is not valid yet"),
        (
            "other",
            ":trustRoots=@ca.pem",
            "localhost",
            "the certificate is for other.example, 10.1.2.3, not for localhost",
        ),
        (
            "other",
            ":trustRoots=@ca.pem",
            "127.0.0.1",
            "the certificate is for other.example, 10.1.2.3, not for 127.0.0.1",
        ),
        (
            "many",
            ":trustRoots=@ca.pem",
            "localhost",
            "the certificate is for h0.example, h1.example, h2.example and 6 more, not for localhost",
        ),
        ("server", ":trustRoots=@stranger.pem", "localhost", UNTRUSTED),
        ("server", "", "localhost", UNTRUSTED),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_wrong_certificate_is_refused_before_anything_is_sent(
    files: Files, name: str, more: str, host: str, text: str
) -> None:
    factory = Recorders()
    async with listening(files.server(name), factory) as port:
        assert await refusal(files.client(port, more, host)) == text
        recorder = await factory.first
        assert isinstance(await recorder.lost, SSL.Error)
        assert (recorder.received, len(factory.made)) == (b"", 1)


# Who is talked to: mutual TLS.

MUTUAL = ":trustRoots=@ca.pem"


class Knowing(Factory):
    """A factory that looks whom it talks to, once data has come."""

    def __init__(self) -> None:
        super().__init__(Speech)
        self.names: list[str | None] = []

    def buildProtocol(self, addr: Any) -> Any:
        carrier: Any = super().buildProtocol(addr)
        take = carrier.dataReceived

        def look(data: bytes) -> None:
            certificate = certificate_of(carrier.transport)
            self.names.append(certificate and certificate.subject.rfc4514_string())
            take(data)

        carrier.dataReceived = look
        return carrier


@pytest.mark.parametrize("roots", ["@ca.pem", "@roots"])
@pytest_twisted.ensureDeferred
async def test_a_client_with_a_good_certificate_is_served_and_known(files: Files, roots: str) -> None:
    factory = Knowing()
    async with listening(files.server(more=f":trustRoots={roots}"), factory) as port:
        where = files.client(port, f"{MUTUAL}:certificate=@client.pem:privateKey=@client.key")
        await use(where)
    assert "CN=ann" in (factory.names[0] or "")
    assert len(set(factory.names)) == 1


@pytest_twisted.ensureDeferred
async def test_a_server_without_trust_roots_knows_no_one(files: Files) -> None:
    factory = Knowing()
    async with listening(files.server(), factory) as port:
        where = files.client(port, f"{MUTUAL}:certificate=@client.pem:privateKey=@client.key")
        await use(where)
    assert set(factory.names) == {None}


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        ("", "the other end asks for a certificate, and this end has none"),
        ("strange-client", "the other end does not trust the authority that signed the certificate of this end"),
        ("old-client", "the other end takes the certificate of this end for expired"),
    ],
)
@pytest_twisted.ensureDeferred
async def test_a_client_without_a_good_certificate_is_refused_before_anything_is_read(
    files: Files, shown: str, text: str
) -> None:
    factory = Recorders()
    more = f":certificate=@{shown}.pem:privateKey=@{shown}.key" if shown else ""
    async with listening(files.server(more=MUTUAL), factory) as port:
        assert await refusal(files.client(port, MUTUAL + more)) == text
        recorder = await factory.first
        assert isinstance(await recorder.lost, SSL.Error)
        assert recorder.received == b""


@pytest_twisted.ensureDeferred
async def test_a_client_that_is_refused_gets_nothing_either(files: Files) -> None:
    async with listening(files.server(more=MUTUAL), Recorders()) as port:
        # A client that does not mind whom it talks to.
        creator = CertificateOptions()
        endpoint = wrapClientTLS(creator, HostnameEndpoint(reactor, "localhost", port.getHost().port))
        recorder = await connectProtocol(endpoint, Recorder())
        assert (
            describe_tls_failure(await recorder.lost) == "the other end asks for a certificate, and this end has none"
        )
        assert recorder.received == b""


@pytest_twisted.ensureDeferred
async def test_a_refused_handshake_is_told_in_the_words_of_tls_1_2_too(files: Files) -> None:
    async with listening(files.server(more=MUTUAL), Recorders()) as port:
        creator = CertificateOptions()
        creator.getContext().set_options(SSL.OP_NO_TLSv1_3)
        endpoint = wrapClientTLS(creator, HostnameEndpoint(reactor, "localhost", port.getHost().port))
        text = await refusal_of(endpoint)
        assert text.endswith("the other end refuses the TLS handshake: it may ask for a certificate")


async def refusal_of(endpoint: Any) -> str:
    with pytest.raises(ConnectFailed) as caught:
        await connect(reactor, endpoint, Speech, limits=LONG)
    return caught.value.message


@pytest_twisted.ensureDeferred
async def test_versions_before_1_2_are_not_spoken(files: Files) -> None:
    factory = Recorders()
    async with listening(files.server(), factory) as port:
        context = SSL.Context(SSL.TLS_METHOD)
        context.set_max_proto_version(SSL.TLS1_1_VERSION)
        context.set_cipher_list(b"ALL:@SECLEVEL=0")
        creator = CertificateOptions()
        creator._context = context
        endpoint = wrapClientTLS(creator, HostnameEndpoint(reactor, "localhost", port.getHost().port))
        assert (await refusal_of(endpoint)).endswith("there is no version of TLS that both ends speak")
        assert (await factory.first).received == b""


# Who is known.


@pytest.mark.parametrize("trusts", [False, True])
@pytest_twisted.ensureDeferred
async def test_who_is_let_pass_without_a_check_is_not_known(files: Files, trusts: bool) -> None:
    shown = _credentials(files("@server.key"), files("@server.pem"), None)
    options = _options({**shown, "trustRoot": _authorities(files("@ca.pem"))} if trusts else shown)
    # Asks for a certificate, and takes any.
    options.getContext().set_verify(SSL.VERIFY_PEER, lambda *_: True)
    factory = Knowing()
    port = await listen(reactor, SSL4ServerEndpoint(reactor, 0, options, interface="127.0.0.1"), factory)
    known = []
    try:
        for name in ("strange-client", "old-client", "client"):
            await use(files.client(port, f"{MUTUAL}:certificate=@{name}.pem:privateKey=@{name}.key"))
            known.append({bool(name) for name in factory.names})
            factory.names.clear()
    finally:
        await port.stopListening()
    assert known == [{False}, {False}, {trusts}]


class Known(SynchronousTestCase):
    def test_nobody_is_known_without_tls(self) -> None:
        self.assertIsNone(certificate_of(StringTransport()))
        self.assertIsNone(certificate_of(None))

    def test_nobody_is_known_before_the_handshake_or_when_it_is_over(self) -> None:
        class Transport:
            handle: Any = SSL.Connection(SSL.Context(SSL.TLS_METHOD), None)

            def getHandle(self) -> Any:
                return self.handle

        transport = Transport()
        self.assertIsNone(certificate_of(transport))
        transport.handle.set_verify(SSL.VERIFY_PEER)
        self.assertIsNone(certificate_of(transport))
        transport.handle = None
        self.assertIsNone(certificate_of(transport))


@pytest_twisted.ensureDeferred
async def test_a_client_knows_its_server(files: Files) -> None:
    async with listening(files.server(), Factory(Speech)) as port:
        endpoint = client_endpoint(reactor, files.client(port))
        first: Deferred[Any] = Deferred()

        class Client(TwistedProtocol):
            def dataReceived(self, data: bytes) -> None:
                if not first.called:
                    first.callback(certificate_of(self.transport))
                    self.transport.abortConnection()

        await connectProtocol(endpoint, Client())
        pem = (files.directory / "server.pem").read_bytes()
        certificate = await first
        assert certificate.public_bytes(_pem()) == pem


def _pem() -> Any:
    from cryptography.hazmat.primitives.serialization import Encoding

    return Encoding.PEM


# One end with TLS, and one without.


@pytest_twisted.ensureDeferred
async def test_a_server_without_tls_is_told_to_be_one(files: Files) -> None:
    async with listening("tcp:0:interface=127.0.0.1", Factory(Speech)) as port:
        assert await refusal(files.client(port)) == "the other end does not speak TLS"


class Closing(TwistedProtocol):
    def dataReceived(self, data: bytes) -> None:
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        self.transport.loseConnection()


@pytest_twisted.ensureDeferred
async def test_a_server_of_another_kind_is_told_apart(files: Files) -> None:
    port = await TCP4ServerEndpoint(reactor, 0, interface="127.0.0.1").listen(TwistedFactory.forProtocol(Closing))
    try:
        assert await refusal(files.client(port)) == "the other end does not speak TLS"
    finally:
        await port.stopListening()


@pytest_twisted.ensureDeferred
async def test_a_client_without_tls_is_told_what_may_be_wrong(files: Files) -> None:
    factory = Recorders()
    async with listening(files.server(), factory) as port:
        text = await refusal(f"tcp:127.0.0.1:{port.getHost().port}")
        assert text.startswith("the connection was lost")
        assert text.endswith("(if TLS is spoken there, connect with tls: instead of tcp:)")
        assert (await factory.first).received == b""


# Strings.


class Strings(SynchronousTestCase):
    def test_a_string_is_taken_apart_as_twisted_does_it(self) -> None:
        from twisted.internet.endpoints import _parse

        for where in (
            "tls",
            "tls:",
            "tls:1:a=b:c:d=e",
            "tls:1:a=b=c\\:d\\\\e\\=f",
            "a\\=b:c",
            "tls::",
            "k=v:tls",
            "tls:[\\:\\:1]:e=ü",
            "tls:1:k=" + quoteStringArgument("a:b\\c=d"),
        ):
            kind, positional, named = split_endpoint(where)
            self.assertEqual(([kind, *positional], named), _parse(where), where)

    def test_what_is_ambiguous_is_refused(self) -> None:
        for where in ("tls:a=1:a=2", "tls:1\\"):
            self.assertRaises(ValueError, split_endpoint, where)

    def test_parts_are_bound_to_names(self) -> None:
        names = ("port", "interface", "backlog")
        bound = bind_parts(["12000"], {"interface": ""}, ("port",), names, ("port",))
        self.assertEqual(bound, {"port": "12000", "interface": ""})
        for positional, named in (
            ([], {}),
            (["1", "2"], {}),
            (["1"], {"port": "2"}),
            (["1"], {"nosuch": "2"}),
            ([""], {}),
            (["1"], {"backlog": ""}),
        ):
            with self.assertRaises(ValueError):
                bind_parts(positional, named, ("port",), names, ("port",))

    def test_other_kinds_are_twisted_s(self) -> None:
        for where in ("tcp:0", "tcp6:0", "unix:x.sock"):
            self.assertNotIn("SSL", type(server_endpoint(MemoryReactor(), where)).__name__)


GOOD = "privateKey=@server.key:certKey=@server.pem"


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tls", "the port is missing"),
        ("tls:0", "privateKey= is missing"),
        (f"tls:{GOOD}", "the port is missing"),
        (f"tls:x:{GOOD}", "'x' is no port number"),
        (f"tls:-1:{GOOD}", "'-1' is no port number"),
        (f"tls:65536:{GOOD}", "port 65536 is above 65535"),
        (f"tls:\N{ARABIC-INDIC DIGIT ONE}:{GOOD}", "is no port number"),
        ("tls:localhost:12000", "'12000' is a part too many"),
        (f"tls:0:1:{GOOD}", "'1' is a part too many"),
        (f"tls:0:port=1:{GOOD}", "port= is given twice"),
        (f"tls:0:{GOOD}:certKey=x", "certKey= is given twice"),
        (f"tls:0:{GOOD}:trustroots=x", "there is no part trustroots=; there are port=, privateKey=, certKey="),
        (f"tls:0:{GOOD}:trustRoots=", "trustRoots= is empty"),
        (f"tls:0:{GOOD}:backlog=many", "backlog=many is no number above 0"),
        (f"tls:0:{GOOD}\\", "nothing follows the backslash"),
        ("tls:0:privateKey=@nosuch.key", "no such file or directory: @nosuch.key"),
        ("tls:0:privateKey=@server.key", "there is no certificate in @server.key"),
        ("tls:0:privateKey=@server.pem", "there is no private key in @server.pem"),
        ("tls:0:privateKey=@client.key:certKey=@server.pem", "is not that of the certificate in @server.pem"),
        ("tls:0:privateKey=@encrypted.key:certKey=@server.pem", "@encrypted.key is encrypted, and must not be"),
        ("tls:0:privateKey=@broken.key:certKey=@server.pem", "the private key in @broken.key cannot be read"),
        ("tls:0:privateKey=@server.key:certKey=@broken.pem", "a certificate in @broken.pem cannot be read"),
        ("tls:0:privateKey=@weak.key:certKey=@weak.pem", "OpenSSL does not take the certificate: "),
        (f"tls:0:{GOOD}:extraCertChain=@nosuch.pem", "no such file or directory: @nosuch.pem"),
        (f"tls:0:{GOOD}:extraCertChain=@server.key", "there is no certificate in @server.key"),
        (f"tls:0:{GOOD}:trustRoots=@nosuch.pem", "no such file or directory: @nosuch.pem"),
        (f"tls:0:{GOOD}:trustRoots=@server.key", "there is no certificate in @server.key"),
        (f"tls:0:{GOOD}:trustRoots=@empty", "there is no .pem file with a certificate in @empty"),
        (f"tls:0:{GOOD}:trustRoots=@broken.pem", "a certificate in @broken.pem cannot be read"),
    ],
)
def test_a_wrong_server_string_is_one_line_before_anything_listens(
    files: Files, more_files: None, where: str, text: str
) -> None:
    where = files(where)
    memory = MemoryReactor()
    with pytest.raises(ValueError, match=r"^'") as caught:
        server_endpoint(memory, where)
    said = str(caught.value)
    assert said.startswith(f"{where!r} is no place to listen: ")
    assert text.replace("@", f"{files.directory}/") in said
    assert "\n" not in said
    assert memory.sslServers == memory.tcpServers == []


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("tls", "the host is missing"),
        ("tls:localhost", "the port is missing"),
        ("tls::1", "the host is empty"),
        ("tls:localhost:x", "'x' is no port number"),
        ("tls:localhost:65536", "port 65536 is above 65535"),
        ("tls:localhost:1:timeout=never", "timeout=never is no number above 0"),
        ("tls:localhost:1:nosuch=x", "there is no part nosuch="),
        ("tls:localhost:1:trustRoots=@nosuch", "no such file or directory: @nosuch"),
        ("tls:localhost:1:trustRoots=@empty", "there is no .pem file with a certificate in @empty"),
        ("tls:localhost:1:privateKey=@client.key", "privateKey= is given without certificate="),
        ("tls:localhost:1:certificate=@client.pem", "there is no private key in @client.pem"),
        ("tls:localhost:1:certificate=@server.pem:privateKey=@client.key", "is not that of the certificate"),
        (f"tls:{'ü' * 99}:1", "is no host name"),
    ],
)
def test_a_wrong_client_string_is_one_line_at_once(files: Files, more_files: None, where: str, text: str) -> None:
    where = files(where)
    with pytest.raises(ValueError, match=r"^'") as caught:
        client_endpoint(MemoryReactor(), where)
    assert repr(where) in str(caught.value)
    assert text.replace("@", f"{files.directory}/") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def more_files(files: Files) -> None:
    """Files that are wrong."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import rsa
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    directory = files.directory
    key: Any = load_pem_private_key((directory / "server.key").read_bytes(), None)
    (directory / "encrypted.key").write_bytes(
        key.private_bytes(_pem(), PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    )
    (directory / "broken.key").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    (directory / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    (directory / "empty").mkdir()
    weak = rsa.generate_private_key(65537, 1024)
    name = x509.Name([])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(weak.public_key())
        .serial_number(1)
        .not_valid_before(PAST)
        .not_valid_after(PAST + datetime.timedelta(1))
        .sign(weak, hashes.SHA256())
    )
    (directory / "weak.pem").write_bytes(certificate.public_bytes(_pem()))
    (directory / "weak.key").write_bytes(weak.private_bytes(_pem(), PrivateFormat.PKCS8, NoEncryption()))


def test_paths_with_colons_are_written_with_escapes(files: Files, tmp_path: Path) -> None:
    directory = tmp_path / "a:b\\c=d"
    directory.mkdir()
    for name in ("server.key", "server.pem", "ca.pem"):
        (directory / name).write_bytes((files.directory / name).read_bytes())
    at = quoteStringArgument(f"{directory}/")
    memory = MemoryReactor()
    endpoint = server_endpoint(
        memory, f"tls:12000:privateKey={at}server.key:certKey={at}server.pem:trustRoots={at}ca.pem:backlog=7"
    )
    endpoint.listen(Recorders())
    port, _, _, backlog, interface = memory.sslServers[0]
    assert (port, backlog, interface) == (12000, 7, "")


# Words.


class Words(SynchronousTestCase):
    def test_what_is_no_failure_of_tls_has_none(self) -> None:
        for other in (None, ValueError("x"), TwistedConnectionLost(), SSL.WantReadError(), SSL.SysCallError(-1, "x")):
            self.assertIsNone(describe_tls_failure(other))

    def test_the_words_of_twisted_s_own_checks_are_known(self) -> None:
        for error, wanted in (
            (DNSMismatch(mismatched_id=DNS_ID("here.example")), "here.example"),
            (IPAddressMismatch(mismatched_id=IPAddress_ID("10.0.0.1")), "10.0.0.1"),
            (object(), "the host"),
        ):
            found = describe_tls_failure(VerificationError(errors=[error]))
            self.assertEqual(found, f"the certificate is not for {wanted}")

    def test_each_refusal_has_its_own(self) -> None:
        self.assertEqual(describe_tls_failure(CertificateRefused("it is blue")), "it is blue")
        self.assertEqual(str(describe_tls_failure(SSL.Error())), "TLS failed: no reason given")
        self.assertEqual(describe_tls_failure(SSL.Error([("a", "b", "odd")])), "TLS failed: odd")
        for reason in ("sslv3 alert bad certificate", "ssl/tls alert bad certificate"):
            found = describe_tls_failure(SSL.Error([("SSL routines", "", reason)]))
            self.assertEqual(found, "the other end refuses the certificate of this end")


# Processes.


@pytest.mark.slow
def test_pf_and_twistd_talk_over_mutual_tls(files: Files, tmp_path: Path) -> None:
    port = free_port()
    serving = files(f"tls:{port}:interface=127.0.0.1:{GOOD}:trustRoots=@roots")
    where = files(f"tls:localhost:{port}:trustRoots=@ca.pem")
    call = ("Speech.upper", "text=hello")
    with server(tmp_path, "pf-upper", "--listen", serving):
        done = pf("call", files(f"{where}:certificate=@client.pem:privateKey=@client.key"), *call)
        assert (done.stdout, done.stderr, done.returncode) == ('"HELLO"\n', "", 0)
        for refused in (
            pf("call", where, *call),
            pf("call", files(f"{where}:certificate=@strange-client.pem:privateKey=@strange-client.key"), *call),
            pf("call", f"tls:localhost:{port}", *call),
            pf("call", f"tcp:localhost:{port}", *call),
        ):
            assert (refused.stdout, refused.returncode, refused.stderr.count("\n")) == ("", 7, 1)
        # Not this package's client.
        context = python_ssl.create_default_context(cafile=str(files.directory / "ca.pem"))
        context.load_cert_chain(files.directory / "client.pem", files.directory / "client.key")
        import socket

        with (
            socket.create_connection(("127.0.0.1", port), 20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as spoken,
        ):
            assert spoken.version() == "TLSv1.3"
            assert spoken.recv(1)
