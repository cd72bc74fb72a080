"""Who may call what, over real sockets: tokens, certificates, permissions, and what a stranger gets."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytest_twisted
import trustme
from twisted.internet import reactor
from twisted.internet.address import IPv4Address, IPv6Address, UNIXAddress
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import clientFromString, connectProtocol
from twisted.internet.protocol import Protocol as TwistedProtocol
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.logger import globalLogPublisher, textFileLogObserver
from zope.interface import implementer

from protoframe import (
    CertificateAuthenticator,
    ConnectFailed,
    Factory,
    FirstOf,
    IAuthenticator,
    Identity,
    IInterceptor,
    Internal,
    Limits,
    PermissionDenied,
    Protocol,
    Shown,
    Token,
    TokenAuthenticator,
    Unauthenticated,
    connect,
    current_call,
    listen,
    request,
)
from protoframe._endpoints import _ClientFactory
from protoframe.core.frames import Flag, Hello, Kind, serialize_frame, serialize_preface, serialize_request
from protoframe.core.schema import methods_of
from protoframe.reflection import Reflection

ANN = "token-of-ann-0123456789"
BOB = "token-of-bob-0123456789"
WRONG = "token-of-nobody-0123456789"


class Vault(Protocol):
    runs: ClassVar[list[str]] = []

    @request
    async def who(self) -> str | None:
        identity = current_call().identity
        return identity.name if identity is not None else None

    @request
    async def names(self) -> list[str]:
        return list(current_call().identity.names)

    @request(permission="write")
    async def write(self, text: str) -> str:
        self.runs.append(text)
        return text

    @request(permission="write")
    async def watch(self) -> AsyncIterator[str]:
        self.runs.append("watched")
        yield "secret"


class Admin(Protocol, permission="admin"):
    @request
    async def stop(self) -> str:
        return "stopped"

    @request(permission="write")
    async def wipe(self) -> str:
        return "wiped"


@pytest.fixture
def tokens(tmp_path: Path) -> Any:
    path = tmp_path / "tokens"
    path.write_text(f"ann {ANN} write admin\nbob {BOB}\ncid token-of-cid-0123456789 admin\n")
    return TokenAuthenticator.from_file(path)


def token(tmp_path: Path, text: str) -> Token:
    path = tmp_path / "token"
    path.write_text(text + "\n")
    return Token.from_file(path)


@asynccontextmanager
async def serving(factory: Factory, where: str = "tcp:0:interface=127.0.0.1") -> AsyncIterator[str]:
    port = await listen(reactor, where, factory)
    try:
        yield f"127.0.0.1:{port.getHost().port}"
    finally:
        await port.stopListening()


@pytest.fixture
def log() -> Any:
    text = io.StringIO()
    observer = textFileLogObserver(text)
    globalLogPublisher.addObserver(observer)
    yield text
    globalLogPublisher.removeObserver(observer)


@pytest_twisted.ensureDeferred
async def test_who_shows_a_token_is_known_to_handlers_and_may_what_it_is_permitted(tokens: Any, tmp_path: Path) -> None:
    factory = Factory(Vault, Admin, authenticator=tokens)
    async with serving(factory) as place:
        where = f"tcp:{place}"
        async with connect(reactor, where, Vault, token=token(tmp_path, ANN)) as vault:
            assert await vault.who() == "ann"
            assert await vault.write("a") == "a"
            assert [item async for item in vault.watch()] == ["secret"]
            (connection,) = factory.connections
            assert connection.identity is not None
            assert connection.identity.name == "ann"
        async with connect(reactor, where, Vault, token=token(tmp_path, BOB)) as vault:
            assert await vault.who() == "bob"
            Vault.runs.clear()
            with pytest.raises(PermissionDenied, match=r"Vault\.write takes the permission write") as caught:
                await vault.write("b")
            assert caught.value.may_have_run is False
            with pytest.raises(PermissionDenied):
                async for _ in vault.watch():
                    pass
            assert Vault.runs == []


@pytest_twisted.ensureDeferred
async def test_the_permissions_of_a_protocol_and_of_its_method_are_both_asked_for(tokens: Any, tmp_path: Path) -> None:
    async with serving(Factory(Admin, authenticator=tokens)) as place:
        async with connect(reactor, f"tcp:{place}", Admin, token=token(tmp_path, "token-of-cid-0123456789")) as admin:
            assert await admin.stop() == "stopped"
            with pytest.raises(PermissionDenied, match="permission write"):
                await admin.wipe()
        async with connect(reactor, f"tcp:{place}", Admin, token=token(tmp_path, BOB)) as admin:
            with pytest.raises(PermissionDenied, match="permission admin"):
                await admin.stop()
            with pytest.raises(PermissionDenied, match="permission admin, write"):
                await admin.wipe()


@pytest_twisted.ensureDeferred
async def test_a_wrong_token_gets_one_error_and_is_nowhere_in_the_log(
    tokens: Any, tmp_path: Path, log: io.StringIO
) -> None:
    async with serving(Factory(Vault, authenticator=tokens)) as place:
        for shown in (token(tmp_path, WRONG), None):
            connecting = connect(reactor, f"tcp:{place}", Vault, token=shown)
            with pytest.raises(Unauthenticated) as caught:
                await connecting
            assert caught.value.may_have_run is False
            assert WRONG not in f"{caught.value!r} {connecting!r} {caught.value.__cause__!r}"
    lines = [line for line in log.getvalue().splitlines() if "Unauthenticated" in line]
    # One from the server for each, and one from each client.
    assert len(lines) == 2
    assert "the token is not known here" in lines[0]
    assert WRONG not in log.getvalue()


class Sink(TwistedProtocol):
    """A client that plays by no rules, and keeps what it gets."""

    def __init__(self) -> None:
        self.got = b""
        self.over: Deferred[bytes] = Deferred()

    def dataReceived(self, data: bytes) -> None:
        self.got += data

    def connectionLost(self, reason: Any = None) -> None:
        self.over.callback(self.got)


def hello(shown: str) -> bytes:
    settings = Hello(max_frame=65536, max_message=1 << 20, max_unfinished=1 << 20, max_calls=10, token=shown)
    return serialize_frame(Kind.HELLO, 0, 0, settings.serialize())


@pytest.mark.parametrize("greeting", [b"", hello(""), hello(WRONG), hello("x" * 1500)])
@pytest_twisted.ensureDeferred
async def test_a_stranger_reaches_nothing_whatever_it_sends_at_once(greeting: bytes, tokens: Any) -> None:
    Vault.runs.clear()
    limits = Limits(handshake_timeout=0.5)
    async with serving(Factory(Vault, authenticator=tokens, limits=limits)) as place:
        for method in (b"Vault.who", b"Vault.write", b"protoframe.Reflection.protocols"):
            sink: Any = await connectProtocol(clientFromString(reactor, f"tcp:{place}"), Sink())
            message = serialize_request(5.0, method, b"", b"\x81\xa4text\xa1x")
            sink.transport.write(serialize_preface() + greeting + serialize_frame(Kind.REQUEST, 0, 1, message))
            got = await sink.over
            # The preface, and a GOAWAY: not even a HELLO, which would tell what is here.
            assert got[:8] == serialize_preface()
            assert got[8 + 2] == Kind.GOAWAY
            assert len(got) == 8 + 12 + int.from_bytes(got[8:10])
    assert Vault.runs == []


@pytest_twisted.ensureDeferred
async def test_without_a_token_nobody_is_known_and_what_asks_for_permission_is_closed() -> None:
    async with serving(Factory(Vault)) as place, connect(reactor, f"tcp:{place}", Vault) as vault:
        assert await vault.who() is None
        with pytest.raises(Unauthenticated, match=r"Vault\.write asks who calls") as caught:
            await vault.write("x")
        assert caught.value.may_have_run is False


@pytest_twisted.ensureDeferred
async def test_who_shows_nothing_is_let_in_where_that_is_allowed_but_not_with_a_wrong_token(
    tokens: Any, tmp_path: Path
) -> None:
    async with serving(Factory(Vault, authenticator=tokens, anonymous=True)) as place:
        async with connect(reactor, f"tcp:{place}", Vault) as vault:
            assert await vault.who() is None
            with pytest.raises(Unauthenticated):
                await vault.write("x")
        with pytest.raises(Unauthenticated, match="not known"):
            await connect(reactor, f"tcp:{place}", Vault, token=token(tmp_path, WRONG))


@implementer(IAuthenticator)
class Slow:
    """Asks somebody else first."""

    def __init__(self, answer: Any) -> None:
        self.asked: Deferred[None] = Deferred()
        self.answer: Deferred[Any] = Deferred()

    def authenticate(self, shown: Shown) -> Deferred[Any]:
        self.asked.callback(None)
        return self.answer


@pytest_twisted.ensureDeferred
async def test_an_authenticator_may_take_its_time_and_nothing_is_told_meanwhile(tmp_path: Path) -> None:
    slow = Slow(None)
    async with serving(Factory(Vault, authenticator=slow)) as place:
        opening: Any = Deferred.fromCoroutine(opened(f"tcp:{place}"))
        await slow.asked
        assert not opening.called
        slow.answer.callback(Identity("dora"))
        vault, connecting = await opening
        assert await vault.who() == "dora"
        await connecting.close()


async def opened(where: str) -> Any:
    connecting = connect(reactor, where, Vault)
    return await connecting, connecting


@pytest_twisted.ensureDeferred
async def test_an_authenticator_that_fails_lets_nobody_in_and_keeps_its_words_at_home(log: io.StringIO) -> None:
    slow = Slow(None)
    slow.answer.errback(KeyError("the database is at 10.0.0.7"))
    async with serving(Factory(Vault, authenticator=slow)) as place:
        with pytest.raises(Unauthenticated, match="could not find out who calls") as caught:
            await connect(reactor, f"tcp:{place}", Vault)
        assert "10.0.0.7" not in repr(caught.value)
    assert "10.0.0.7" in log.getvalue()


@pytest_twisted.ensureDeferred
async def test_one_that_asks_for_ever_is_given_up() -> None:
    slow = Slow(None)
    async with serving(Factory(Vault, authenticator=slow, limits=Limits(handshake_timeout=0.2))) as place:
        with pytest.raises(ConnectFailed, match=r"no conversation within 0\.2 s"):
            await connect(reactor, f"tcp:{place}", Vault)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    for name, issued in (
        ("server", authority.issue_cert("localhost", "127.0.0.1")),
        ("ann", authority.issue_cert("ann.example", common_name="ann")),
        ("eve", authority.issue_cert("eve.example", common_name="eve")),
    ):
        issued.private_key_and_cert_chain_pem.write_to_path(str(directory / f"{name}.pem"))
    return directory


@pytest_twisted.ensureDeferred
async def test_the_certificate_of_a_peer_is_its_identity_at_both_ends(certificates: Path) -> None:
    factory = Factory(Vault)
    server = f"tls:0:interface=127.0.0.1:privateKey={certificates}/server.pem:trustRoots={certificates}/ca.pem"
    async with serving(factory, server) as place:
        port = place.rpartition(":")[2]
        where = f"tls:localhost:{port}:trustRoots={certificates}/ca.pem:certificate={certificates}/ann.pem"
        where += f":privateKey={certificates}/ann.pem"
        connecting = connect(reactor, where, Vault)
        async with connecting as vault:
            assert await vault.who() == "ann"
            assert await vault.names() == ["ann", "ann.example"]
            assert connecting.connection.identity is not None
            assert "localhost" in connecting.connection.identity.names


@pytest_twisted.ensureDeferred
async def test_certificates_give_permissions_and_one_that_is_not_on_the_list_is_turned_away(
    certificates: Path, tokens: Any, tmp_path: Path
) -> None:
    authenticator = FirstOf(CertificateAuthenticator({"ann": ["write"]}), tokens)
    server = f"tls:0:interface=127.0.0.1:privateKey={certificates}/server.pem:trustRoots={certificates}/ca.pem"
    async with serving(Factory(Vault, authenticator=authenticator), server) as place:
        port = place.rpartition(":")[2]

        def where(name: str) -> str:
            pem = f"{certificates}/{name}.pem"
            return f"tls:localhost:{port}:trustRoots={certificates}/ca.pem:certificate={pem}:privateKey={pem}"

        async with connect(reactor, where("ann"), Vault) as vault:
            assert await vault.write("x") == "x"
        with pytest.raises(Unauthenticated, match="the certificate of 'eve' is not known here"):
            await connect(reactor, where("eve"), Vault)


@pytest_twisted.ensureDeferred
async def test_reflection_says_what_is_permitted_to_whom_and_only_to_who_is_let_in(tokens: Any, tmp_path: Path) -> None:
    async with serving(Factory(Vault, Admin, authenticator=tokens)) as place:
        async with connect(reactor, f"tcp:{place}", Reflection, token=token(tmp_path, BOB)) as reflection:
            description = await reflection.describe("Admin")
            assert {one.name: one.permissions for one in description.methods} == {
                "stop": ["admin"],
                "wipe": ["admin", "write"],
            }
        with pytest.raises(Unauthenticated):
            await connect(reactor, f"tcp:{place}", Reflection)


def test_what_is_no_authenticator_no_interceptor_and_no_token_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match="does not provide IAuthenticator"):
        Factory(Vault, authenticator=object())
    with pytest.raises(TypeError, match="does not provide IInterceptor"):
        Factory(Vault, interceptors=[object()])
    with pytest.raises(TypeError, match=r"expected a protoframe\.Token, got str") as caught:
        connect(reactor, "tcp:localhost:1", Vault, token="hunter2-hunter2-hunter2")  # type: ignore[arg-type]
    assert "hunter2" not in str(caught.value)


@implementer(IInterceptor)
class Noting:
    def __init__(self, name: str, seen: list[Any]) -> None:
        self.name = name
        self.seen = seen

    async def intercept(self, call: Any, proceed: Any) -> Any:
        self.seen.append((self.name, call.incoming, call.method, getattr(call.identity, "name", None)))
        try:
            return await proceed()
        finally:
            self.seen.append((self.name, "after"))


@implementer(IInterceptor)
class Refusing:
    async def intercept(self, call: Any, proceed: Any) -> Any:
        if call.incoming and call.arguments.text == "forbidden":
            raise PermissionDenied("not this word")
        return await proceed()


@pytest_twisted.ensureDeferred
async def test_interceptors_run_around_calls_at_both_ends_in_their_order(tokens: Any, tmp_path: Path) -> None:
    seen: list[Any] = []
    factory = Factory(Vault, authenticator=tokens, interceptors=[Noting("one", seen), Noting("two", seen)])
    async with serving(factory) as place:
        mine = [Noting("outer", seen), Noting("inner", seen)]
        async with connect(reactor, f"tcp:{place}", Vault, token=token(tmp_path, ANN), interceptors=mine) as vault:
            assert await vault.who() == "ann"
            assert seen == [
                ("outer", False, "Vault.who", None),
                ("inner", False, "Vault.who", None),
                ("one", True, "Vault.who", "ann"),
                ("two", True, "Vault.who", "ann"),
                ("two", "after"),
                ("one", "after"),
                ("inner", "after"),
                ("outer", "after"),
            ]
            assert [item async for item in vault.watch()] == ["secret"]


@pytest_twisted.ensureDeferred
async def test_an_interceptor_refuses_in_words_that_reach_the_caller_and_the_handler_does_not_run() -> None:
    class Words(Protocol):
        said: ClassVar[list[str]] = []

        @request
        async def say(self, text: str) -> None:
            self.said.append(text)
            if text == "handler":
                raise PermissionDenied("a handler's own words stay at home")

    factory = Factory(Words, interceptors=[Refusing()])
    async with serving(factory) as place, connect(reactor, f"tcp:{place}", Words) as words:
        await words.say("fine")
        with pytest.raises(PermissionDenied, match="not this word"):
            await words.say("forbidden")
        with pytest.raises(Internal, match="internal error"):
            await words.say("handler")
    assert Words.said == ["fine", "handler"]


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        (IPv4Address("TCP", "192.0.2.1", 1), True),
        (IPv6Address("TCP", "fe80::1%eth0", 1), True),
        (IPv4Address("TCP", "127.0.0.1", 1), False),
        (UNIXAddress("/run/x.sock"), False),
    ],
)
def test_a_token_that_goes_over_a_network_unencrypted_is_warned_of(
    address: Any, warned: bool, tmp_path: Path, log: io.StringIO
) -> None:
    carrier = _ClientFactory(Clock(), Limits(), [], token(tmp_path, ANN)).buildProtocol(None)
    carrier.makeConnection(StringTransport(peerAddress=address))
    assert ("unencrypted" in log.getvalue()) is warned
    assert ANN not in log.getvalue()


class Base(Protocol, permission="base"):
    @request(permission="take")
    async def take(self) -> str:
        return "taken"

    @request
    async def look(self) -> str:
        return "seen"


class Other(Protocol, permission="other"):
    @request
    async def look_too(self) -> str:
        return "seen"


class Both(Other, Base, permission="both"):
    @request(timeout=5.0)
    async def take(self) -> str:
        return "taken anyway"


def test_no_subclass_takes_a_permission_away_that_a_class_above_it_asks_for() -> None:
    asked = {name: set(method.permissions) for name, method in methods_of(Both).items()}
    everything = {"base", "other", "both"}
    assert asked == {"take": everything | {"take"}, "look": everything, "look_too": everything}


@pytest_twisted.ensureDeferred
async def test_what_is_not_permitted_is_in_the_log_with_who_asked_and_a_flood_of_it_is_not(
    tokens: Any, tmp_path: Path, log: io.StringIO
) -> None:
    bob = token(tmp_path, BOB)
    async with (
        serving(Factory(Vault, authenticator=tokens)) as place,
        connect(reactor, f"tcp:{place}", Vault, token=bob) as vault,
    ):
        for _ in range(20):
            with pytest.raises(PermissionDenied):
                await vault.write("x")
    lines = [line for line in log.getvalue().splitlines() if "PermissionDenied" in line]
    assert len(lines) == 5
    assert "(bob)" in lines[0]
    assert "Vault.write" in lines[0]


def test_who_is_turned_away_and_says_nothing_is_not_waited_for() -> None:
    clock = Clock()
    factory = Factory(Vault, limits=Limits(max_connections=1), reactor=clock)
    for _ in range(2):
        carrier: Any = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
        transport = StringTransport(peerAddress=IPv4Address("TCP", "192.0.2.1", 1))
        carrier.makeConnection(transport)
    assert transport.disconnecting
    clock.advance(4.9)
    assert not transport.disconnected
    clock.advance(0.2)
    assert transport.disconnected


def test_what_a_peer_makes_up_stays_on_its_line_of_the_log(log: io.StringIO) -> None:
    factory = Factory(Vault, reactor=Clock())
    carrier: Any = factory.buildProtocol(IPv4Address("TCP", "192.0.2.1", 1))
    carrier.makeConnection(StringTransport(peerAddress=IPv4Address("TCP", "192.0.2.1", 1)))
    message = serialize_request(5.0, b"Vault.\x1b[2J\nforged: all is well", b"", b"\x80")
    carrier.dataReceived(serialize_preface() + hello("") + serialize_frame(Kind.REQUEST, Flag.ONEWAY, 1, message))
    (line,) = log.getvalue().splitlines()
    assert "UnknownMethod" in line
    assert line.count("forged") == 2
    assert "\x1b" not in line
